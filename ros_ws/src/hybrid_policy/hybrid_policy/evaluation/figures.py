"""The report's pictures, as SVG text to be set inside the page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = Mapping[str, NDArray[Any]]
INK, FAINT, GRID, ALARM = "#1f2933", "#9aa5b1", "#e4e7eb", "#c0392b"
#: Okabe and Ito (2008): told apart by every kind of eye.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_WIDTH = 11.0
_MOST_POINTS = 2500
#: inches above a grid of plots, for its legend
_LEGEND = 0.24

_STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8.5, "axes.edgecolor": FAINT, "axes.labelcolor": INK,
    "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlecolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID,
    "grid.linewidth": 0.7, "axes.axisbelow": True, "xtick.color": INK, "ytick.color": INK, "text.color": INK,
    "xtick.major.size": 2.5, "ytick.major.size": 2.5, "legend.frameon": False, "lines.linewidth": 1.2,
    "svg.hashsalt": "hybrid_policy", "svg.fonttype": "path", "figure.dpi": 110,
    "axes.formatter.useoffset": False,
}  # fmt: skip


def trajectories(
    series: Series, recipes: Sequence[str], names: Sequence[str], spans: Sequence[float], origin: int
) -> str:
    """Small multiples: what was recorded, what each recipe would have commanded, the worst moments.

    spans: each command's whole range; a joint that hardly moves is not blown up beyond 3 % of it.
    """
    with _style():
        columns = 3
        rows = -(-len(names) // columns)
        figure, axes = _grid(rows, columns, (_WIDTH, 1.5 * rows + 0.5), sharex=True, legend=True)
        marks = _marks(series, recipes)
        for i, name in enumerate(names):
            axis = axes[i]
            for at in marks:
                axis.axvline((at - origin) * 1e-9, color=ALARM, lw=0.8, alpha=0.5)
            _recorded_line(axis, series, recipes, i, origin)
            for k, recipe in enumerate(recipes):
                times = series.get(f"run/{recipe}/executed_times")
                if times is None or not len(times):
                    continue
                keep = _thin(len(times))
                axis.plot((times[keep] - origin) * 1e-9, series[f"run/{recipe}/executed"][keep, i],
                          color=COLOURS[k % len(COLOURS)], lw=1.1, alpha=0.9, label=recipe)  # fmt: skip
            axis.set_title(name, fontsize=8, pad=3)
            axis.margins(x=0.01)
            _at_least(axis, 0.03 * spans[i])
        _finish_grid(axes, len(names), columns)
        _legend(figure, axes[0])
        return _svg(figure)


def joints(series: Series, names: Sequence[str], origin: int) -> str:
    """Where the joints were and what they were told, for a bag that no policy was replayed on."""
    with _style():
        columns = 3
        rows = -(-len(names) // columns)
        figure, axes = _grid(rows, columns, (_WIDTH, 1.5 * rows + 0.5), sharex=True, legend=True)
        keep = _thin(len(series["joint_times"]))
        times = (series["joint_times"][keep] - origin) * 1e-9
        measured = series["joints"][keep][:, series["joint_index"]]
        told = series.get("joint_told")
        for i, name in enumerate(names):
            axes[i].plot(times, measured[:, i], color=COLOURS[0], lw=1.1, label="measured")
            if told is not None:
                axes[i].plot(times, told[keep, i], color=INK, lw=1.1, alpha=0.75, label="commanded")
            axes[i].set_title(name, fontsize=8, pad=3)
            axes[i].margins(x=0.01)
        _finish_grid(axes, len(names), columns)
        _legend(figure, axes[0])
        return _svg(figure)


def errors(bag: Mapping[str, Any], recipes: Sequence[str]) -> str:
    """Error to the recorded actions: by joint, by step of the horizon."""
    found = {r: bag["recipes"][r]["against_recorded"] for r in recipes if bag["recipes"][r]["against_recorded"]}
    if not found:
        return ""
    with _style():
        first = next(iter(found.values()))
        count = len(first["joints"])
        figure, axes = _plots(1, 2, (_WIDTH, 2.6), width_ratios=[max(1.4, count / 10), 1.0])
        width = 0.8 / len(found)
        for k, (recipe, one) in enumerate(found.items()):
            at = np.arange(count) + (k - (len(found) - 1) / 2) * width
            axes[0].bar(at, [j["mae"] for j in one["joints"]], width, color=_colour(recipes, recipe), label=recipe)
            steps = np.arange(len(one["horizon"]["mae"]))
            values = np.array([np.nan if v is None else v for v in one["horizon"]["mae"]])
            axes[1].plot(steps, values, color=_colour(recipes, recipe), marker="o", ms=2.5, label=recipe)
        if "hold" in first:
            axes[1].axhline(first["hold"]["mae"], color=FAINT, ls="--", lw=1.0, label="standing still (mean)")
        axes[0].set_xticks(np.arange(count), [j["name"] for j in first["joints"]], rotation=55, ha="right", fontsize=7)
        axes[0].set_title("Mean absolute error by joint (rad; m for grippers)")
        axes[0].grid(axis="x", visible=False)
        axes[1].set_title("by step of the horizon")
        axes[1].set_xlabel("step")
        axes[1].set_ylim(bottom=0)
        axes[1].legend(fontsize=7)
        return _svg(figure)


def recipes_apart(bag: Mapping[str, Any], series: Series, recipes: Sequence[str], origin: int) -> str:
    """Each recipe's difference to the first, chunk by chunk and by step."""
    others = [r for r in recipes[1:] if bag["recipes"][r]["against_first"]]
    base = series.get(f"run/{recipes[0]}/commands") if recipes else None
    if not others or base is None:
        return ""
    with _style():
        figure, axes = _grid(1, 2, (_WIDTH, 2.3), width_ratios=[1.8, 1.0])
        for recipe in others:
            mine = series[f"run/{recipe}/commands"]
            count = min(len(mine), len(base))
            gap = np.abs(mine[:count] - base[:count]).mean(axis=(1, 2))
            times = (series[f"run/{recipe}/stamps"][:count] - origin) * 1e-9
            axes[0].plot(times, gap, color=_colour(recipes, recipe), lw=1.0, marker=".", ms=3, label=recipe)
            horizon = bag["recipes"][recipe]["against_first"]["horizon"]["mae"]
            axes[1].plot(horizon, color=_colour(recipes, recipe), marker="o", ms=2.5)
        axes[0].set_title(f"Mean absolute difference of each chunk to {recipes[0]} (rad)")
        axes[0].set_xlabel("s")
        axes[0].legend(fontsize=7)
        axes[1].set_title("by step of the horizon")
        axes[1].set_xlabel("step")
        for axis in axes:
            axis.set_ylim(bottom=0)
        return _svg(figure)


