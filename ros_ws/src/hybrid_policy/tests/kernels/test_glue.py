"""Norm, GeGLU, RoPE, attention and flow step: kernels in the interpreter (float32) against their references."""

import os

import pytest
import torch
from hybrid_policy.kernels import attention, flow_step, norm, qkv

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available(),
    reason="needs a GPU or TRITON_INTERPRET=1",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = torch.float32


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device("cpu")


def poison(*shape, dtype=EXACT):
    return torch.full(shape, float("nan"), dtype=dtype)


@interpreted
@pytest.mark.parametrize("width", [48, 256])
@pytest.mark.parametrize("kind", ["plain", "layer", "gated", "scaled", "clean"])
def test_add_norm(width, kind):
    rows = 5
    x, y = torch.randn(rows, width), torch.randn(rows, width)
    vectors = torch.randn(6, width)
    options = {
        "plain": {},
        "layer": {"shift": vectors[1], "addend": y, "bias": vectors[2], "layer_norm": True},
        "gated": {"shift": vectors[1], "addend": y, "gate": vectors[2]},
        "scaled": {"addend": y, "row_scale": torch.rand(rows) + 0.5},
        "clean": {
            "shift": vectors[2:4],
            "gate": vectors[4:6],
            "addend": y,
            "clean": torch.tensor([2], dtype=torch.int32),
        },
    }[kind]
    scale = vectors[:2] if kind == "clean" else vectors[0]
    ours, theirs = x.clone(), x.clone()
    out, expected = poison(rows, width), poison(rows, width)
    squares = poison(2, rows)
    norm.add_norm(ours, out, scale, **options, out_squares=squares[0] if kind == "scaled" else None)
    norm.add_norm_reference(theirs, expected, scale, **options, out_squares=squares[1])
    if kind == "scaled":
        torch.testing.assert_close(squares[0], expected.square().sum(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(squares[1], expected.square().sum(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_add_norm_reference_is_layer_norm_and_rms_norm():
    x, scale, shift = torch.randn(4, 96), torch.randn(96), torch.randn(96)
    out = poison(4, 96)
    norm.add_norm_reference(x, out, scale, shift=shift, layer_norm=True)
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(x, (96,), scale, shift, 1e-6), atol=1e-5, rtol=1e-5)
    norm.add_norm_reference(x, out, scale)
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (96,), scale, 1e-6), atol=1e-5, rtol=1e-5)


def test_quantising_references_carry_nan_in_the_scale():
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    out, scale = torch.empty(3, 64, dtype=torch.float8_e4m3fn), poison(3)
    norm.quantise_rows_reference(x, out, scale)
    assert scale[1].isnan()
    assert not scale[[0, 2]].isnan().any()
    back = out[0].float() * scale[0]
    assert (back - x[0]).abs().max() <= x[0].abs().max() * 2**-4


@interpreted
def test_geglu():
    y, row = torch.randn(3, 2 * 80), torch.rand(3) + 0.5
    out, expected = poison(3, 80), poison(3, 80)
    norm.geglu(y, out, row_scale=row)
    norm.geglu_reference(y, expected, row_scale=row)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@interpreted
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 1, 32), (4, 2, 16), (0, 1, 32)])
@pytest.mark.parametrize("start", [None, 7])
def test_rope_split(heads, kv_heads, head_dim, start):
    rows, capacity = 6, 20
    projected = torch.randn(rows, (heads + 2 * kv_heads) * head_dim)
    tables = qkv.rope_tables(capacity, head_dim, DEVICE)
    place = None if start is None else torch.tensor([start], dtype=torch.int32)
    results = []
    for function in (qkv.rope_split, qkv.rope_split_reference):
        q, k, v = (
            poison(rows, heads, head_dim),
            torch.zeros(capacity, kv_heads, head_dim),
            torch.zeros(capacity, kv_heads, head_dim),
        )
        function(projected, q, k, v, tables, place, row_scale=torch.full((rows,), 0.5))
        results.append((q, k, v))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_rope_reference_is_the_models():
    from hybrid_policy.models.gemma import apply_rope, rope_table

    projected = torch.randn(5, 3 * 32)
    q, k, v = poison(5, 1, 32), torch.zeros(9, 1, 32), torch.zeros(9, 1, 32)
    start = torch.tensor([3], dtype=torch.int32)
    qkv.rope_split_reference(projected, q, k, v, qkv.rope_tables(9, 32, DEVICE), start)
    rope = rope_table(torch.arange(3, 8)[None], 32)
    torch.testing.assert_close(q, apply_rope(projected[None, :, None, :32], rope)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(k[3:8], apply_rope(projected[None, :, None, 32:64], rope)[0], atol=1e-5, rtol=1e-5)
    assert (k[:3] == 0).all()
    torch.testing.assert_close(v[3:8, 0], projected[:, 64:])


@interpreted
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "width"), [(2, 1, 32, 48), (4, 1, 64, 300), (2, 2, 32, 64), (2, 1, 48, 64)]
)
def test_fused_qkv(heads, kv_heads, head_dim, width):
    rows, capacity = 5, 16
    n = (heads + 2 * kv_heads) * head_dim
    weight, x = torch.randn(n, width) / width**0.5, torch.randn(rows, width) * 3
    scale, shift = torch.randn(width) * 0.3 + 1, torch.randn(width) * 0.3
    start = torch.tensor([4], dtype=torch.int32)
    tables = qkv.rope_tables(capacity, head_dim, DEVICE)
    caches = [torch.zeros(capacity, kv_heads, head_dim) for _ in range(4)]
    q, expected = poison(rows, heads, head_dim), poison(rows, heads, head_dim)
    fused = qkv.FusedQKV(weight, heads, kv_heads, head_dim, compute=EXACT)
    fused(x, scale, fused.shift_rows(shift), q, caches[0], caches[1], tables, start)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale + shift
    qkv.rope_split_reference(normed @ weight.T, expected, caches[2], caches[3], tables, start)
    for ours, theirs in ((q, expected), (caches[0], caches[2]), (caches[1], caches[3])):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("head_dim", [16, 48, 64, 96, 256])
