"""Scales of what GeGLU makes of a row, from the weights and the row's length: never too small, and what they cost."""

import math

import pytest
import torch
import torch.nn.functional as F
from hybrid_policy.runtime.static_scales import affordable_row_factor, gated_row_factor, gated_row_loss

K, N = 96, 512
WEIGHTS = {
    "normal": torch.randn,
    "student": lambda *s: torch.distributions.StudentT(torch.tensor(3.0)).sample(s),
    "uneven rows": lambda *s: torch.randn(*s) * torch.randn(s[0], 1).exp(),
}
ROWS = {
    "normal": lambda m: torch.randn(m, K),
    "huge channels": lambda m: torch.randn(m, K) * torch.where(torch.arange(K) % 24 == 0, 100.0, 1.0),
    "student": lambda m: torch.distributions.StudentT(torch.tensor(1.5)).sample((m, K)),
    "one channel": lambda m: torch.eye(K).repeat(m // K + 1, 1)[:m],
}


def e4m3(x):
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


def rounded(h):
    """With a scale a row, as add_norm leaves it."""
    scale = h.abs().amax(1, keepdim=True) / 448
    return e4m3(h / scale) * scale


def gated(h, gate, up):
    return F.gelu(h @ gate.T, approximate="tanh") * (h @ up.T)


def decibels(expected, got):
    return float(10 * torch.log10(expected.square().sum() / (got - expected).square().sum()))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rows", ROWS)
def test_no_row_saturates(weights, rows):
    gate, up = (WEIGHTS[weights](N, K) for _ in range(2))
    h = ROWS[rows](400)
    scale = gated_row_factor(gate, up) * h.square().sum(1, keepdim=True)
    assert (gated(rounded(h), gate, up).abs() / scale).amax() <= 448


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0, math.pi / 2, 2.5])
def test_the_bound_is_reached(angle):
    """Between two rows at any angle lies the h that makes their product largest."""
    first, second = torch.linalg.qr(torch.randn(K, 2))[0].T
    gate, up = 30 * first[None], 20 * (math.cos(angle) * first + math.sin(angle) * second)[None]
    sign = 1 if angle <= math.pi / 2 else -1  # opposite rows: the product is largest where it is negative
    h = (gate / 30 + sign * up / 20) * 9
    reached = gated(h, gate, up).abs().amax() / (448 * gated_row_factor(gate, up) * h.square().sum())
    assert 0.86 < reached <= 1.0  # but for 1.01 (17/16)^2


def test_bf16_scales_stay_within_the_hundredth():
    """The kernel keeps the scale's inverse in bf16: up to 2^-8 above, where a hundredth is left."""
    assert (17 / 16) ** 2 * (1 + 2**-8) < 1.01 * (17 / 16) ** 2


def lognormal(n, spread):
    return torch.exp(torch.randn(n, 1, dtype=torch.float64) * spread)


@pytest.mark.parametrize("length", [1 / 16, 64.0])
@pytest.mark.parametrize(("spread", "inverse"), [(0.0, False), (0.25, False), (0.5, False), (1.0, False), (0.5, True)])
def test_what_a_scale_costs_is_known_before(spread, inverse, length):
    torch.manual_seed(0)
    n, k = 4096, 1024
    wide = [torch.randn(n, k, dtype=torch.float64) * k**-0.5 * lognormal(n, spread) for _ in range(2)]
    columns = 1 / (wide[0].norm(dim=1) * wide[1].norm(dim=1)) if inverse else torch.ones(n)
    act = gated(rounded(F.normalize(torch.randn(64, k, dtype=torch.float64))) * length, *wide)
    scale = 2.0 ** round(math.log2(gated_row_factor(*wide) * length**2))  # else even what is not lost rounds otherwise
    mantissa, exponent = torch.frexp(act)
    endless = torch.ldexp((mantissa * 16).round() / 16, exponent)  # three bits behind the first, and any exponent
    free, ours = (decibels(act * columns, q * columns) for q in (endless, e4m3(act / scale) * scale))
    predicted = gated_row_loss(*wide, columns[None], scale / length**2)
    assert -0.01 <= free - ours <= predicted
    if length < 1:  # gelu(g) is g / 2; where it is g or nothing, values lie further above what is lost
        assert predicted <= 2 * (free - ours) + 0.1


def test_uneven_rows_are_left_to_the_library():
    wide = [torch.randn(2048, 256) for _ in range(2)]
    down = torch.randn(64, 2048)
    assert affordable_row_factor(*wide, down) == gated_row_factor(*wide)
    uneven = [w * lognormal(2048, 1.0).float() for w in wide]
    down = down / (uneven[0].norm(dim=1) * uneven[1].norm(dim=1))  # as if each feature counted alike
    assert affordable_row_factor(*uneven, down) is None
    wide[0][5, 7] = float("nan")
    assert affordable_row_factor(*wide, down) is None