def seams(series: Series, recipes: Sequence[str], origin: int) -> str:
    """Disagreement at each seam, and when the robot would have been held."""
    known = [r for r in recipes if f"run/{r}/seams" in series]
    if not known:
        return ""
    with _style():
        figure, axes = _grid(1, 2, (_WIDTH, 2.0))
        for recipe in known:
            stamps, values = series[f"run/{recipe}/stamps"][1:], series[f"run/{recipe}/seams"][1:]
            for axis, column in zip(axes, (0, 1)):
                axis.plot((stamps - origin) * 1e-9, values[:, column], color=_colour(recipes, recipe), lw=0.9,
                          marker=".", ms=2.5, label=recipe)  # fmt: skip
            for at in series[f"run/{recipe}/holds"]:
                axes[0].axvline((at - origin) * 1e-9, color=ALARM, lw=0.8, ls=":")
        axes[0].set_title("Seams: position (rad) before blending; dotted: held")
        axes[1].set_title("Seams: velocity (rad/s)")
        for axis in axes:
            axis.set_xlabel("s")
            axis.set_ylim(bottom=0)
        axes[0].legend(fontsize=7)
        return _svg(figure)


def latency(bag: Mapping[str, Any], series: Series, recipes: Sequence[str]) -> str:
    """Histogram of the whole inference, and where its median goes."""
    measured = bag.get("measured", {}).get("latency", {})
    known = [r for r in recipes if f"run/{r}/infer_ms" in series and measured.get(r)]
    if not known:
        return ""
    with _style():
        figure, axes = _plots(1, 2, (_WIDTH, 2.0))
        values = {r: series[f"run/{r}/infer_ms"][1:] for r in known}
        joined = np.concatenate(list(values.values())) if values else np.zeros(1)
        if not len(joined):
            return ""
        count = int(np.clip(1.5 * np.sqrt(len(joined)), 12, 50))
        edges = np.linspace(joined.min() * 0.95, np.percentile(joined, 99.5) * 1.05 + 1e-6, count)
        for recipe in known:
            shown = np.clip(values[recipe], edges[0], edges[-1])
            axes[0].hist(shown, bins=edges.tolist(), color=_colour(recipes, recipe), alpha=0.55, label=recipe)
        axes[0].set_title("Inference on this machine (ms); the last bin holds what is beyond")
        axes[0].set_ylabel("chunks")
        axes[0].legend(fontsize=7)
        _stages(axes[1], measured, known)
        return _svg(figure)


