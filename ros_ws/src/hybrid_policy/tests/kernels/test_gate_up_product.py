"""Gate and up with GeGLU in one launch: its plans, its machine code, and on a Hopper GPU its results."""

import math
import os

import pytest
import torch
from hybrid_policy.errors import InputError
from hybrid_policy.kernels import gate_up_product as gate_up
from hybrid_policy.kernels.gate_up_product import gate_up_reference, make_plan, plan_gate_up

from .devices import on_hopper
from .machine_code import compiled, disassembled, nvcc

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def never_hang(monkeypatch):
    monkeypatch.setattr(gate_up, "SPIN_LIMIT", 1 << 18)
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")  # what a failure shows
    torch.manual_seed(seed)


# ---- plans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eight", [True, False])
@pytest.mark.parametrize(
    ("m", "features", "k"), [(1, 16, 144), (37, 400, 2048), (560, 16384, 2048), (968, 16384, 2048), (4000, 2048, 400)]
)
def test_plans_cover_the_tokens_and_fit_a_block(eight, m, features, k):
    plan = plan_gate_up(eight, m, features, k)
    assert plan.nt % 8 == 0
    assert 8 <= plan.nt <= gate_up.MOST_TOKENS
    assert plan.shared <= gate_up.SHARED
    assert 3 <= plan.stages <= 6
    assert plan.pairs(m, features) * 2 * plan.nt * 128 >= m * features
    assert plan.x_rows % 8 == 0
    assert plan.first_piece % 8 == 0
    assert plan.first_piece * (64 if eight else 128) <= 16384
    assert (plan.nt - plan.first_piece) * (64 if eight else 128) <= 16384


@pytest.mark.parametrize("eight", [True, False])
@pytest.mark.parametrize("m", range(304, 969, 48))
def test_prefix_plans_leave_little_of_the_device_idle(eight, m):
    plan = plan_gate_up(eight, m, 16384, 2048)
    rounds = math.ceil(plan.pairs(m, 16384) / 66)
    assert m / (rounds * 66 * 2 * 128 * plan.nt / 16384) > 0.85


def test_results_are_staged_in_the_ring_where_there_is_no_room_beside_it():
    assert make_plan(True, 192).held
    assert make_plan(True, 192).stages == 4
    assert not make_plan(True, 200).held
    assert make_plan(False, 192).pieces == 2


def test_what_fits():
    assert gate_up.fits((9, 0), 16384, 2048)
    assert not gate_up.fits((10, 0), 16384, 2048)
    assert not gate_up.fits((9, 0), 16392, 2048)
    assert not gate_up.fits((9, 0), 16384, 128)


def test_inputs_of_other_shapes_are_refused():
    x, w = torch.zeros(3, 256, dtype=torch.bfloat16), torch.zeros(64, 256, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="x, weight"):
        gate_up.gate_up_product(x, w[:, :128].contiguous())
    with pytest.raises(InputError, match="x, weight"):
        gate_up.gate_up_product(x, w.float())
    with pytest.raises(InputError, match="out_scale"):
        gate_up.gate_up_product(x, w, out_scale=torch.ones(3))
    row = torch.ones(3)
    with pytest.raises(InputError, match="squares"):
        gate_up.gate_up_product(x.to(FP8), w.to(FP8), row_scale=row, out_scale=row)
    with pytest.raises(InputError, match="row_scale"):
        gate_up.gate_up_product(x.to(FP8), w.to(FP8), out_scale=row, squares=row, row_scale=torch.ones(4))


# ---- machine code ------------------------------------------------------------------------------------------


@nvcc
@pytest.mark.parametrize(
    "plan",
    [
        plan_gate_up(True, 560, 16384, 2048),
        plan_gate_up(True, 968, 16384, 2048),
        plan_gate_up(False, 560, 16384, 2048),
        make_plan(False, 200),
        make_plan(True, 152),
        make_plan(True, 40, cluster=1),
    ],
)
@pytest.mark.parametrize("spin_limit", [0, 1 << 18])
def test_machine_code(tmp_path, plan, spin_limit):
    macros = plan.macros(pdl=True) | {"SPIN_LIMIT": spin_limit}
    cubin = compiled(tmp_path, gate_up.SOURCES, macros, prelude=gate_up.product_source(plan))
    code = disassembled(cubin)
    assert code.count("QGMMA" if plan.eight else "HGMMA") == 8
    assert "LDL" not in code
    assert "STL" not in code


