"""``report.html``: one page that stands by itself, for the person who decides whether a recipe goes on a robot."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.evaluation import figures
from hybrid_policy.evaluation.html_style import STYLE
from hybrid_policy.evaluation.summary import FIGURES

#: Bags drawn in full; beyond it the page would be too heavy to open.
MOST_BAGS = 20
_SHOWN = (
    "action_cosine", "action_cosine_min", "action_mae", "recorded_cosine", "motion_cosine", "recorded_mae", "skill",
    "executed_mae", "seam_position", "seam_velocity", "guard_limited", "guard_refused", "holds", "latency_p50",
    "latency_p99",
)  # fmt: skip


def write_page(report: Mapping[str, Any], folders: Mapping[str, Path], path: Path) -> None:
    """Write the page from the report and each bag's ``series.npz``."""
    bags = report["bags"]
    recipes = list(report["summary"])
    sections = [_bag(bag, report, folders[bag["name"]], recipes, i) for i, bag in enumerate(bags[:MOST_BAGS])]
    if len(bags) > MOST_BAGS:
        sections.append(f"<p class=note>{len(bags) - MOST_BAGS} more bags are in report.json.</p>")
    body = "\n".join(
        [
            _head(report),
            _verdict(report),
            _summary(report, recipes),
            _bag_table(bags, recipes),
            *sections,
            _foot(report),
        ]
    )
    title = f"Replay · {report['settings'].get('robot', '')}"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_e(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )
    path.write_text(page, "utf-8")


def _head(report: Mapping[str, Any]) -> str:
    s = report["settings"]
    seconds = sum(bag["seconds"] for bag in report["bags"])
    facts = [
        ("robot", s.get("robot")), ("checkpoint", s.get("checkpoint")), ("bags", f"{len(report['bags'])}, {seconds:.0f} s"),
        ("inference", f"{s.get('rate'):g} Hz, delay {s.get('delay')}"),
        ("chunking", f"{s.get('chunking')}, noise seed {s.get('seed')}"),
    ]  # fmt: skip
    cells = "".join(f"<div><dt>{_e(k)}</dt><dd>{_e(v)}</dd></div>" for k, v in facts)
    return f"<header><h1>Replay report</h1><dl>{cells}</dl></header>"


def _verdict(report: Mapping[str, Any]) -> str:
    verdict = report["verdict"]
    checks = verdict["checks"] + report["measured"]["checks"]
    failed = not verdict["passed"]
    kind = "bad" if failed else ("good" if checks else "plain")
    word = (
        "Failed"
        if any(c["failed"] for c in checks)
        else ("Incomplete" if failed else ("Passed" if checks else "Replayed"))
    )
    rows = "".join(
        f"<tr class={'bad' if c['failed'] else 'good'}><td>{'✗' if c['failed'] else '✓'}</td><td>{_e(c['recipe'])}</td>"
        f"<td>{_e(c['figure'])}</td><td class=n>{_number(c['value'])}</td><td>fail if {_e(c['condition'])}</td></tr>"
        for c in checks
    )
    table = f"<table class=checks>{rows}</table>" if rows else ""
    return f"<section class='verdict {kind}'><strong>{word}</strong><span>{_e(verdict['line'])}</span>{table}</section>"


def _summary(report: Mapping[str, Any], recipes: Sequence[str]) -> str:
    values = {r: {**report["summary"][r], **report["measured"]["summary"][r]} for r in recipes}
    rows = []
    for figure in (f for f in FIGURES if f.name in _SHOWN):
        cells = [values[r].get(figure.name) for r in recipes]
        if all(cell is None for cell in cells):
            continue
        shown = "".join(f"<td class=n>{_number(cell)}</td>" for cell in cells)
        rows.append(
            f"<tr><td><code>{figure.name}</code></td>{shown}<td class=u>{_e(figure.unit)}</td>"
            f"<td class=m>{_e(figure.meaning)}</td></tr>"
        )
    if not rows:
        return ""
    heads = "".join(
        f"<th class=n><i style='background:{figures.COLOURS[i % 6]}'></i>{_e(r)}</th>"
        for i, r in enumerate(recipes)
    )
    return (
        f"<section><h2>Summary</h2><table><thead><tr><th>figure</th>{heads}<th></th><th></th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></section>"
    )


