"""Figures against closed forms, and conditions on them."""

from __future__ import annotations

import numpy as np
import pytest
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation import metrics
from hybrid_policy.evaluation.recorded_actions import RecordedActions
from hybrid_policy.evaluation.replay_record import RecipeRun, ReplayedChunk
from hybrid_policy.evaluation.summary import NAMES, check, parse_conditions, summarise

T0, PERIOD = 10**18, 50_000_000


def chunk(robot, number: int, commands: np.ndarray, joints=None, **changes) -> ReplayedChunk:
    given = dict(
        number=number, stamp=T0 + number * 4 * PERIOD, started=0, finished=0, segment=0,
        actions=robot.actions(commands), commands=commands, joints=np.zeros(14) if joints is None else joints,
        accepted=True, reason="", seam=(0.0, 0.0, 0.0), clipped=(0, 0, 0), clipped_joints=(), skew=0.0, ages={},
        prompt="p", continued=False, timings={"infer": 0.01 * (number + 1)},
    )  # fmt: skip
    return ReplayedChunk(**{**given, **changes})


class Known:
    """The part of a survey that the comparison reads: position = 0.1 s^-1 t on every joint."""

    def __init__(self, robot, seconds: float) -> None:
        self.actions = RecordedActions(robot.command_names, "/c")
        for k in range(round(seconds * 20) + 1):
            self.actions.add_positions(T0 + k * PERIOD, np.full(14, 0.1 * k * 0.05))


def test_errors_are_those_of_the_definition():
    error = np.array([[[1.0, -2.0], [np.nan, 0.0]], [[3.0, 0.0], [1.0, 4.0]]])
    found = metrics.errors(error, ["a", "b"])
    assert found["values"] == 7
    assert found["mae"] == pytest.approx((1 + 2 + 0 + 3 + 0 + 1 + 4) / 7)
    assert found["mse"] == pytest.approx((1 + 4 + 0 + 9 + 0 + 1 + 16) / 7)
    assert found["max"] == 4.0
    assert found["joints"][0] == {"name": "a", "mse": pytest.approx(11 / 3), "mae": pytest.approx(5 / 3), "max": 3.0}
    assert found["horizon"]["mae"] == [pytest.approx(6 / 4), pytest.approx(5 / 3)]
    assert metrics.errors(np.full((1, 2, 2), np.nan), ["a", "b"]) == {}


def test_cosine_leaves_out_what_is_unknown():
    assert metrics.cosine(np.array([1.0, 0.0, np.nan]), np.array([1.0, 1.0, 5.0])) == pytest.approx(2**-0.5)
    assert np.isnan(metrics.cosine(np.zeros(3), np.ones(3)))


def test_a_policy_that_is_off_by_a_constant_is_off_by_that(robot):
    recorded = metrics.Recorded(Known(robot, 3.0), robot)
    chunks = []
    for n in range(5):
        due = 0.1 * 0.05 * (n * 4 + np.arange(8))
        chunks.append(chunk(robot, n, np.repeat(due[:, None] + 0.02, 14, axis=1), np.full(14, 0.1 * 0.05 * n * 4)))
    found = metrics.against_recorded(RecipeRun("r", chunks), robot, recorded)
    assert found["mae"] == pytest.approx(0.02)
    assert found["mse"] == pytest.approx(0.0004)
    assert found["max"] == pytest.approx(0.02)
    still = 0.1 * 0.05 * np.arange(8)
    assert found["hold"]["mae"] == pytest.approx(still.mean())
    assert found["skill"] == pytest.approx(1 - 0.0004 / (still**2).mean())


def test_a_policy_that_says_what_was_recorded_is_perfect(robot):
    recorded = metrics.Recorded(Known(robot, 3.0), robot)
    chunks = [chunk(robot, n, np.repeat(0.005 * (n * 4 + np.arange(8))[:, None], 14, axis=1)) for n in range(1, 6)]
    found = metrics.against_recorded(RecipeRun("r", chunks), robot, recorded)
    assert found["mae"] < 1e-12
    assert found["action_cosine"]["min"] == pytest.approx(1.0)
    assert found["skill"] == pytest.approx(1.0)


def test_what_lies_beyond_the_recording_does_not_count(robot):
    recorded = metrics.Recorded(Known(robot, 0.2), robot)  # 5 set points, then 0.5 s of holding
    found = metrics.against_recorded(RecipeRun("r", [chunk(robot, 0, np.zeros((50, 14)))]), robot, recorded)
    assert found["values"] == 14 * (5 + 10)
    assert found["horizon"]["mae"][20] is None


