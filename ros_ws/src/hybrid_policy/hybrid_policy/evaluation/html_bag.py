"""One bag's section of the report: commands, worst moments, errors, seams, guard, latency, inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.evaluation import figures
from hybrid_policy.evaluation.html_parts import escape, lines, milliseconds, picture, table, titled

Series = Mapping[str, NDArray[Any]]


#: Beside the bag's result: its section, drawn by whoever replayed it, so that many bags are drawn at once.
DRAWN = "section.html"


def section(bag: Mapping[str, Any], robot: Mapping[str, Any], folder: Path, recipes: Sequence[str]) -> str:
    """The section's inside as HTML.

    bag: its result, with what was measured. robot: ``report.robot_facts``. folder: holds the bag's ``series.npz``.
    """
    series = _load(folder / "series.npz")
    origin = int(series["span"][0]) if "span" in series else 0
    seconds = f"<small>{bag['seconds']:.1f} s</small>"
    parts = [
        f"<h2>{escape(bag['name'])} {seconds}</h2>",
        lines("What the policy could not be given", bag["lacks"], "bad"),
        lines("Damage", bag.get("problems", []), "warn"),
        lines("Notes", bag["notes"], "warn"),
    ]
    if bag["status"] == "replayed":
        parts += _replayed(bag, robot, series, [r for r in recipes if f"run/{r}/stamps" in series], origin)
    elif bag.get("joint_columns"):
        parts.append(titled("Joints", figures.joints(series, bag["joint_columns"], origin)))
    if bag.get("robot_file_sketch"):
        parts.append(
            "<details><summary>These joints as a section of a robot file</summary>"
            f"<pre>{escape(bag['robot_file_sketch'])}</pre></details>"
        )
    if bag.get("inputs"):
        parts.append(titled("Inputs", figures.inputs(bag, series, origin) + _inputs(bag)))
    if bag.get("tracking"):
        mean, largest = bag["tracking"]["mae"], bag["tracking"]["max"]
        parts.append(
            f"<p class=how>Tracking: the joints were {mean:.3g} rad (mean) from the recorded commands, "
            f"at most {largest:.3g}.</p>"
        )
    if bag["status"] != "replayed" and bag.get("topics"):
        topics = [(escape(t["name"]), escape(t["type"]), str(t["messages"])) for t in bag["topics"]]
        parts.append(titled("Topics in the bag", table(("topic", "type", "messages"), topics, "ttn")))
    return "\n".join(part for part in parts if part)


def _load(path: Path) -> Series:
    if not path.exists():  # a bag that could not be read at all has none
        return {}
    with np.load(path) as stored:
        return {key: stored[key] for key in stored.files}


def _replayed(
    bag: Mapping[str, Any], robot: Mapping[str, Any], series: Series, recipes: Sequence[str], origin: int
) -> list[str]:
    names, spans = robot["commands"], robot["command_spans"]
    return [
        titled(
            "Commands",
            figures.trajectories(series, recipes, names, spans, origin),
            "Black: recorded. Colours: what each recipe would have told the robot, tick by tick, after guard and "
            "blending. Red lines: the worst moments below.",
        ),
        titled(
            "Worst moments",
            _moments(bag, series, recipes, names, origin),
            "The three joints furthest off, over the chunk's steps.",
        ),
        titled("Error to the recorded actions", figures.errors(bag, recipes)),
        titled(f"Difference to {recipes[0]}", figures.recipes_apart(bag, series, recipes, origin)),
        titled("Seams", figures.seams(series, recipes, origin)),
        _guard(bag, recipes),
        titled("Latency", figures.latency(bag, series, recipes)),
    ]


def _moments(bag: Mapping[str, Any], series: Series, recipes: Sequence[str], names: Sequence[str], origin: int) -> str:
    recipe, base = recipes[-1], recipes[0]
    what = "from the recorded actions" if recipe == base else f"between {recipe} and {base}"
    cards = []
    for rank, worst in enumerate(bag["recipes"][recipe]["worst"]):
        at = (int(series[f"run/{recipe}/stamps"][worst["chunk"]]) - origin) * 1e-9
        prefix = f"run/{recipe}/worst/{rank}/picture/"
        keys = sorted(key for key in series if key.startswith(prefix))
        pictures = "".join(picture(key.removeprefix(prefix), series[key]) for key in keys)
        remark = f"chunk {worst['chunk']}, {worst['score']:.3g} rad {escape(what)}"
        plot = figures.moment(series, recipes, rank, names)
        cards.append(
            f"<div class=moment><h4>{max(at, 0.0):.2f} s <small>{remark}</small></h4>"
            f"<div class=pair><div class=pics>{pictures}</div><div class=plot>{plot}</div></div></div>"
        )
    return f"<div class=moments>{''.join(cards)}</div>" if cards else ""


def _guard(bag: Mapping[str, Any], recipes: Sequence[str]) -> str:
    runs = [bag["recipes"][recipe] for recipe in recipes]
    if not any(one["guard"]["chunks_limited"] or one["refused"] or one["holds"] for one in runs):
        told = ", ".join(f"{escape(r)} {one['chunks']}" for r, one in zip(recipes, runs))
        said = "Nothing was limited or refused, and the robot would never have been held"
        return titled("Guard", f"<p class=how>{said} (chunks: {told}).</p>")
    rows = []
    for recipe, one in zip(recipes, runs):
        guard = one["guard"]
        reasons = {**one["refusals"], **one["hold_reasons"]}
        told = "; ".join(f"{count} × {reason}" for reason, count in list(reasons.items())[:3])
        joints = ", ".join(f"{k} ({v})" for k, v in list(guard["joints"].items())[:4])
        values = f"{guard['position']} / {guard['velocity']} / {guard['acceleration']}"
        counts = [str(one["chunks"]), str(guard["chunks_limited"]), values]
        rows.append([escape(recipe), *counts, escape(joints), str(one["refused"]), str(one["holds"]), escape(told)])
    heads = ["recipe", "chunks", "limited", "position / velocity / acceleration", "joints (chunks)"]
    heads += ["refused", "held", ""]
    how = "Limited: chunks that the guard changed, and how many of their values by which limit."
    return titled("Guard", table(heads, rows, "tnnntnnu"), how)


def _inputs(bag: Mapping[str, Any]) -> str:
    odd = any(one["zero_stamps"] or one["resets"] for one in bag["inputs"])
    heads = ["input", "topic", "used / messages", "Hz / expected", "gaps", "longest, s", "lag, ms, p50 / p99"]
    rows = [
        [
            escape(one["role"]),
            f"<code>{escape(one['topic'])}</code>",
            f"{one['used']} / {one['messages']}",
            f"{one['rate']:.1f} / {one['expected_rate']:g}",
            str(one["gaps"]),
            f"{one['longest_gap']:.2f}",
            f"{milliseconds(one['lag']['p50'])} / {milliseconds(one['lag']['p99'])}",
            *([str(one["zero_stamps"]), str(one["resets"])] if odd else []),
        ]
        for one in bag["inputs"]
    ]
    how = "Lag: from the stamp to the recording. A gap: an interval over 2.5 expected ones."
    shown = table([*heads, "no stamp", "resets"] if odd else heads, rows, "ttnnnnnnn")
    return f"{shown}<p class=how>{how}</p>"