def test_a_tile_lies_within_a_head(head_dim):
    block_n, *_ = qkv.plan_qkv(10 * head_dim, head_dim)
    assert head_dim % block_n == 0
    assert block_n in (16, 32, 64)


def test_interleaving_is_a_permutation_of_pairs():
    rows = torch.arange(16.0)[:, None]
    assert qkv.interleave_halves(rows, 8)[:, 0].tolist() == [
        0,
        4,
        1,
        5,
        2,
        6,
        3,
        7,
        8,
        12,
        9,
        13,
        10,
        14,
        11,
        15,
    ]


@interpreted
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "head_dim", "valid", "extra", "plan"),
    [
        (5, 4, 1, 32, 37, 5, attention.AttentionPlan(16, 16, 3, 4, 1)),
        (5, 4, 2, 16, 3, 5, attention.AttentionPlan(16, 16, 4, 4, 1)),  # more splits than tiles
        (24, 4, 1, 32, 24, 0, attention.AttentionPlan(64, 16, 1, 4, 1)),
        (3, 2, 1, 72, 9, 3, attention.AttentionPlan(16, 16, 2, 4, 1)),
    ],
)
def test_attention(rows, heads, kv_heads, head_dim, valid, extra, plan):
    capacity = 48
    q = torch.randn(rows, heads, head_dim)
    k, v = torch.randn(2, capacity, kv_heads, head_dim).unbind()
    k[valid + extra :] = float("nan")  # what lies behind the valid rows must not matter
    v[valid + extra :] = float("nan")
    count = torch.tensor([valid], dtype=torch.int32)
    run = attention.Attention(rows, heads, kv_heads, head_dim, capacity, DEVICE, compute=EXACT, plan=plan)
    expected = poison(rows, heads, head_dim)
    attention.attention_reference(q, k, v, count, extra, expected, head_dim**-0.5)
    for _ in range(2):  # twice: the counters of the splits must be back at zero
        out = poison(rows, heads, head_dim)
        run(q, k, v, count, extra, out)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_attention_reference_is_scaled_dot_product_attention():
    q, k, v = torch.randn(6, 4, 32), torch.randn(20, 2, 32), torch.randn(20, 2, 32)
    out = poison(6, 4, 32)
    attention.attention_reference(q, k, v, torch.tensor([9], dtype=torch.int32), 6, out, 32**-0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1),
        k[:15].transpose(0, 1).repeat_interleave(2, 0),
        v[:15].transpose(0, 1).repeat_interleave(2, 0),
    )
    torch.testing.assert_close(out, expected.transpose(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 50, 400, 4480, 8000])
@pytest.mark.parametrize("head_dim", [32, 256])
def test_attention_plans_are_sane(rows, head_dim):
    plan = attention.plan_attention(rows, 1018, head_dim)
    assert plan.block_m in (16, 64)
    assert plan.splits >= 1
    if plan.splits > 1:
        assert -(-rows // plan.block_m) * plan.splits <= 132


@interpreted
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("raw", [True, False])
def test_flow_step(first, raw):
    rows, actions, width = 4, 7, 80
    h, x = torch.randn(rows, width), torch.randn(rows, actions)
    weights = flow_step.FlowWeights(
        torch.randn(actions, width) / 9, torch.randn(actions), torch.randn(width, actions), torch.randn(width)
    )
    guide = flow_step.Guide(torch.randn(rows, actions), torch.rand(rows), torch.tensor([1], dtype=torch.int32))
    scale, shift = torch.randn(2, width)
    ours, theirs, out, expected = x.clone(), x.clone(), poison(rows, width), poison(rows, width)
    normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * scale + shift
    flow_step.flow_step(
        h if raw else normed,
        ours,
        out,
        weights,
        guide,
        0.7,
        0.1,
        3.0,
        first=first,
        norm=(scale, shift) if raw else None,
    )
    flow_step.flow_step_reference(normed, theirs, expected, weights, guide, 0.7, 0.1, 3.0, first=first)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out, expected, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(ours[0], guide.target[0])
