"""From the bags' results to ``report.json``, whose form docs/replay.md and :data:`FORM` describe."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_policy import __version__
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.evaluation.summary import FIGURES, Check, summarise

SCHEMA = "hybrid_policy.replay/1"

#: key -> (type, meaning) of report.json; ``[]`` is each entry of a list, ``<...>`` any key of a mapping.
FORM: dict[str, tuple[str, str]] = {
    "schema": ("string", "name and version of this form; the version grows when a key changes its meaning"),
    "verdict.passed": ("boolean", "no --fail-if condition holds and every bag was replayed"),
    "verdict.line": ("string", "the verdict in a sentence"),
    "verdict.checks[].condition": ("string", "as given to --fail-if"),
    "verdict.checks[].recipe": ("string", "held against this recipe"),
    "verdict.checks[].figure": ("string", "the figure that was looked at"),
    "verdict.checks[].value": ("number or null", "its value; null where nothing says it, which fails"),
    "verdict.checks[].failed": ("boolean", "the condition holds"),
    "settings": (
        "object",
        "robot, checkpoint, recipes, rate, delay, chunking, seed: what the replay follows from",
    ),
    "summary.<recipe>.<figure>": ("number or null", "see the table of figures"),
    "bags[].name": ("string", "of the bag in this report, and of its folder under bags/"),
    "bags[].status": ("string", "replayed, inputs only (something is lacking) or failed (unreadable)"),
    "bags[].seconds": ("number", "length by the replay's clock"),
    "bags[].clock": ("string", "record: arrival is the record time; stamp: arrival is the header stamp"),
    "bags[].lacks[]": ("string", "why the policy could not be replayed"),
    "bags[].notes[]": ("string", "what was left out or taken instead, and why"),
    "bags[].problems[]": ("string", "damage to the files"),
    "bags[].inputs[]": (
        "object",
        "an input: rate, gaps, refused messages, lag between stamp and recording (s)",
    ),
    "bags[].recorded.source": ("string", "the topic of the recorded actions, or what stands in for them"),
    "bags[].recorded.beyond_limits": (
        "object",
        "joint -> share of the time that its commands break its limits",
    ),
    "bags[].tracking": ("object", "joint positions against recorded commands: mse, mae, max, by joint"),
    "bags[].recipes.<recipe>.against_recorded": ("object", "mse, mae, max, joints, horizon, cosines, skill"),
    "bags[].recipes.<recipe>.against_first": (
        "object",
        "the same against the first recipe, and the worst chunk",
    ),
    "bags[].recipes.<recipe>.seams": ("object", "position (rad), velocity (rad/s), acceleration (rad/s^2)"),
    "bags[].recipes.<recipe>.guard": (
        "object",
        "chunks limited; values limited by position, velocity, acceleration",
    ),
    "bags[].recipes.<recipe>.holds": ("integer", "times the robot would have been held, with hold_reasons"),
    "measured": (
        "object",
        "what differs from run to run: latency (ms) by bag and recipe, seconds spent and on what, versions",
    ),
}


def build(
    bags: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    recipes: Sequence[str],
    checks: Sequence[Check],
) -> dict[str, Any]:
    """The report. Everything outside ``measured`` follows from bags and settings alone."""
    kept, measured = [], {}
    for bag in bags:
        one = {k: v for k, v in bag.items() if k not in ("measured", "fingerprint", "bag")}
        kept.append(one)
        measured[bag["name"]] = bag.get("measured", {})
    figures = summarise(bags, recipes)
    latency = ("latency_p50", "latency_p99")
    return {
        "schema": SCHEMA,
        "verdict": {
            "passed": not any(c.failed for c in checks) and all(is_complete(b, recipes) for b in bags),
            "line": verdict(bags, recipes, checks, figures),
            "checks": [asdict(c) for c in checks if not c.figure.startswith("latency")],
        },
        "settings": dict(settings),
        "summary": {r: {k: v for k, v in row.items() if k not in latency} for r, row in figures.items()},
        "bags": kept,
        "measured": {
            "bags": measured,
            "summary": {r: {k: row[k] for k in latency} for r, row in figures.items()},
            "checks": [asdict(c) for c in checks if c.figure.startswith("latency")],
            "versions": {"hybrid_policy": __version__, "python": platform.python_version()},
            "machine": platform.machine(),
        },
    }


def robot_facts(robot: RobotFile) -> dict[str, Any]:
    """What the report says of the robot: its name, its commands' names and the whole range of each (rad or m)."""
    spans = robot.limits.upper - robot.limits.lower
    return {
        "robot": robot.name,
        "commands": list(robot.command_names),
        "command_spans": [float(span) if np.isfinite(span) else 0.0 for span in spans],
    }