def test_recipes_are_paired_by_observation(robot):
    base = RecipeRun("a", [chunk(robot, n, np.zeros((4, 14)) + 0.1) for n in range(4)])
    other = RecipeRun("b", [chunk(robot, n, np.zeros((4, 14)) + 0.1 + 0.01 * n) for n in (0, 1, 3)])
    found = metrics.against_recipe(other, base, robot)
    assert found["pairs"] == 3
    assert found["mae"] == pytest.approx((0 + 0.01 + 0.03) / 3)
    assert found["worst"]["chunk"] == 3
    assert metrics.against_recipe(RecipeRun("c", []), base, robot) == {}


def test_motion_counts_what_the_guard_did(robot):
    zero = np.zeros((4, 14))
    run = RecipeRun("r", [
        chunk(robot, 0, zero, seam=(9.0, 9.0, 9.0)),  # the first has no seam
        chunk(robot, 1, zero, seam=(0.2, 1.0, 2.0), clipped=(1, 2, 0), clipped_joints=("left_waist",)),
        chunk(robot, 2, zero, accepted=False, reason="late"),
        chunk(robot, 3, zero, seam=(0.1, 3.0, 1.0)),
    ], holds=[(1, "late")])  # fmt: skip
    found = metrics.motion(run)
    assert (found["chunks"], found["accepted"], found["refused"], found["holds"]) == (4, 3, 1, 1)
    assert found["guard"] == {"chunks_limited": 1, "position": 1, "velocity": 2, "acceleration": 0,
                              "joints": {"left_waist": 1}}  # fmt: skip
    assert found["seams"]["position"]["max"] == 0.2
    assert found["seams"]["velocity"]["max"] == 3.0
    assert found["refusals"] == {"late": 1}
    assert metrics.latency(run)["infer"]["max"] == pytest.approx(40.0)
    assert metrics.latency(run)["infer"]["p50"] == pytest.approx(30.0)  # without the cold one


def bag(mae: float, chunks: int, cosine: float | None = 0.999, status: str = "replayed") -> dict:
    apart = {"action_cosine": {"mean": cosine, "min": cosine}, "mae": mae, "max": mae} if cosine else {}
    one = {"chunks": chunks, "refused": 1, "holds": 0, "against_recorded": {"mae": mae}, "against_first": {}}
    return {
        "name": "b", "status": status, "recipes": {"a": one, "b": {**one, "against_first": apart}},
        "inputs": [{"gaps": 2, "longest_gap": 0.5}, {"gaps": 1, "longest_gap": 0.2}],
        "measured": {"latency": {"a": {"infer": {"p50": 10.0 * mae, "p99": 20.0 * mae}}}},
    }  # fmt: skip


def test_figures_over_bags_are_weighted_by_chunks():
    found = summarise([bag(0.1, 10), bag(0.4, 30, 0.9), bag(9.0, 99, status="inputs only")], ["a", "b"])
    assert found["a"]["recorded_mae"] == pytest.approx((0.1 * 10 + 0.4 * 30) / 40)
    assert found["b"]["action_cosine_min"] == 0.9
    assert found["a"]["action_cosine"] is None
    assert found["a"]["guard_refused"] == 2
    assert found["a"]["input_gaps"] == 6
    assert found["a"]["longest_gap"] == 0.5
    assert found["a"]["latency_p99"] == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("text", "failing"),
    [
        ("action_cosine<0.99", []),
        ("action_cosine<0.9995", ["b"]),
        ("recorded_mae>=0.1", ["a", "b"]),
        ("recorded_mae > 0.1", []),
        ("b:guard_refused>0", ["b"]),
        ("skill<0", ["a", "b"]),  # not available: what cannot be told must not pass
        ("holds>0, guard_refused<=0", []),
    ],
)
def test_conditions_fail_where_they_hold(text, failing):
    recipes = ["a", "b"]
    checks = check(parse_conditions([text], recipes), summarise([bag(0.1, 10)], recipes), recipes)
    assert [c.recipe for c in checks if c.failed] == failing
    assert checks


def test_with_one_recipe_the_recorded_actions_take_the_first_ones_place():
    checks = check(parse_conditions(["action_mae>0.05"], ["a"]), summarise([bag(0.1, 10)], ["a"]), ["a"])
    assert [(c.figure, c.failed) for c in checks] == [("recorded_mae", True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nonsense", r"expected \[recipe:\]figure<number"),
        ("speed<1", "'speed' given, expected one of action_cosine"),
        ("c:holds>0", "recipe 'c' given, expected one of a, b"),
        ("holds>many", "'many' given"),
        ("holds>inf", "expected a finite number"),
        ("holds=0", "expected"),
    ],
)
def test_a_condition_that_means_nothing_is_refused(text, expected):
    with pytest.raises(InputError, match=expected):
        parse_conditions([text], ["a", "b"])


def test_every_figure_says_what_it_is():
    assert all(f.meaning and f.over_bags in ("mean", "min", "max", "sum") for f in NAMES.values())