def _bag_table(bags: Sequence[Mapping[str, Any]], recipes: Sequence[str]) -> str:
    if len(bags) < 2:
        return ""
    rows = []
    for i, bag in enumerate(bags):
        runs = bag.get("recipes", {})
        told = [_number(runs.get(r, {}).get("against_recorded", {}).get("mae")) for r in recipes]
        apart = [_number(runs.get(r, {}).get("against_first", {}).get("mae")) for r in recipes[1:]]
        name = f"<a href='#bag{i}'>{_e(bag['name'])}</a>" if i < MOST_BAGS else _e(bag["name"])
        rows.append(
            f"<tr><td>{name}</td><td class={bag['status'].split()[0]}>{_e(bag['status'])}</td>"
            f"<td class=n>{bag['seconds']:.1f}</td><td class=n>{' / '.join(told)}</td>"
            f"<td class=n>{' / '.join(apart) or '–'}</td><td class=m>{_e((bag['lacks'] or bag['notes'] or [''])[0])}</td></tr>"
        )
    return (
        "<section><h2>Bags</h2><table><thead><tr><th>bag</th><th>status</th><th class=n>s</th>"
        "<th class=n>MAE to recorded</th><th class=n>MAE to first recipe</th><th></th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></section>"
    )


def _bag(
    bag: Mapping[str, Any], report: Mapping[str, Any], folder: Path, recipes: Sequence[str], index: int
) -> str:
    series: dict[str, NDArray[Any]] = {}
    if (folder / "series.npz").exists():  # a bag that could not be read at all has none
        with np.load(folder / "series.npz") as stored:
            series = {key: stored[key] for key in stored.files}
    parts = [
        f"<section class=bag id=bag{index}><h2>{_e(bag['name'])} <small>{bag['seconds']:.1f} s</small></h2>"
    ]
    parts.append(_lines("What the policy could not be given", bag["lacks"], "bad"))
    parts.append(_lines("Damage", bag.get("problems", []), "warn"))
    parts.append(_lines("Notes", bag["notes"], "warn"))
    origin = int(series["span"][0]) if "span" in series else 0
    measured = {**bag, "measured": report["measured"]["bags"][bag["name"]]}
    if bag["status"] == "replayed":
        names = report["settings"]["commands"]
        used = [r for r in recipes if f"run/{r}/stamps" in series]
        spans = report["settings"]["command_spans"]
        parts += [
            "<h3>Commands</h3><p class=how>Black: recorded. Colours: what each recipe would have told the robot, "
            "tick by tick, after guard and blending. Red lines: the worst moments below.</p>",
            figures.trajectories(series, used, names, spans, origin),
            _moments(bag, series, used, names, origin),
            _titled("Error to the recorded actions", figures.errors(bag, used)),
            _titled(f"Difference to {used[0]}", figures.recipes_apart(bag, series, used, origin)),
            _titled("Seams", figures.seams(series, used, origin)),
            _guard(bag, used),
            _titled("Latency", figures.latency(measured, series, used)),
        ]
    elif bag.get("joint_columns"):
        parts += ["<h3>Joints</h3>", figures.joints(series, bag["joint_columns"], origin)]
    if bag.get("robot_file_sketch"):
        parts.append(
            "<details><summary>These joints as a section of a robot file</summary>"
            f"<pre>{_e(bag['robot_file_sketch'])}</pre></details>"
        )
    if bag.get("inputs"):
        parts += ["<h3>Inputs</h3>", figures.inputs(bag, series, origin), _inputs(bag)]
    if bag.get("tracking"):
        t = bag["tracking"]
        parts.append(
            f"<p class=how>Tracking: the joints were {t['mae']:.3g} rad (mean) from the recorded commands, at most "
            f"{t['max']:.3g}.</p>"
        )
    if bag["status"] != "replayed" and bag.get("topics"):
        rows = "".join(
            f"<tr><td>{_e(t['name'])}</td><td>{_e(t['type'])}</td><td class=n>{t['messages']}</td></tr>"
            for t in bag["topics"]
        )
        parts.append(f"<h3>Topics in the bag</h3><table>{rows}</table>")
    parts.append("</section>")
    return "\n".join(part for part in parts if part)


def _titled(title: str, picture: str) -> str:
    return f"<h3>{_e(title)}</h3>{picture}" if picture else ""


def _moments(
    bag: Mapping[str, Any],
    series: Mapping[str, NDArray[Any]],
    recipes: Sequence[str],
    names: Sequence[str],
    origin: int,
) -> str:
    if not recipes:
        return ""
    recipe, base = recipes[-1], recipes[0]
    cards = []
    for rank, worst in enumerate(bag["recipes"][recipe]["worst"]):
        at = (int(series[f"run/{recipe}/stamps"][worst["chunk"]]) - origin) * 1e-9
        prefix = f"run/{recipe}/worst/{rank}/picture/"
        pictures = "".join(
            f"<figure><img alt='{_e(key.removeprefix(prefix))}' src='{_jpeg(series[key])}'>"
            f"<figcaption>{_e(key.removeprefix(prefix))}</figcaption></figure>"
            for key in sorted(series) if key.startswith(prefix)
        )  # fmt: skip
        what = "from the recorded actions" if recipe == base else f"between {recipe} and {base}"
        plot = figures.moment(series, recipes, rank, names)
        cards.append(
            f"<div class=moment><h4>{at:.2f} s <small>chunk {worst['chunk']}, {worst['score']:.3g} rad {_e(what)}</small></h4>"
            f"<div class=pair><div class=pics>{pictures}</div><div class=plot>{plot}</div></div></div>"
        )
    if not cards:
        return ""
    return f"<h3>Worst moments</h3><p class=how>The three joints furthest off, over the chunk's steps.</p><div class=moments>{''.join(cards)}</div>"


