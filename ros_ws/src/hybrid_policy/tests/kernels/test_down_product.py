"""A product with a long K, half of it in each of two blocks: plans, machine code, and on a Hopper GPU results."""

import os
import re

import pytest
import torch
from hybrid_policy.errors import InputError
from hybrid_policy.kernels import down_product as down
from hybrid_policy.kernels.down_product import down_reference, make_plan, plan_down

from .devices import on_hopper
from .machine_code import compiled, disassembled, nvcc

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def never_hang(monkeypatch):
    monkeypatch.setattr(down, "SPIN_LIMIT", 1 << 18)
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")  # what a failure shows
    torch.manual_seed(seed)


# ---- plans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 63, 304, 560, 608, 712, 968, 992])
@pytest.mark.parametrize("n", [2048, 512, 1152])
@pytest.mark.parametrize("processors", [132, 114])
def test_plans_cover_the_tokens_in_one_wave(m, n, processors):
    plan = plan_down(m, n, processors)
    if plan is None:
        assert m > processors // 2 // (n / 128) * down.MOST_TOKENS
        return
    assert plan.nt % 8 == 0
    assert 24 <= plan.nt <= down.MOST_TOKENS
    assert plan.shared <= down.SHARED
    assert plan.stages == 4
    assert plan.pairs(m, n) <= processors // 2
    assert plan.pairs(m, n) * 128 * plan.nt >= m * n


def test_the_prefix_takes_nearly_every_multiprocessor():
    assert plan_down(560, 2048).nt == 144
    assert plan_down(968, 2048).nt == 248
    assert plan_down(560, 2048).pairs(560, 2048) == plan_down(968, 2048).pairs(968, 2048) == 64
    assert plan_down(993, 2048) is None
    assert plan_down(1, 128 * 67) is None


def test_where_it_pays():
    pays = down.pays_in_pairs
    assert [m for m in (304, 400, 560, 712, 816, 968) if pays(FP8, m, 2048, 16384)] == [400, 560, 712, 816, 968]
    assert [m for m in (304, 400, 560, 712, 816, 968) if pays(BF16, m, 2048, 16384)] == [712, 816, 968]
    assert not pays(FP8, 560, 2048, 2048)
    assert not pays(torch.float32, 968, 2048, 16384)
    assert not pays(FP8, 1000, 2048, 16384)
    assert not pays(FP8, 560, 2048, 16384, 114)


def test_what_fits():
    assert down.fits((9, 0), 2048, 16384)
    assert not down.fits((10, 0), 2048, 16384)
    assert not down.fits((9, 0), 2044, 16384)
    assert not down.fits((9, 0), 2048, 16392)
    assert not down.fits((9, 0), 2048, 2032)


def test_inputs_of_other_shapes_are_refused():
    x, w = torch.zeros(3, 4096, dtype=BF16), torch.zeros(64, 4096, dtype=BF16)
    for wrong in (w[:, :2048].contiguous(), w.float(), w.to(FP8), w[:60], w.t().contiguous().t()):
        with pytest.raises(InputError, match="x, weight"):
            down.down_product(x, wrong)


# ---- machine code ------------------------------------------------------------------------------------------


@nvcc
@pytest.mark.parametrize(
    ("size", "plan"),
    [
        (1, plan_down(560, 2048)),
        (1, plan_down(968, 2048)),
        (2, plan_down(560, 2048)),
        (2, plan_down(968, 2048)),
        (1, make_plan(24)),
        (2, make_plan(24)),
    ],
)
@pytest.mark.parametrize("spin_limit", [0, 1 << 18])
def test_machine_code(tmp_path, size, plan, spin_limit):
    macros = plan.macros(size, pdl=True) | {"SPIN_LIMIT": spin_limit}
    cubin = compiled(tmp_path, down.SOURCES, macros, prelude=down.prelude(size, plan.nt))
    code = disassembled(cubin)
    others = plan.nt // 8 - plan.nt // 16
    pieces = (others + 1) // 2 if size == 1 else others
    tail = plan.stages - -(-pieces * 4096 // ((128 + plan.nt) * 128))
    assert code.count("QGMMA" if size == 1 else "HGMMA") == 4 * (1 + 2 * tail)
    assert len(re.findall(r"STAS\.128", code)) == pieces
    assert "LDL" not in code
    assert "STL" not in code


# ---- results -----------------------------------------------------------------------------------------------


def inputs(m, n, k, dtype):
    """x, W and the scale of the product."""
    x, w = torch.randn(m, k, device="cuda"), torch.randn(n, k, device="cuda")
    if dtype == BF16:
        return x.bfloat16(), w.bfloat16(), k**-0.5
    return (x * 32).to(FP8), (w * 32).to(FP8), k**-0.5 / 1024


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


class TestProduct:
    pytestmark = on_hopper

    @pytest.fixture(autouse=True)
    def poisoned(self, monkeypatch):
        """What the kernel does not write is NaN."""
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))

    @pytest.mark.parametrize("dtype", [BF16, FP8])
    @pytest.mark.parametrize("m", [1, 63, 500, 560, 968])
    def test_agrees_with_float64(self, m, dtype):
        x, w, scale = inputs(m, 2048, 16384, dtype)
        got = down.down_product(x, w, scale, pdl=True)
        assert got.dtype == BF16
        assert relative(got, down_reference(x, w, scale)) < 4e-3
        for _ in range(3):
            assert torch.equal(got, down.down_product(x, w, scale))

    @pytest.mark.parametrize("dtype", [BF16, FP8])
    @pytest.mark.parametrize("nt", [24, 32, 136, 144, 248])
    @pytest.mark.parametrize("k", [2048, 2064, 2608])
    def test_every_kind_of_plan(self, k, nt, dtype):
        x, w, scale = inputs(417, 5 * 128 + 24, k, dtype)
        got = down.down_product(x, w, scale, plan=make_plan(nt))
        assert relative(got, down_reference(x, w, scale)) < 4e-3

    @pytest.mark.parametrize("dtype", [BF16, FP8])
    def test_what_is_not_finite_stays_where_it_belongs(self, dtype):
        x, w, scale = inputs(100, 256, 2048, dtype)
        x[7, 5] = float("nan")
        w[3, 1900] = float("nan")
        wrong = torch.zeros(100, 256, dtype=torch.bool, device="cuda")
        wrong[7], wrong[:, 3] = True, True
        assert torch.equal(torch.isnan(down.down_product(x, w, scale)), wrong)
