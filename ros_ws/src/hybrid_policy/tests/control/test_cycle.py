"""The timeline, the guard and the cycle: what is due when, seams, limits, real-time chunking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hybrid_policy.control.chunk_timeline import ChunkTimeline, Trajectory, chunk_curve, monotone_velocities
from hybrid_policy.control.cycle import ControlCycle, CycleSettings
from hybrid_policy.control.ensembling import TemporalEnsemble
from hybrid_policy.control.guard import Guard
from hybrid_policy.control.hold import hold_position
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.control.rtc import DelayEstimator, continuation, delay_steps
from hybrid_policy.errors import InputError
from hybrid_policy.models.observation import ActionChunk, Observation
from hybrid_policy.runtime.rtc import shifted
from hybrid_policy.sim import trajectory_controller as jtc
from hypothesis import given, settings
from hypothesis import strategies as st

from .synthetic import ALOHA, HOME, TWO_JOINTS, RampPolicy, robot  # isort: skip
from .test_robot_file import TWIST  # isort: skip

MS = 1_000_000
PERIOD = 50 * MS
START = 10**9


def observation(two: RobotFile, stamp: int, joints: Any) -> Observation:
    joints = np.asarray(joints, np.float64)
    return Observation({}, two.state(joints), "go", {"cam": stamp, "joints": stamp}, joints)


def clock(*times: int) -> Any:
    return iter(times).__next__


def test_elapsed_actions_are_dropped_by_time() -> None:
    timeline = ChunkTimeline(PERIOD, 0.0)
    chunk = np.arange(10.0)[:, None]
    plan = timeline.plan(START, chunk, START + 120 * MS, np.zeros(1))
    assert plan is not None
    assert plan.first == 3
    np.testing.assert_allclose(plan.times, 0.05 * np.arange(3, 10) - 0.12)
    np.testing.assert_allclose(plan.positions[:, 0], np.arange(3, 10))
    # 5 ms before action 3: too near to be a segment of its own
    assert timeline.plan(START, chunk, START + 145 * MS, np.zeros(1)).first == 4  # type: ignore[union-attr]
    assert timeline.plan(START, chunk, START + 450 * MS, np.zeros(1)) is None


def test_an_early_chunk_keeps_every_action() -> None:
    plan = ChunkTimeline(PERIOD, 0.0).plan(START, np.zeros((4, 1)), START - 500 * MS, np.zeros(1))
    assert plan is not None
    assert plan.first == 0
    np.testing.assert_allclose(plan.times, 0.5 + 0.05 * np.arange(4))


def test_a_chunk_of_one_action_is_a_place_to_stand() -> None:
    plan = ChunkTimeline(PERIOD, 0.2).plan(START, np.ones((1, 2)), START - 50 * MS, np.zeros(2))
    assert plan is not None
    assert plan.positions.shape == plan.velocities.shape == (1, 2)
    np.testing.assert_array_equal(plan.jump, [1.0, 1.0])


def test_the_blend_starts_on_the_command_in_force() -> None:
    timeline = ChunkTimeline(PERIOD, 0.2)
    timeline.hold(START, np.array([1.0]))
    plan = timeline.plan(START, np.zeros((20, 1)), START, np.array([5.0]))  # both stand still
    assert plan is not None
    assert plan.start_position[0] == 1.0  # the command, not the measured position
    weights = 1.0 - plan.positions[:5, 0]
    u = np.minimum(1.0, plan.times[:5] / 0.2)
    np.testing.assert_allclose(weights, u * u * (3 - 2 * u), atol=1e-12)
    np.testing.assert_allclose(plan.positions[4:, 0], 0.0, atol=1e-12)


def test_without_a_command_the_robot_is_the_start() -> None:
    plan = ChunkTimeline(PERIOD, 0.2).plan(START, np.ones((20, 1)), START, np.array([0.25]))
    assert plan is not None
    assert plan.start_position[0] == 0.25
    assert plan.jump[0] == 0.75


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=30), st.floats(-3, 3), st.floats(-200, 200))
@settings(max_examples=200, deadline=None)
def test_cubics_stay_between_their_points(values: list[float], start: float, wanted: float) -> None:
    positions = np.array(values)[:, None]
    times = 0.02 + 0.05 * np.arange(len(values))
    wishes = np.full_like(positions, wanted)
    wishes[::3] = np.nan
    velocities = monotone_velocities(times, positions, np.array([start]), wishes)
    assert (velocities[-1] == 0).all()
    curve = Trajectory(0, times, positions, velocities, np.array([start]), np.zeros(1))
    knots = np.concatenate(([0.0], times))
    heights = np.concatenate(([start], values))
    for k in range(len(values)):
        low, high = sorted(heights[k : k + 2])
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):
            at = knots[k] + share * (knots[k + 1] - knots[k])
            position = curve.sample(round(at * 1e9))[0][0]
            assert low - 1e-9 <= position <= high + 1e-9


def test_the_timeline_is_what_the_controller_does() -> None:
    """Chunks through our timeline and through the model of joint_trajectory_controller: the same curve."""
    aloha = RobotFile.load(ALOHA)
    cycle = ControlCycle(aloha, RampPolicy(aloha, slope=0.003), CycleSettings(chunking="off"))
    controller = jtc.TrajectoryController(aloha.joint_names, HOME)
    worst, now, measured = 0.0, START, HOME.copy()
    for tick in range(1000):
        now = START + tick * 2 * MS
        if tick % 100 == 0:
            result = cycle.run(observation(aloha, now - 60 * MS, measured), clock(now - 30 * MS, now))
            assert result.trajectory is not None
            points = [
                jtc.TrajectoryPoint(round(t * 1e9), p, v)
                for t, p, v in zip(result.trajectory.times, result.trajectory.positions, result.trajectory.velocities)
            ]
            reason = controller.receive(jtc.Trajectory(aloha.command_names, points), now)
            assert reason is None, reason
        measured = controller.sample(now, measured, np.zeros(14))
        worst = max(worst, float(np.abs(measured - cycle.timeline.sample(now)[0]).max()))  # type: ignore[index]
    assert worst < 3e-4  # rad: a controller starts a trajectory from its sample before (2 ms of motion)


def test_chunks_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    two = robot(tmp_path, TWO_JOINTS.replace("max_acceleration: 10.0", "max_jump: 0.3"))
    policy = RampPolicy(two, horizon=10, slope=0.0)
    cycle = ControlCycle(two, policy, CycleSettings())
    seen = observation(two, START, [0.0, 0.05])
    good = policy.infer(seen)
    for actions, said in [
        (np.full((10, 2), np.nan, np.float32), "nan given in step 0, value 0"),
        (np.zeros((9, 2), np.float32), "shape (9, 2) given, expected (10, 2)"),
        (good.actions + np.float32(0.5), "a +0.500 from the command now, expected within 0.3"),
    ]:
        result = cycle.accept(seen, replace(good, actions=actions), START, START)
        assert result.trajectory is None
        assert said in result.reason
    late = cycle.accept(seen, good, START, START + 10**9)
    assert "finished 1.000 s after its observation" in late.reason
    assert cycle.timeline.current is None
    assert cycle.guard.counts["refused"] == 3
    assert cycle.guard.counts["late"] == 1


@given(
    chunks=st.lists(st.lists(st.floats(-4, 4), min_size=2, max_size=2), min_size=12, max_size=12),
    start=st.tuples(st.floats(-1, 1), st.floats(0.0, 0.1)),
)
@settings(max_examples=150, deadline=None)
def test_no_chunk_gets_past_the_limits(tmp_path_factory: Any, chunks: Any, start: Any) -> None:
    two = robot(tmp_path_factory.mktemp("r"))
    cycle = ControlCycle(two, RampPolicy(two, horizon=12), CycleSettings(chunking="off"))
    limits, position, velocity = two.limits, np.array(start), np.zeros(2)
    cycle.timeline.hold(START, position)
    seen = observation(two, START, start)
    actions = np.array(chunks, np.float32)
    for swap in range(3):
        now = START + swap * 130 * MS
        chunk = ActionChunk(actions * (-1) ** swap, np.zeros((12, 32), np.float32), now, {})
        position, velocity = cycle.timeline.sample(now)  # type: ignore[misc]
        result = cycle.accept(seen, chunk, now, now)
        assert result.trajectory is not None
        path = np.vstack((position, result.trajectory.positions))
        steps = np.diff(np.concatenate(([0.0], result.trajectory.times)))[:, None]
        speeds = np.diff(path, axis=0) / steps
        assert (path >= limits.lower - 1e-9).all()
        assert (path <= limits.upper + 1e-9).all()
        assert (np.abs(speeds) <= limits.velocity + 1e-5).all()
        assert (np.abs(result.trajectory.velocities) <= limits.velocity + 1e-5).all()
        changes = np.abs(np.diff(speeds[:, 0], prepend=velocity[0])) / steps[:, 0]
        # the position limit comes first: braking is allowed to be harder only at it
        inside = (path[1:, 0] < limits.upper[0] - 1e-6) & (path[1:, 0] > limits.lower[0] + 1e-6)
        assert (changes[inside] <= 10.0 + 1e-3).all()
    assert (result.guard.clipped) == bool(result.guard.joints)


def test_the_guard_leaves_a_lawful_chunk_alone(tmp_path: Path) -> None:
    two = robot(tmp_path)
    cycle = ControlCycle(two, RampPolicy(two, slope=0.001), CycleSettings(chunking="off", blend=0.0))
    result = cycle.run(observation(two, START, [0.0, 0.05]), clock(START, START + 10 * MS))
    assert result.trajectory is not None
    assert not result.guard.clipped
    expected = two.commands(result.chunk.actions[result.first :])
    np.testing.assert_array_equal(result.trajectory.positions, expected)


def test_a_joint_outside_its_limits_is_led_back(tmp_path: Path) -> None:
    two = robot(tmp_path)
    timeline = ChunkTimeline(PERIOD, 0.0)
    plan = timeline.plan(START, np.full((20, 2), 0.05), START, np.array([1.2, 0.05]))
    assert plan is not None
    positions, report = Guard(two.limits, 20, 2).limit(plan)
    assert (np.diff(positions[:, 0]) <= 1e-12).all()
    assert positions[0, 0] <= 1.2
    assert report.velocity > 0
    assert report.joints == ("a",)


def test_rtc_gets_the_stamps_delay(tmp_path: Path) -> None:
    two = robot(tmp_path)
    policy = RampPolicy(two, slope=0.0)
    cycle = ControlCycle(two, policy, CycleSettings(chunking="rtc"))
    delays = [900, 130, 90, 90]  # ms from stamp to swap; the first is a cold start
    for k, delay in enumerate(delays):
        stamp = START + k * 250 * MS
        cycle.run(observation(two, stamp, [0.0, 0.05]), clock(stamp, stamp + delay * MS))
    first, second, third, fourth = policy.previous
    assert first is None
    assert (second.consumed, second.delay) == (5, 20)  # the cold start: 18 steps, and the two that fix the swap
    assert (third.consumed, third.delay) == (5, 5)  # it is forgotten as soon as there is another
    assert (fourth.consumed, fourth.delay) == (5, 5)  # the largest of the recent ones
    cycle.hold(START + 10**9, np.array([0.0, 0.05]))
    cycle.run(observation(two, START + 1250 * MS, [0.0, 0.05]), clock(START + 1250 * MS, START + 1300 * MS))
    assert policy.previous[-1] is None  # after a hold the next chunk starts afresh


@given(st.integers(0, 4_000), st.integers(0, 60), st.integers(2, 50))
@settings(max_examples=300, deadline=None)
def test_continuations_are_always_lawful(age_ms: int, delay: int, horizon: int) -> None:
    chunk = ActionChunk(np.zeros((horizon, 2)), np.zeros((horizon, 32), np.float32), START, {})
    made = continuation(chunk, START + age_ms * MS, PERIOD, delay)
    if made is not None:
        assert made.consumed * PERIOD == pytest.approx(age_ms * MS)
        assert 0 <= 2 * made.delay <= horizon - made.consumed + 1  # at most half of what is left
        assert made.delay <= delay


@given(steps=st.integers(1, 8), late=st.integers(51, 400), seed=st.integers(0, 2**16))
@settings(max_examples=200, deadline=None)
def test_chunks_that_agree_on_what_rtc_keeps_have_no_seam(steps: int, late: int, seed: int) -> None:
    """At any delay the kept actions, and not one less, decide position and velocity at the swap."""
    random, timeline = np.random.default_rng(seed), ChunkTimeline(PERIOD, 0.2)
    path = np.cumsum(random.uniform(1.0, 2.0, (60, 2)), axis=0)
    timeline.commit(chunk_curve(START, path[:50], PERIOD))
    kept = delay_steps(late * MS, PERIOD)
    new = path[steps : steps + 30].copy()
    new[kept:] += random.normal(size=new[kept:].shape)
    stamp = START + steps * PERIOD
    plan = timeline.plan(stamp, new, stamp + late * MS, path[0])
    assert plan is not None
    np.testing.assert_allclose(plan.jump, 0.0, atol=1e-9)
    np.testing.assert_allclose(plan.velocity_jump, 0.0, atol=1e-6)
    agreed = kept - plan.first
    np.testing.assert_allclose(plan.positions[:agreed], new[plan.first : kept], atol=1e-6)  # nothing to fade
    new[kept - 1] += 0.5
    other = timeline.plan(stamp, new, stamp + late * MS, path[0])
    assert other is not None
    assert np.abs(other.velocity_jump).max() > 1e-3


@given(late=st.integers(0, 300), seed=st.integers(0, 2**16))
@settings(max_examples=100, deadline=None)
def test_a_chunk_fades_in_without_a_jump_and_is_itself_after_the_blend(late: int, seed: int) -> None:
    random, timeline = np.random.default_rng(seed), ChunkTimeline(PERIOD, 0.2)
    timeline.commit(chunk_curve(START, np.cumsum(random.uniform(0.0, 0.1, (40, 2)), axis=0), PERIOD))
    chunk = np.cumsum(random.uniform(0.05, 0.15, (30, 2)), axis=0)
    now = START + late * MS
    position, velocity = timeline.sample(now)  # type: ignore[misc]
    plan = timeline.plan(START, chunk, now, position)
    assert plan is not None
    np.testing.assert_allclose(plan.start_position, position)
    np.testing.assert_allclose(plan.start_velocity, velocity)
    alone = chunk_curve(START, chunk, PERIOD)

    def faded(at: float) -> Any:
        """Position, seconds after the swap."""
        u, due = min(at / 0.2, 1.0), now + round(at * 1e9)
        share = u * u * (3.0 - 2.0 * u)
        return (1.0 - share) * timeline.sample(due)[0] + share * alone.sample(due)[0]  # type: ignore[index]

    for at, wanted, speed in zip(plan.times[:-1], plan.positions, plan.velocities):
        np.testing.assert_allclose(wanted, faded(at), atol=1e-7)
        slope = (faded(at + 1e-5) - faded(at - 1e-5)) / 2e-5
        np.testing.assert_allclose(speed, slope, atol=1e-2)  # the derivative of what is faded
        if at >= 0.2:
            np.testing.assert_allclose(speed, alone.sample(now + round(at * 1e9))[1], atol=1e-5)


class WavePolicy(RampPolicy):
    """Smooth chunks that disagree with each other, but for the actions that real-time chunking keeps."""

    def infer(self, observation: Observation, noise: Any = None, previous: Any = None) -> ActionChunk:
        chunk = super().infer(observation, noise, previous)
        phase = 6.0 * float(noise[0, 0])
        wave = 0.1 * np.sin(0.15 * np.arange(self.spec.horizon) + phase)
        normalised = chunk.normalised.copy()
        normalised[:, 1] = wave
        if previous is not None and self.rtc:
            kept = shifted(previous, self.spec.horizon, self.spec.max_action_dim)[: previous.delay, 1]
            normalised[:, 1] += kept[-1] - wave[previous.delay - 1]
            normalised[: previous.delay, 1] = kept
        return replace(chunk, actions=normalised[:, :2].copy(), normalised=normalised)


@pytest.mark.parametrize("rtc", [True, False])
def test_no_seams_where_stamps_are_off_the_grid_of_the_actions(tmp_path: Path, rtc: bool) -> None:
    """The whole cycle with delays and intervals of any length: what the engine kept is what was commanded."""
    wide = robot(tmp_path, TWO_JOINTS.replace("max_acceleration: 10.0", "max_acceleration: 1000.0"))
    cycle = ControlCycle(wide, WavePolicy(wide, horizon=32, slope=0.0, rtc=rtc), CycleSettings(blend=0.2))
    random, stamp, seams = np.random.default_rng(3), START, []
    for _ in range(30):
        result = cycle.run(
            observation(wide, stamp, [0.0, 0.05]), clock(stamp, stamp + int(random.uniform(60, 140) * MS))
        )
        assert result.trajectory is not None
        seams.append(result.seam)
        stamp += int(random.uniform(380, 460) * MS)  # the fade of before has ended
    position = max(seam.position for seam in seams[5:])
    velocity = max(seam.velocity for seam in seams[5:])
    if rtc:
        assert position < 2e-3  # the line between two steps, where the command is a cubic
        assert velocity < 0.05
    else:
        assert position > 0.1
        assert velocity > 0.5


def test_delays_are_a_window() -> None:
    delays = DelayEstimator(3)
    assert delays.steps(PERIOD) is None
    for value in (400, 100, 20, 20):
        delays.push(value * MS)
    assert delays.steps(PERIOD) == 4  # actions 0 and 1, then 2, which is due at the swap, and 3 for its velocity
    assert delays.steps(33 * MS) == 6  # in steps of the robot's own period


def test_ensembling_averages_by_time() -> None:
    ensemble = TemporalEnsemble(PERIOD, 0.1)
    old = np.arange(8.0)[:, None]
    np.testing.assert_array_equal(ensemble.add(START, old), old)
    new = np.full((8, 1), 10.0)
    mixed = ensemble.add(START + 125 * MS, new)[:, 0]  # two and a half steps later
    w_old, w_new = 1.0, np.exp(-0.1)
    expected = (w_old * 2.5 + w_new * 10.0) / (w_old + w_new)
    assert mixed[0] == pytest.approx(expected)
    assert mixed[5:].tolist() == [10.0, 10.0, 10.0]  # the old chunk does not reach so far


def test_the_same_inputs_give_the_same_commands(tmp_path: Path) -> None:
    def run() -> Any:
        two = robot(tmp_path)
        cycle = ControlCycle(two, RampPolicy(two), CycleSettings(seed=7))
        return [
            cycle.run(observation(two, START + k * 200 * MS, [0.0, 0.05]), clock(START, START + k * 200 * MS + MS))
            for k in range(4)
        ]

    for one, other in zip(run(), run()):
        np.testing.assert_array_equal(one.noise, other.noise)
        np.testing.assert_array_equal(one.trajectory.positions, other.trajectory.positions)
    assert not np.array_equal(run()[0].noise, run()[1].noise)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    two = robot(tmp_path)
    policy = RampPolicy(two)
    policy.spec = replace(policy.spec, state_dim=7)
    with pytest.raises(InputError, match=r"policy\.state"):
        ControlCycle(two, policy, CycleSettings())


def test_where_to_hold(tmp_path: Path) -> None:
    two = robot(tmp_path)
    command, near, far = np.array([0.5, 0.05]), np.array([0.45, 0.05]), np.array([0.0, 0.05])
    assert hold_position(two, command, near, 0.2).tolist() == [0.5, 0.05]  # type: ignore[union-attr]
    assert hold_position(two, command, far, 0.2).tolist() == [0.0, 0.05]  # type: ignore[union-attr]
    assert hold_position(two, None, np.array([1.1, 0.05]), 0.2).tolist() == [1.0, 0.05]  # type: ignore[union-attr]
    assert hold_position(two, None, None, 0.2) is None


def test_a_twist_holds_by_standing_still(tmp_path: Path) -> None:
    eef = robot(tmp_path, TWIST)
    moving = np.array([0.2, 0.1, 0.0, 0.3, 0.0, 0.0, 0.03])
    assert hold_position(eef, moving, None, 0.2).tolist() == [0, 0, 0, 0, 0, 0, 0.03]  # type: ignore[union-attr]
    cycle = ControlCycle(eef, RampPolicy(eef, horizon=20), CycleSettings(chunking="off", blend=0.0))
    seen = Observation({}, eef.state(np.zeros(1)), "go", {"joints": START}, np.zeros(1))
    fast = ActionChunk(np.full((20, 7), 3.0, np.float32), np.zeros((20, 32), np.float32), START, {})
    result = cycle.accept(seen, fast, START, START)
    assert result.trajectory is not None
    assert np.abs(result.trajectory.positions[:, :3]).max() == 0.4  # of 1.5 m/s asked for
    assert np.abs(result.trajectory.positions[:, 3:6]).max() == 2.0
    assert result.guard.position > 0
