"""Queries, keys and values with RoPE in one launch: its plans, its machine code, and on a Hopper GPU its results."""

import itertools
import os

import pytest
import torch
from hybrid_policy.errors import InputError
from hybrid_policy.kernels import hopper_product, tensor_map
from hybrid_policy.kernels import qkv_product as qkv
from hybrid_policy.kernels.qkv import rope_split, rope_tables
from hybrid_policy.kernels.qkv_product import QkvPlan, make_plan, plan_qkv_product, qkv_product_reference

from .devices import on_hopper
from .machine_code import compiled, disassembled, nvcc

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def never_hang(monkeypatch):
    monkeypatch.setattr(qkv, "SPIN_LIMIT", 1 << 18)
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")  # what a failure shows
    torch.manual_seed(seed)


# ---- plans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 8, 37, 304, 560, 608, 656, 712, 816, 968, 1600])
@pytest.mark.parametrize("n", [2560, 512])
@pytest.mark.parametrize("k_bytes", [144, 2048, 4096])
@pytest.mark.parametrize("processors", [132, 114])
def test_plans_cover_the_rows_and_fit_a_block(m, n, k_bytes, processors):
    plan = plan_qkv_product(m, n, k_bytes, processors)
    assert plan.nt % 8 == 0
    assert 8 <= plan.nt <= qkv.MOST_TOKENS
    assert plan.shared + 1024 <= 227 * 1024
    assert 3 <= plan.stages <= 8
    assert -(-plan.nt // 32) * 32 * 132 * 4 <= plan.shared - 1024  # the sums
    assert plan.blocks(m, n) * 128 * plan.nt >= m * n


@pytest.mark.parametrize(
    ("m", "n", "plan"),
    [
        (560, 2560, QkvPlan(96, 8)),
        (560, 512, QkvPlan(24, 8)),
        (968, 2560, QkvPlan(168, 6)),
        (968, 512, QkvPlan(40, 8)),
    ],
)
@pytest.mark.parametrize("k_bytes", [2048, 4096])
def test_plans_are_those_measured_and_one_wave(m, n, plan, k_bytes):
    assert plan_qkv_product(m, n, k_bytes) == plan
    assert plan.blocks(m, n) <= 120


def test_many_rows_take_several_waves():
    plan = plan_qkv_product(3000, 2560, 2048)
    assert 240 < plan.blocks(3000, 2560) <= 360


def test_what_fits():
    assert qkv.fits((9, 0), 8, 1, 256, 2048)
    assert qkv.fits((9, 0), 0, 1, 256, 2048, FP8)
    assert not qkv.fits((10, 0), 8, 1, 256, 2048)
    assert not qkv.fits((9, 0), 7, 1, 256, 2048)
    assert not qkv.fits((9, 0), 8, 1, 128, 2048)
    assert not qkv.fits((9, 0), 8, 1, 256, 2040)
    assert not qkv.fits((9, 0), 8, 1, 256, 2048, torch.float32)


@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_a_sixteen_of_rows_is_eight_pairs(dtype, monkeypatch):
    made = []
    monkeypatch.setattr(tensor_map, "_encode", lambda *arguments: made.append(arguments) or b"")
    weight = torch.empty(4 * 256, 48, dtype=dtype)
    tensor_map.halves_map(weight, 256)
    address, kind, shape, strides, box, swizzle = made[0]
    size = dtype.itemsize
    assert (address, kind, shape, box[0], swizzle) == (weight.data_ptr(), dtype, (48, 8, 2, 16, 4), 128 // size, 128)
    column, head, eight = 32, 3, 8
    rows = []
    for place in itertools.product(*(range(extent) for extent in reversed(box[1:]))):  # innermost last
        at = [head + place[0], eight + place[1], place[2], place[3]]
        assert all(i < extent for i, extent in zip(at, reversed(shape[1:]), strict=True))
        offset = sum(i * stride for i, stride in zip(at, reversed(strides), strict=True)) + column * size
        assert (offset - column * size) % (48 * size) == 0
        rows.append(offset // (48 * size) - head * 256)
    assert len(rows) == 64
    for warp in range(4):
        first = list(range(64 + 8 * warp, 72 + 8 * warp))
        assert rows[16 * warp : 16 * warp + 16] == [*first, *(row + 128 for row in first)]


def test_inputs_of_other_shapes_are_refused():
    x, w, q = torch.zeros(3, 256, dtype=BF16), torch.zeros(1024, 256, dtype=BF16), torch.zeros(3, 2, 256, dtype=BF16)
    k, v, tables = torch.zeros(5, 1, 256, dtype=BF16), torch.zeros(5, 1, 256, dtype=BF16), rope_tables(5, 256, "cpu")
    good = {"x": x, "weight": w, "q": q, "k_cache": k, "v_cache": v, "tables": tables, "start": None}
    for name, change, said in (
        ("weight", w[:768], "weight"),
        ("weight", w.to(FP8), "weight"),
        ("x", x.float(), "x, heads"),
        ("q", q.float(), "q"),
        ("v_cache", v.to(FP8), "v_cache"),
        ("tables", rope_tables(4, 256, "cpu"), "cosines"),
        ("start", torch.zeros(1), "start"),
        ("row_scale", torch.ones(4), "row_scale"),
    ):
        with pytest.raises(InputError, match=said):
            qkv.qkv_product(**good | {name: change})
    few = {"k_cache": k[:2], "v_cache": v[:2], "tables": rope_tables(2, 256, "cpu")}
    with pytest.raises(InputError, match="rows"):
        qkv.qkv_product(**good | few)


# ---- machine code ------------------------------------------------------------------------------------------


@nvcc
@pytest.mark.parametrize(
    ("size", "plan", "cache8"),
    [
        (1, plan_qkv_product(560, 2560, 2048), False),
        (1, plan_qkv_product(968, 2560, 2048), False),
        (1, plan_qkv_product(560, 512, 2048), True),
        (2, plan_qkv_product(560, 2560, 4096), False),
        (1, make_plan(qkv.MOST_TOKENS, 2048), True),
        (2, make_plan(8, 4096), True),
    ],
)
@pytest.mark.parametrize("spin_limit", [0, 1 << 18])
def test_machine_code(tmp_path, size, plan, cache8, spin_limit):
    macros = plan.macros(size, cache8=cache8, pdl=True) | {"SPIN_LIMIT": spin_limit}
    cubin = compiled(tmp_path, qkv.SOURCES, macros, prelude=hopper_product.product_source(size, plan.nt))
    code = disassembled(cubin)
    assert code.count("QGMMA" if size == 1 else "HGMMA") == 4
    assert "LDL" not in code
    assert "STL" not in code


# ---- results -----------------------------------------------------------------------------------------------


class Case:
    """Inputs of one call on the GPU; q begins as NaN, the caches as 3."""

    def __init__(self, m, heads, k, dtype, *, kv_heads=1, start=None, cache=BF16):
        n, place = (heads + 2 * kv_heads) * 256, start or 0
        eight = dtype == FP8
        self.x = (torch.randn(m, k, device="cuda") * (32 if eight else 1)).to(dtype)
        self.w = (torch.randn(n, k, device="cuda") * (32 if eight else k**-0.5)).to(dtype)
        self.heads, self.kv_heads, self.place, self.cache = heads, kv_heads, place, cache
        self.capacity = m + place + 5
        self.tables = rope_tables(self.capacity, 256, "cuda")
        self.start = None if start is None else torch.tensor([start], dtype=torch.int32, device="cuda")
        self.scales = {}
        if eight:
            rows = (torch.rand(m, device="cuda") + 0.5) / 32
            self.scales = {"row_scale": rows, "scale": k**-0.5 / 32}

    def places(self, dtype, cache):
        shape = (self.capacity, self.kv_heads, 256)
        q = torch.full((self.x.shape[0], self.heads, 256), float("nan"), device="cuda", dtype=dtype)
        k, v = (torch.full(shape, 3.0, device="cuda").to(cache) for _ in range(2))
        return q, k, v

    def run(self, **options):
        places = self.places(BF16, self.cache)
        qkv.qkv_product(self.x, self.w, *places, self.tables, self.start, **self.scales, **options)
        return places

    def expected(self):
        places = self.places(torch.float32, torch.float32)
        qkv_product_reference(self.x, self.w, *places, self.tables, self.start, **self.scales)
        return places

    def check(self, got, bound=4e-3):
        m = self.x.shape[0]
        for name, ours, theirs in zip("qkv", got, self.expected(), strict=True):
            if name != "q":
                rows = torch.ones(self.capacity, dtype=torch.bool, device="cuda")
                rows[self.place : self.place + m] = False
                assert (ours.float()[rows] == 3.0).all(), f"{name}: a row that is not ours was written"
            if ours.numel() == 0:
                continue
            assert torch.isfinite(ours.float()).all(), name
            error = relative(ours, theirs)
            limit = 4e-2 if ours.dtype == FP8 else bound
            assert error < limit, f"{name}: {error}"
            # where single values go wrong, the norm says little
            worst = (ours.float() - theirs).abs() - (0.07 if ours.dtype == FP8 else 0.01) * theirs.abs()
            assert worst.max() < 0.02, f"{name}: {worst.max()} at {worst.argmax()} of {tuple(ours.shape)}"


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def same(one, other):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, other, strict=True))


class TestProduct:
    pytestmark = on_hopper

    @pytest.mark.parametrize("dtype", [BF16, FP8])
    @pytest.mark.parametrize("heads", [8, 0])  # 0: the last layer, keys and values alone
    @pytest.mark.parametrize("start", [None, 3])
    @pytest.mark.parametrize("m", [1, 37, 560, 968])
    def test_agrees_with_float64(self, m, heads, start, dtype):
        case = Case(m, heads, 2048, dtype, start=start)
        got = case.run(pdl=True)
        case.check(got)
        for _ in range(3):
            assert same(got, case.run())

    @pytest.mark.parametrize("dtype", [BF16, FP8])
    @pytest.mark.parametrize("nt", [8, 40, 96, 176])
    def test_every_kind_of_plan(self, nt, dtype):
        case = Case(417, 4, 400 if dtype == BF16 else 784, dtype, start=2)  # K ends within a stage
        case.check(case.run(plan=QkvPlan(nt, 3)))  # the ring turns over

    @pytest.mark.parametrize("dtype", [BF16, FP8])
    @pytest.mark.parametrize("cache", [BF16, FP8])
    @pytest.mark.parametrize("kv_heads", [1, 2])
    def test_caches_and_heads(self, kv_heads, cache, dtype):
        case = Case(70, 2, 144, dtype, kv_heads=kv_heads, start=1, cache=cache)
        case.check(case.run(pdl=True))

    @pytest.mark.parametrize("dtype", [BF16, FP8])
    def test_agrees_with_the_launches_that_it_stands_for(self, dtype):
        case = Case(560, 8, 2048, dtype)
        got, places = case.run(), case.places(BF16, BF16)
        product = (case.x.double() @ case.w.double().T * case.scales.get("scale", 1.0)).bfloat16()
        rope_split(product, *places, case.tables, None, row_scale=case.scales.get("row_scale"))
        for ours, theirs in zip(got, places, strict=True):
            assert relative(ours, theirs) < 6e-3  # the product was rounded once more there

    @pytest.mark.parametrize("dtype", [BF16, FP8])
    def test_what_is_not_finite_stays_where_it_belongs(self, dtype):
        case = Case(100, 2, 256, dtype)
        case.x[7, 5] = float("nan")
        case.w[256 + 3, 200] = float("nan")  # of the second query head
        case.w[3 * 256 + 130, 200] = float("nan")  # of the values: they do not turn
        q, k, v = (torch.isnan(part.float()) for part in case.run())
        row = torch.zeros(100, 1, 256, dtype=torch.bool, device="cuda")
        row[7] = True
        wrong = torch.cat((row, row), 1)
        wrong[:, 1, 3], wrong[:, 1, 131] = True, True
        assert torch.equal(q, wrong)
        assert torch.equal(k[:100], row)
        row[:, 0, 130] = True
        assert torch.equal(v[:100], row)
        if dtype == BF16:
            case = Case(9, 0, 256, dtype)
            case.x[4] = 0
            case.x[4, 0], case.w[256:, 0] = float("inf"), 1.0
            assert torch.isposinf(case.run()[2][4]).all()