def _guard(bag: Mapping[str, Any], recipes: Sequence[str]) -> str:
    runs = [bag["recipes"][recipe] for recipe in recipes]
    if not any(one["guard"]["chunks_limited"] or one["refused"] or one["holds"] for one in runs):
        counts = ", ".join(f"{_e(r)} {one['chunks']}" for r, one in zip(recipes, runs))
        return (
            "<h3>Guard</h3><p class=how>Nothing was limited or refused, and the robot would never have been held "
            f"(chunks: {counts}).</p>"
        )
    rows = []
    for recipe in recipes:
        one = bag["recipes"][recipe]
        g = one["guard"]
        reasons = [
            *one["refusals"].items(),
            *((k, v) for k, v in one["hold_reasons"].items() if k not in one["refusals"]),
        ]
        told = "; ".join(f"{count} × {reason}" for reason, count in reasons[:3])
        joints = ", ".join(f"{k} ({v})" for k, v in list(g["joints"].items())[:4])
        rows.append(
            f"<tr><td>{_e(recipe)}</td><td class=n>{one['chunks']}</td><td class=n>{g['chunks_limited']}</td>"
            f"<td class=n>{g['position']} / {g['velocity']} / {g['acceleration']}</td><td>{_e(joints)}</td>"
            f"<td class=n>{one['refused']}</td><td class=n>{one['holds']}</td><td class=m>{_e(told)}</td></tr>"
        )
    return (
        "<h3>Guard</h3><table><thead><tr><th>recipe</th><th class=n>chunks</th><th class=n>limited</th>"
        "<th class=n>values: position / velocity / acceleration</th><th>joints (chunks)</th><th class=n>refused</th>"
        f"<th class=n>held</th><th></th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _inputs(bag: Mapping[str, Any]) -> str:
    odd = any(i["zero_stamps"] or i["resets"] for i in bag["inputs"])
    rows = "".join(
        f"<tr><td>{_e(i['role'])}</td><td><code>{_e(i['topic'])}</code></td>"
        f"<td class=n>{i['used']} / {i['messages']}</td><td class=n>{i['rate']:.1f} / {i['expected_rate']:g}</td>"
        f"<td class=n>{i['gaps']}</td><td class=n>{i['longest_gap']:.2f}</td>"
        f"<td class=n>{_ms(i['lag']['p50'])} / {_ms(i['lag']['p99'])}</td>"
        + (f"<td class=n>{i['zero_stamps']}</td><td class=n>{i['resets']}</td>" if odd else "")
        + "</tr>"
        for i in bag["inputs"]
    )
    return (
        "<table><thead><tr><th>input</th><th>topic</th><th class=n>used / messages</th><th class=n>Hz / expected</th>"
        "<th class=n>gaps</th><th class=n>longest, s</th><th class=n>lag, ms, p50 / p99</th>"
        + ("<th class=n>no stamp</th><th class=n>resets</th>" if odd else "")
        + f"</tr></thead><tbody>{rows}</tbody></table>"
        "<p class=how>Lag: from the stamp to the recording. A gap: an interval over 2.5 expected ones.</p>"
    )


def _lines(title: str, lines: Sequence[str], kind: str) -> str:
    if not lines:
        return ""
    return f"<div class='lines {kind}'><b>{_e(title)}</b><ul>{''.join(f'<li>{_e(line)}</li>' for line in lines)}</ul></div>"


def _foot(report: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{f.name}</code></td><td>{_e(f.unit)}</td><td>{_e(f.meaning)}</td></tr>"
        for f in FIGURES
    )
    versions = ", ".join(f"{k} {v}" for k, v in report["measured"]["versions"].items())
    return (
        "<footer><details><summary>What each figure means</summary>"
        f"<table>{rows}</table></details><p>{_e(versions)}, {_e(report['measured']['machine'])}. The same numbers are in "
        "report.json; the predictions are bags under bags/*/predictions, with foxglove_layout.json to look at them.</p></footer>"
    )


def _jpeg(pixels: NDArray[np.uint8]) -> str:
    import cv2

    done, data = cv2.imencode(
        ".jpg", np.ascontiguousarray(pixels[:, :, ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 85]
    )
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode() if done else ""


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value)}"
    return f"{value:.5f}" if 0.9 < abs(value) < 1.0 else f"{value:.3g}"


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.1f}"


def _e(value: object) -> str:
    return html.escape(str(value), quote=True)
