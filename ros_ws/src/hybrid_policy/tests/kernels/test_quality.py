"""How close each precision's MLP comes to the unquantised one (references, CPU); figures in docs/precision.md."""

import pytest
import torch
from hybrid_policy.kernels.gate_up import prepare_gate_up
from hybrid_policy.kernels.linear import prepare


def student_t(*shape, freedom=5):
    g = torch.Generator().manual_seed(shape[0])
    chi = torch.randn(freedom, *shape, generator=g).square().mean(0)
    return torch.randn(*shape, generator=g) / chi.sqrt()


def gaussian(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def mlp_cosine(draw, gate_up_precision, down_precision, *, rule_importance=None):
    width, hidden, m = 512, 1024, 48
    gate, up, down = (draw(a, b) / b**0.5 for a, b in ((hidden, width), (hidden + 1, width), (width, hidden)))
    up = up[:hidden]
    x = torch.randn(m, width, generator=torch.Generator().manual_seed(9)).bfloat16()
    h = torch.nn.functional.gelu(x.float() @ gate.T, approximate="tanh") * (x.float() @ up.T)
    expected = h @ down.T
    first = prepare_gate_up(gate, up, gate_up_precision, implementation="reference", importance=rule_importance)
    second = prepare(down, down_precision, implementation="reference")
    got = second(first(x), out=torch.empty(m, width))
    return float(torch.nn.functional.cosine_similarity(got, expected, dim=-1).mean())


@pytest.mark.parametrize("draw", [gaussian, student_t])
def test_hybrid_keeps_its_cosine_between_w4a4_and_fp8(draw):
    hybrid = mlp_cosine(draw, "nvfp4_w4a16", "fp8_w8a8")
    w4a4 = mlp_cosine(draw, "nvfp4_w4a4", "nvfp4_w4a4")
    all_fp8 = mlp_cosine(draw, "fp8_w8a8", "fp8_w8a8")
    assert hybrid >= 0.992
    assert w4a4 < hybrid < all_fp8
    assert w4a4 > 0.96
    assert all_fp8 > 0.997