def is_complete(bag: Mapping[str, Any], recipes: Sequence[str]) -> bool:
    """Whether all that was asked for was done: every recipe replayed, or, without recipes, the bag read."""
    return bag.get("status") == "replayed" if recipes else bag.get("status") != "failed"


def verdict(
    bags: Sequence[Mapping[str, Any]],
    recipes: Sequence[str],
    checks: Sequence[Check],
    figures: Mapping[str, Mapping[str, float | None]],
) -> str:
    """One sentence: what failed, else what was found."""
    failed = [c for c in checks if c.failed]
    absent = [b for b in bags if not is_complete(b, recipes)]
    if failed:
        return failed[0].line.removeprefix("FAILED: ") + (f" (and {len(failed) - 1} more)" if len(failed) > 1 else "")
    if absent:
        reasons = absent[0].get("lacks") or ["no reason known"]
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        count = f"{len(absent)} of {len(bags)} bags could not be {'replayed' if recipes else 'read'}"
        return f"{count}; {absent[0]['name']}: {reasons[0]}{more}"
    parts = [f"all {len(checks)} conditions kept"] if checks else []
    for recipe in recipes[1:]:
        row = figures[recipe]
        if row["action_cosine"] is not None and row["action_mae"] is not None:
            parts.append(
                f"{recipe} is within {row['action_mae']:.2g} rad of {recipes[0]} "
                f"(cosine {row['action_cosine']:.5f}, worst {row['action_cosine_min']:.5f})"
            )
    first = figures[recipes[0]] if recipes else {}
    if first.get("recorded_mae") is not None:
        parts.append(f"{recipes[0]} is {first['recorded_mae']:.3g} rad from the recorded actions")
    if not recipes:
        lacking = sum(bool(bag["lacks"]) for bag in bags)
        return f"{len(bags)} bags looked at, {lacking} of them lack something that this robot's policy would need"
    return "; ".join(parts) or "replayed; nothing was recorded to compare with"


def write(report: Mapping[str, Any], path: Path) -> None:
    """Write ``report.json``: sorted keys, so that equal reports are equal bytes."""
    path.write_text(json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def figures_table() -> str:
    """The figures as a Markdown table, for docs/replay.md."""
    lines = ["| figure | unit | over bags | meaning |", "|---|---|---|---|"]
    lines += [f"| `{f.name}` | {f.unit} | {f.over_bags} | {f.meaning} |" for f in FIGURES]
    return "\n".join(lines)


def form_table() -> str:
    """The form of report.json as a Markdown table, for docs/replay.md."""
    lines = ["| key | type | meaning |", "|---|---|---|"]
    lines += [f"| `{key}` | {kind} | {meaning} |" for key, (kind, meaning) in FORM.items()]
    return "\n".join(lines)


def fill_tables(text: str) -> str:
    """A Markdown page with its tables of figures and of report.json's form as the code has them.

    The tables stand between ``<!-- figures -->`` or ``<!-- form -->`` and ``<!-- end -->``.
    """
    for name, table in (("figures", figures_table()), ("form", form_table())):
        start = text.index(f"<!-- {name} -->") + len(f"<!-- {name} -->")
        text = text[:start] + "\n" + table + "\n" + text[text.index("<!-- end -->", start) :]
    return text


def main() -> None:
    """``python -m hybrid_policy.evaluation.report docs/replay.md`` brings the page's tables up to date."""
    path = Path(sys.argv[1])
    path.write_text(fill_tables(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
