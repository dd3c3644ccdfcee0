import math

import numpy as np
import pytest
from hybrid_policy.errors import InputError
from hybrid_policy.models.observation import Continuation
from hybrid_policy.runtime.rtc import RealTimeChunking, overlap_weights, shifted


@pytest.mark.parametrize("schedule", ["exp", "linear"])
@pytest.mark.parametrize(("delay", "consumed"), [(0, 1), (4, 10), (10, 10), (25, 25), (0, 50)])
def test_weights_follow_equation_5(schedule, delay, consumed):
    end = 50 - consumed
    for i, weight in enumerate(overlap_weights(50, delay, consumed, schedule)):
        c = (end - i) / (end - delay + 1)
        falling = c * math.expm1(c) / (math.e - 1) if schedule == "exp" else c
        expected = 1.0 if i < delay else falling if i < end else 0.0
        assert weight == pytest.approx(expected, abs=1e-6)


def test_weights_are_one_then_fall_then_zero():
    w = overlap_weights(16, 4, 6, "exp")
    assert (w[:4] == 1).all()
    assert (w[10:] == 0).all()
    assert (np.diff(w[3:11]) < 0).all()


def test_step_weights_of_the_paper_and_of_a_prior():
    times = np.array([1.0, 0.5, 0.1])
    np.testing.assert_allclose(RealTimeChunking(beta=5).step_weights(times), [5, 2, 5], rtol=1e-6)
    prior = RealTimeChunking(mode="prior_corrected", beta=100, prior_std=0.2)
    expected = (0.25 * 0.04 + 0.25) / (0.04 * 0.25)
    np.testing.assert_allclose(prior.step_weights(times)[1], expected, rtol=1e-6)
    unit = RealTimeChunking(mode="prior_corrected", prior_std=1.0)
    np.testing.assert_array_equal(unit.step_weights(times), RealTimeChunking().step_weights(times))
    assert (RealTimeChunking(mode="prefix").step_weights(times) == 0).all()


def test_prior_weight_is_the_inverse_posterior_variance():
    # actions ~ N(0, s^2), x = (1-t) a + t e: Var[a | x] by the normal equations; w = t / ((1-t) Var)
    t, s = 0.3, 0.2
    variance = 1 / (1 / s**2 + (1 - t) ** 2 / t**2)
    weight = RealTimeChunking(mode="prior_corrected", beta=1e9, prior_std=s).step_weights(np.array([t]))
    np.testing.assert_allclose(weight[0], t / ((1 - t) * variance), rtol=1e-6)


def test_shifted_chunk():
    chunk = np.arange(12, dtype=np.float32).reshape(6, 2)
    target = shifted(Continuation(chunk, consumed=2, delay=1), 6, 2)
    np.testing.assert_array_equal(target[:4], chunk[2:])
    assert (target[4:] == 0).all()


def test_between_two_steps_the_previous_chunk_is_a_line():
    chunk = np.array([[0.0], [1.0], [3.0], [7.0], [8.0]], np.float32)
    target = shifted(Continuation(chunk, consumed=1.25, delay=3), 5, 1)
    np.testing.assert_allclose(target[:, 0], [1.5, 4.0, 7.25, 0.0, 0.0])
    weights = overlap_weights(5, 1, 1.25, "exp")
    assert (weights[:3] > 0).all()
    assert (weights[3:] == 0).all()


@pytest.mark.parametrize("mode", ["guided", "prior_corrected"])
@pytest.mark.parametrize("steps", [3, 5, 10])
def test_the_last_step_ends_on_the_kept_actions(mode, steps):
    """The weight that the last step needs, of a flow that pulls elsewhere; as many as steps, by default."""
    times = 1 - np.arange(steps) / steps
    strengths = RealTimeChunking(mode=mode).step_weights(times)
    assert strengths.max() <= steps
    x, y = 3.0, 0.5
    for t, w in zip(times, strengths):
        v = (x + 1.0) / t  # towards -1
        x -= (v - w * (y - (x - t * v))) / steps
    if mode == "prior_corrected":
        assert x == pytest.approx(y, abs=1e-6)
    else:  # the paper's weight at the last step is a little below the number of steps
        assert abs(x - y) < 0.25


@pytest.mark.parametrize(("delay", "consumed"), [(15, 2), (4, 13), (4, 12.5), (-1, 2), (0, 17), (0, -1)])
def test_impossible_delays_are_named(delay, consumed):
    with pytest.raises(InputError, match="delay <= 16 - consumed"):
        shifted(Continuation(np.zeros((16, 2), np.float32), consumed, delay), 16, 2)


def test_bad_chunks_are_named():
    with pytest.raises(InputError, match="shape"):
        shifted(Continuation(np.zeros((5, 2), np.float32), 1, 0), 6, 2)
    with pytest.raises(InputError, match="NaN"):
        shifted(Continuation(np.full((6, 2), np.nan, np.float32), 1, 0), 6, 2)
    with pytest.raises(InputError, match="beta"):
        RealTimeChunking(beta=float("nan"))
