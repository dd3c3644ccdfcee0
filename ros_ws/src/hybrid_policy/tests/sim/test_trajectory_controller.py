"""The model of joint_trajectory_controller follows the released controller's rules."""

import numpy as np
import pytest
from hybrid_policy.sim.trajectory_controller import (
    ControllerOptions,
    Trajectory,
    TrajectoryController,
    TrajectoryPoint,
)

MS = 1_000_000
NAMES = ("a", "b")
ZERO = np.zeros(2)


def controller(**options: bool) -> TrajectoryController:
    return TrajectoryController(NAMES, ZERO, ControllerOptions(**options))


def point(ms: int, *positions: float, velocities: tuple[float, ...] = ()) -> TrajectoryPoint:
    return TrajectoryPoint(ms * MS, positions, velocities)


def sample(c: TrajectoryController, ms: int) -> np.ndarray:
    return c.sample(ms * MS, np.full(2, -5.0), ZERO)


def test_stamp_zero_starts_at_the_first_sample_and_holds_the_end() -> None:
    c = controller()
    assert c.receive(Trajectory(NAMES, [point(100, 1.0, 2.0)]), 0) is None
    np.testing.assert_allclose(sample(c, 1000), 0.0)
    np.testing.assert_allclose(sample(c, 1050), [0.5, 1.0])
    np.testing.assert_allclose(sample(c, 1500), [1.0, 2.0])
    assert not c.busy


def test_a_past_stamp_skips_without_a_bridge() -> None:
    c = controller()
    points = [point(0, 1.0, 1.0), point(100, 2.0, 2.0), point(200, 3.0, 3.0)]
    assert c.receive(Trajectory(NAMES, points, stamp=900 * MS), 1050 * MS) is None
    np.testing.assert_allclose(sample(c, 1050), 2.5)


def test_a_future_stamp_interpolates_from_the_current_state() -> None:
    c = controller()
    assert c.receive(Trajectory(NAMES, [point(0, 1.0, 1.0)], stamp=1200 * MS), 1000 * MS) is None
    sample(c, 1000)
    np.testing.assert_allclose(sample(c, 1100), 0.5)


def test_a_new_trajectory_replaces_the_old_at_once() -> None:
    c = controller()
    c.receive(Trajectory(NAMES, [point(100, 1.0, 1.0)]), 0)
    sample(c, 1000)
    sample(c, 1050)
    c.receive(Trajectory(NAMES, [point(100, 0.5, -0.5)]), 1050 * MS)
    np.testing.assert_allclose(sample(c, 1050), 0.5)
    np.testing.assert_allclose(sample(c, 1100), [0.5, 0.0])


def test_it_starts_from_the_measured_state_unless_told() -> None:
    c = controller(interpolate_from_desired_state=False)
    c.receive(Trajectory(NAMES, [point(100, 0.0, 0.0)]), 0)
    np.testing.assert_allclose(sample(c, 0), -5.0)
    np.testing.assert_allclose(sample(c, 50), -2.5)


def test_velocities_make_it_cubic_and_accelerations_quintic() -> None:
    c = controller()
    c.receive(Trajectory(NAMES, [point(1000, 1.0, 1.0, velocities=(0.0, 0.0))]), 0)
    sample(c, 0)
    # 3 u^2 - 2 u^3 at a quarter
    np.testing.assert_allclose(sample(c, 250), 3 / 16 - 2 / 64)
    c = controller()
    c.receive(Trajectory(NAMES, [TrajectoryPoint(1000 * MS, (1, 1), (0, 0), (0, 0))]), 0)
    sample(c, 0)
    # 10 u^3 - 15 u^4 + 6 u^5 at a quarter
    np.testing.assert_allclose(sample(c, 250), 10 / 64 - 15 / 256 + 6 / 1024)


@pytest.mark.parametrize("accelerations", [False, True])
def test_segments_join_with_equal_position_and_velocity(accelerations: bool) -> None:
    random = np.random.default_rng(0)
    points = []
    for k in range(1, 5):
        derivatives = [random.standard_normal(2) * (k < 4) for _ in range(2)]
        points.append(
            TrajectoryPoint(
                k * 100 * MS,
                random.standard_normal(2),
                derivatives[0],
                derivatives[1] if accelerations else (),
            )
        )
    c = controller()
    assert c.receive(Trajectory(NAMES, points), 0) is None
    positions = np.array([c.sample(t * MS // 100, ZERO, ZERO) for t in range(0, 40001)])
    velocities = np.diff(positions, axis=0) / 1e-5
    assert np.abs(np.diff(velocities, axis=0)).max() < 0.05  # a velocity step would be of order 1
    np.testing.assert_allclose(positions[20000], points[1].positions, atol=1e-9)


@pytest.mark.parametrize(
    ("trajectory", "word"),
    [
        (Trajectory(NAMES, []), "empty"),
        (Trajectory(NAMES, [point(10, 1.0, 1.0)], stamp=900 * MS), "ago"),
        (Trajectory(("a", "c"), [point(10, 1.0, 1.0)]), "c unknown"),
        (Trajectory(("a",), [point(10, 1.0)]), "b missing"),
        (Trajectory(("a", "a", "b"), [point(10, 1.0, 1.0, 1.0)]), "twice"),
        (Trajectory(NAMES, [point(10, 1.0)]), "1 values, expected 2"),
        (Trajectory(NAMES, [point(10, 1.0, float("nan"))]), "not finite"),
        (Trajectory(NAMES, [point(10, 1.0, 1.0), point(10, 1.0, 1.0)]), "time_from_start"),
        (Trajectory(NAMES, [point(10, 1.0, 1.0, velocities=(0.0, 0.1))]), "allow_nonzero_velocity"),
    ],
)
def test_what_is_rejected_says_why_and_the_old_goes_on(trajectory: Trajectory, word: str) -> None:
    c = controller()
    c.receive(Trajectory(NAMES, [point(100, 1.0, 1.0)]), 0)
    sample(c, 1000)
    reason = c.receive(trajectory, 1050 * MS)
    assert reason is not None
    assert word in reason
    assert (c.accepted, c.rejected) == (1, 1)
    np.testing.assert_allclose(sample(c, 1050), 0.5)


def test_what_the_parameters_allow_is_taken() -> None:
    c = controller(allow_nonzero_velocity_at_trajectory_end=True, allow_partial_joints_goal=True)
    assert c.receive(Trajectory(("b",), [point(100, 2.0, velocities=(1.0,))]), 0) is None
    sample(c, 0)
    np.testing.assert_allclose(sample(c, 200), [0.0, 2.0])