# ---- results -----------------------------------------------------------------------------------------------


def inputs(m, features, k, eight):
    """x, W and the scales of the call; in E4M3 results spread over its range."""
    x, w = torch.randn(m, k, device="cuda"), torch.randn(2 * features, k, device="cuda") * k**-0.5
    if not eight:
        return x.bfloat16(), w.bfloat16(), {}
    x, w, rows = (x * 32).to(FP8), (w * 256).to(FP8), (torch.rand(m, device="cuda") + 0.5) / 32
    squares = (x.float() * rows[:, None]).square().sum(1)
    return x, w, {
        "row_scale": rows, "weight_scale": 1 / 256, "squares": squares, "out_factor": 0.03 / k,
        "out_scale": torch.full((m,), float("nan"), device="cuda"),
    }  # fmt: skip


def wide(got, scales):
    """The result with the scale of its rows."""
    return got if not scales else got.double() * scales["out_scale"].double()[:, None]


def reference(x, w, scales):
    return gate_up_reference(x, w, **{name: scales[name] for name in ("row_scale", "weight_scale") if name in scales})


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


class TestProduct:
    pytestmark = on_hopper

    @pytest.mark.parametrize("eight", [True, False])
    @pytest.mark.parametrize("m", [1, 37, 560, 608, 968])
    @pytest.mark.parametrize(("features", "k"), [(2048, 2048), (400, 272), (16, 144)])
    def test_agrees_with_float64(self, m, features, k, eight):
        x, w, scales = inputs(m, features, k, eight)
        got = gate_up.gate_up_product(x, w, **scales, pdl=True)
        assert got.dtype == x.dtype
        rounded = 3e-2 if got.numel() > 4096 else 6e-2  # of a few values one may round by a whole sixteenth
        assert relative(wide(got, scales), reference(x, w, scales)) < (rounded if eight else 4e-3)
        if eight:
            torch.testing.assert_close(scales["out_scale"], scales["squares"] * 0.03 / k, rtol=4e-3, atol=0)
        for _ in range(3):
            again = gate_up.gate_up_product(x, w, **scales)
            assert torch.equal(got.view(torch.uint8), again.view(torch.uint8))

    @pytest.mark.parametrize("eight", [True, False])
    @pytest.mark.parametrize("cluster", [1, 2])
    @pytest.mark.parametrize("nt", [8, 40, 136, 192, 200])
    def test_every_kind_of_plan(self, nt, cluster, eight):
        x, w, scales = inputs(417, 34 * 128 + 16, 400, eight)
        plan = make_plan(eight, nt, cluster=cluster)
        got = gate_up.gate_up_product(x, w, **scales, plan=plan)
        assert relative(wide(got, scales), reference(x, w, scales)) < (3e-2 if eight else 4e-3)

    @pytest.mark.parametrize("eight", [True, False])
    def test_what_is_not_finite_stays_so(self, eight):
        x, w, scales = inputs(100, 256, 256, eight)
        x[7, 5] = float("nan")
        w[3, 200] = float("nan")
        got = wide(gate_up.gate_up_product(x, w, **scales), scales)
        wrong = torch.zeros(100, 256, dtype=torch.bool, device="cuda")
        wrong[7], wrong[:, 3] = True, True
        assert torch.equal(torch.isnan(got), wrong)
        if not eight:
            x[7, 5], w[3, 200] = float("inf"), 0.0
            x[7, 6:], w[:, 5] = 0.0, 1.0
            assert torch.isposinf(gate_up.gate_up_product(x, w)[7]).all()
            return
        scales["squares"][9] = float("nan")
        assert torch.isnan(wide(gate_up.gate_up_product(x, w, **scales), scales)[9]).all()

    def test_rows_of_zeros_and_a_factor_too_small(self):
        x, w, scales = inputs(64, 128, 256, True)
        x[5], scales["squares"][5] = 0, 0
        got = wide(gate_up.gate_up_product(x, w, **scales), scales)
        assert not got[5].any()
        assert torch.isfinite(got).all()
        got = gate_up.gate_up_product(x, w, **scales | {"out_factor": 1e-8}).float()
        assert torch.isfinite(got).all()
        assert got.abs().amax() == 448
