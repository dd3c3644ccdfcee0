"""From episodes to figures: success with its interval, by colour, wrong cubes, time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrid_policy.evaluation.closed_loop import EpisodeResult

_Z95 = 1.959963984540054


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, _Z95**2
    middle = share + z2 / (2 * trials)
    spread = _Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    scale = 1 + z2 / trials
    # exact at the ends, where rounding would leave a hair
    low = 0.0 if successes == 0 else (middle - spread) / scale
    high = 1.0 if successes == trials else (middle + spread) / scale
    return low, high


def _share(successes: int, trials: int) -> dict[str, Any]:
    low, high = wilson_interval(successes, trials)
    return {
        "successes": successes,
        "episodes": trials,
        "success": successes / trials if trials else 0.0,
        "interval": [low, high],
    }


def summarise(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Success rate and interval, in all and by colour; share of wrong cubes; steps and seconds to success.

    A step is one inference.
    """
    won = [result for result in results if result.success]
    colours = sorted({result.target for result in results})
    wrong = sum(result.wrong for result in results)

    def middle(values: list[float]) -> dict[str, float] | None:
        if not values:
            return None
        return {
            "median": float(np.median(values)),
            "p95": float(np.percentile(values, 95)),
            "max": max(values),
        }

    return {
        **_share(len(won), len(results)),
        "by_colour": {
            colour: _share(
                sum(r.success for r in results if r.target == colour),
                sum(r.target == colour for r in results),
            )
            for colour in colours
        },
        "wrong_cube": wrong / len(results) if results else 0.0,
        "steps_to_success": middle([float(r.steps) for r in won]),
        "seconds_to_success": middle([r.seconds for r in won]),
        "refused_chunks": sum(result.refused for result in results),
    }