def inputs(bag: Mapping[str, Any], series: Series, origin: int) -> str:
    """Every message of every input as a tick; gaps as bars."""
    rows = [one for one in bag["inputs"] if f"stamps/{one['role']}" in series]
    if not rows:
        return ""
    with _style():
        figure, axes = _plots(1, 1, (_WIDTH, 0.42 * len(rows) + 0.75))
        axis = axes[0]
        for y, one in enumerate(rows):
            stamps = series[f"stamps/{one['role']}"]
            times = (stamps[_thin(len(stamps))] - origin) * 1e-9
            many = len(times) > 400
            axis.plot(times, np.full(len(times), y), "|", color=COLOURS[0], ms=9, mew=0.4, rasterized=many)
            for gap in one["gap_list"]:
                axis.barh(y, gap["seconds"], left=gap["at"], height=0.5, color=ALARM, alpha=0.6)
        axis.set_yticks(range(len(rows)), [one["role"] for one in rows])
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.grid(axis="y", visible=False)
        axis.set_title("Inputs by their stamps; red: gaps")
        axis.set_xlabel("s")
        axis.margins(x=0.01)
        return _svg(figure)


def moment(series: Series, recipes: Sequence[str], rank: int, names: Sequence[str]) -> str:
    """One of the last recipe's worst chunks: the three joints that are furthest off, over the horizon."""
    recipe, base = recipes[-1], recipes[0]
    key = f"run/{recipe}/"
    number = int(series[f"{key}worst/{rank}/number"])
    mine = series[key + "commands"][number]
    told = series[key + "recorded"][number]
    other = series[f"run/{base}/commands"][number] if base != recipe else None
    reference = told if other is None else other
    gap = np.nan_to_num(np.abs(mine - reference)).mean(axis=0)
    with _style():
        figure, axes = _grid(1, 3, (6.6, 1.75))
        for axis, joint in zip(axes, np.argsort(-gap)[:3]):
            axis.plot(told[:, joint], color=INK, lw=1.3, label="recorded")
            if other is not None:
                axis.plot(other[:, joint], color=COLOURS[0], lw=1.1, label=base)
            axis.plot(mine[:, joint], color=_colour(recipes, recipe), lw=1.3, label=recipe)
            axis.set_title(names[joint], fontsize=7.5, pad=2)
            axis.set_xlabel("step", fontsize=7, labelpad=1)
        axes[0].legend(fontsize=6)
        return _svg(figure)


def _at_least(axis: Axes, span: float) -> None:
    low, high = axis.get_ylim()
    if high - low < span:
        middle = 0.5 * (low + high)
        axis.set_ylim(middle - 0.5 * span, middle + 0.5 * span)


