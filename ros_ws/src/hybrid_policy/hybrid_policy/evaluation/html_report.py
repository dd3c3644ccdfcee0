"""``report.html``: one page that stands by itself, for whoever decides what goes on a robot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_policy.evaluation import figures, html_bag
from hybrid_policy.evaluation.html_parts import escape, number, table
from hybrid_policy.evaluation.html_style import STYLE
from hybrid_policy.evaluation.summary import FIGURES

#: Bags drawn in full; beyond it the page would be too heavy to open.
MOST_BAGS = 20
_SHOWN = (
    "action_cosine", "action_cosine_min", "action_mae", "recorded_cosine", "motion_cosine", "recorded_mae",
    "skill", "executed_mae", "seam_position", "seam_velocity", "guard_limited", "guard_refused", "holds",
    "latency_p50", "latency_p99",
)  # fmt: skip


def write_page(report: Mapping[str, Any], folders: Mapping[str, Path], path: Path) -> None:
    """Write the page from the report and each bag's folder."""
    bags, recipes = report["bags"], list(report["summary"])
    parts = [_head(report), _verdict(report), _summary(report, recipes), _bag_table(bags, recipes)]
    for i, bag in enumerate(bags[:MOST_BAGS]):
        parts.append(f"<section class=bag id=bag{i}>{_drawn(bag, report, folders[bag['name']], recipes)}</section>")
    if len(bags) > MOST_BAGS:
        parts.append(f"<p class=how>{len(bags) - MOST_BAGS} more bags are in report.json.</p>")
    parts.append(_foot(report))
    body = "\n".join(part for part in parts if part)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>Replay · {escape(report['settings']['robot'])}</title>"
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )
    path.write_text(page, "utf-8")


def _drawn(bag: Mapping[str, Any], report: Mapping[str, Any], folder: Path, recipes: Sequence[str]) -> str:
    """The bag's section, as its replay left it or drawn now."""
    if (folder / html_bag.DRAWN).exists():
        return (folder / html_bag.DRAWN).read_text("utf-8")
    whole = {**bag, "measured": report["measured"]["bags"][bag["name"]]}
    return html_bag.section(whole, report["settings"], folder, recipes)


def _head(report: Mapping[str, Any]) -> str:
    s = report["settings"]
    seconds = sum(bag["seconds"] for bag in report["bags"])
    facts = [
        ("robot", s["robot"]),
        ("checkpoint", s["checkpoint"]),
        ("bags", f"{len(report['bags'])}, {seconds:.0f} s"),
        ("inference", f"{s['rate']:g} Hz, delay {s['delay']}"),
        ("chunking", f"{s['chunking']}, noise seed {s['seed']}"),
    ]
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return f"<header><h1>Replay report</h1><dl>{cells}</dl></header>"


def _verdict(report: Mapping[str, Any]) -> str:
    verdict = report["verdict"]
    checks = verdict["checks"] + report["measured"]["checks"]
    if any(check["failed"] for check in checks):
        kind, word = "bad", "Failed"
    elif not verdict["passed"]:
        kind, word = "bad", "Incomplete"
    else:
        done = "Replayed" if report["summary"] else "Read"
        kind, word = ("good", "Passed") if checks else ("plain", done)
    rows = [
        (
            "<b class=bad>✗</b>" if check["failed"] else "<b class=good>✓</b>",
            escape(check["recipe"]),
            f"<code>{escape(check['figure'])}</code>",
            number(check["value"]),
            f"fail if {escape(check['condition'])}",
        )
        for check in checks
    ]
    shown = table(("", "recipe", "figure", "value", ""), rows, "tttnu") if rows else ""
    line = f"<strong>{word}</strong><span>{escape(verdict['line'])}</span>"
    return f"<section class='verdict {kind}'>{line}{shown}</section>"


def _summary(report: Mapping[str, Any], recipes: Sequence[str]) -> str:
    values = {r: {**report["summary"][r], **report["measured"]["summary"][r]} for r in recipes}
    rows = []
    for figure in (f for f in FIGURES if f.name in _SHOWN):
        cells = [values[r].get(figure.name) for r in recipes]
        if any(cell is not None for cell in cells):
            shown = [number(cell) for cell in cells]
            rows.append((f"<code>{figure.name}</code>", *shown, escape(figure.unit), escape(figure.meaning)))
    if not rows:
        return ""
    colours = [figures.COLOURS[i % len(figures.COLOURS)] for i in range(len(recipes))]
    heads = [f"<i style='background:{colour}'></i>{escape(r)}" for colour, r in zip(colours, recipes)]
    columns = "t" + "n" * len(recipes) + "uu"
    return f"<section><h2>Summary</h2>{table(('figure', *heads, '', ''), rows, columns)}</section>"


def _bag_table(bags: Sequence[Mapping[str, Any]], recipes: Sequence[str]) -> str:
    if len(bags) < 2:
        return ""
    rows = []
    for i, bag in enumerate(bags):
        runs = bag.get("recipes", {})
        told = [number(runs.get(r, {}).get("against_recorded", {}).get("mae")) for r in recipes]
        apart = [number(runs.get(r, {}).get("against_first", {}).get("mae")) for r in recipes[1:]]
        name = escape(bag["name"])
        rows.append(
            (
                f"<a href='#bag{i}'>{name}</a>" if i < MOST_BAGS else name,
                f"<b class={bag['status'].split()[0]}>{escape(bag['status'])}</b>",
                f"{bag['seconds']:.1f}",
                " / ".join(told) or "–",
                " / ".join(apart) or "–",
                escape((bag["lacks"] or bag["notes"] or [""])[0]),
            )
        )
    heads = ("bag", "status", "s", "MAE to recorded", "MAE to the first recipe", "")
    return f"<section><h2>Bags</h2>{table(heads, rows, 'ttnnnu')}</section>"


def _foot(report: Mapping[str, Any]) -> str:
    rows = [(f"<code>{f.name}</code>", escape(f.unit), escape(f.meaning)) for f in FIGURES]
    versions = ", ".join(f"{k} {v}" for k, v in report["measured"]["versions"].items())
    return (
        "<footer><details><summary>What each figure means</summary>"
        f"{table(('figure', 'unit', 'meaning'), rows)}</details>"
        f"<p>{escape(versions)}, {escape(report['measured']['machine'])}. The same numbers are in report.json; "
        "the predictions are bags under bags/*/predictions, with foxglove_layout.json to look at them.</p></footer>"
    )