def _finish_grid(axes: Sequence[Axes], used: int, columns: int) -> None:
    for axis in axes[used:]:
        axis.set_visible(False)
    for axis in axes[max(0, used - columns) : used]:
        axis.set_xlabel("s")
        axis.tick_params(labelbottom=True)


def _stages(axis: Axes, measured: Mapping[str, Any], known: Sequence[str]) -> None:
    stages = [s for s in ("preprocess", "vision", "prefix", "denoise", "postprocess") if s in measured[known[0]]]
    left = np.zeros(len(known))
    shades = ("#cbd2d9", "#56b4e9", "#0072b2", "#003f66", "#9aa5b1")
    for stage, shade in zip(stages, shades):
        widths = np.array([measured[r].get(stage, {}).get("p50") or 0.0 for r in known])
        axis.barh(range(len(known)), widths, left=left, color=shade, label=stage, height=0.55)
        left += widths
    axis.set_yticks(range(len(known)), known)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_title("Median by stage (ms)")
    if stages:
        axis.legend(fontsize=6.5, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.13), handlelength=1)


def _recorded_line(axis: Axes, series: Series, recipes: Sequence[str], joint: int, origin: int) -> None:
    for recipe in recipes:
        times, values = series.get(f"run/{recipe}/executed_times"), series.get(f"run/{recipe}/told")
        if times is None or values is None or not len(times):
            continue
        keep = _thin(len(times))
        axis.plot(
            (times[keep] - origin) * 1e-9,
            values[keep, joint],
            color=INK,
            lw=1.5,
            alpha=0.75,
            label="recorded",
        )
        return


def _marks(series: Series, recipes: Sequence[str]) -> list[int]:
    found = []
    for recipe in recipes[-1:]:
        rank = 0
        while f"run/{recipe}/worst/{rank}/number" in series:
            number = int(series[f"run/{recipe}/worst/{rank}/number"])
            found.append(int(series[f"run/{recipe}/stamps"][number]))
            rank += 1
    return found


def _colour(recipes: Sequence[str], recipe: str) -> str:
    return COLOURS[list(recipes).index(recipe) % len(COLOURS)]


def _thin(count: int) -> slice:
    return slice(None, None, max(1, count // _MOST_POINTS))


def _style() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    return mpl.rc_context(cast("Any", _STYLE))


def _plots(
    rows: int,
    columns: int,
    size: tuple[float, float],
    sharex: bool = False,
    width_ratios: Sequence[float] | None = None,
    layout: Literal["constrained"] | None = "constrained",
) -> tuple[Figure, list[Axes]]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=size,
        sharex=sharex,
        squeeze=False,
        layout=layout,
        width_ratios=width_ratios,
    )
    return figure, list(axes.reshape(-1))


def _grid(
    rows: int,
    columns: int,
    size: tuple[float, float],
    sharex: bool = False,
    width_ratios: Sequence[float] | None = None,
    legend: bool = False,
) -> tuple[Figure, list[Axes]]:
    """`_plots` with fixed margins, for axes whose labels are numbers: half the time of a layout that is searched."""
    figure, axes = _plots(rows, columns, size, sharex, width_ratios, layout=None)
    wide, high = size
    top = _LEGEND if legend else 0.0  # inches, here and below
    left, right, above, below, between, under = 0.5, 0.08, 0.24 + top, 0.4, 0.56, 0.32
    width = (wide - left - right - between * (columns - 1)) / columns
    height = (high - above - below - under * (rows - 1)) / rows
    figure.subplots_adjust(
        left=left / wide, right=1 - right / wide, top=1 - above / high, bottom=below / high,
        wspace=between / width, hspace=under / height,
    )  # fmt: skip
    return figure, axes


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="upper left", ncols=len(labels), fontsize=8)


def _svg(figure: Figure) -> str:
    from matplotlib import pyplot

    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
