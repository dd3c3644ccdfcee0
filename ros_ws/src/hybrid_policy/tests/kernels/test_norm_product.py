"""A product with the residual and the LayerNorm behind it: plans, machine code, and on a Hopper GPU results."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hybrid_policy.errors import InputError
from hybrid_policy.kernels import norm, norm_product
from hybrid_policy.kernels.norm_product import NormPlan, norm_product_reference, plan_norm

from .machine_code import compiled, disassembled, nvcc

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
WIDTH = 1152
PLANS = [
    NormPlan(rows, spread, stages, halves)
    for rows, halves in ((64, 1), (64, 2), (128, 1))
    for spread, stages in ((False, 3), (True, 3), (True, 8))
]


@pytest.fixture(autouse=True)
def never_hang(monkeypatch):
    monkeypatch.setattr(norm_product, "SPIN_LIMIT", 1 << 15)
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")  # what a failure shows
    torch.manual_seed(seed)


# ---- plans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "rows"), [(1, 64), (512, 64), (768, 64), (960, 64), (1024, 128)])
def test_tiles_are_as_small_as_the_device_holds_at_once(m, rows):
    assert plan_norm(m, WIDTH).rows == rows
    assert plan_norm(m, WIDTH, processors=264).rows == 64


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("n", [128, 256, WIDTH])
@pytest.mark.parametrize("out_size", [1, 2])
def test_plans_fit_a_block(plan, n, out_size):
    stages = plan.depth(n, out_size)
    assert 3 <= stages <= plan.stages
    assert plan.shared(n, stages, out_size) <= norm_product.SHARED
    assert plan.shared(n, stages, out_size) % 8 == 0
    assert plan.columns(n) % 8 == 0
    assert plan.threads in (160, 288)


def test_what_fits():
    assert norm_product.fits((9, 0), WIDTH, 4352)
    assert not norm_product.fits((10, 0), WIDTH, 4352)
    assert not norm_product.fits((9, 0), WIDTH + 64, 4352)
    assert not norm_product.fits((9, 0), 2048, 4352)
    assert not norm_product.fits((9, 0), WIDTH, 4360)


def test_the_reference_is_the_product_and_the_norm():
    a, w, x = torch.randn(5, 48), torch.randn(128, 48), torch.randn(5, 128)
    weight, shift, bias = torch.randn(3, 128)
    total, normed = norm_product_reference(a, w, 0.5, x, (weight, shift), bias)
    expected, h = x.clone(), torch.empty(5, 128)
    norm.add_norm_reference(expected, h, weight, shift=shift, addend=a @ w.T * 0.5, bias=bias, layer_norm=True)
    torch.testing.assert_close(total.float(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(normed.float(), h, atol=1e-4, rtol=1e-4)


def test_inputs_of_other_shapes_are_refused():
    a, w, x, v = torch.zeros(3, 256).bfloat16(), torch.zeros(128, 256).bfloat16(), torch.zeros(3, 128), torch.zeros(128)
    call = norm_product.norm_product
    with pytest.raises(InputError, match="a, weight"):
        call(a[:, :128].contiguous(), w, 1.0, x, (v, v), v, BF16)
    with pytest.raises(InputError, match="a, weight"):
        call(a, w[:120], 1.0, x, (v, v), v, BF16)
    with pytest.raises(InputError, match="norm_product: x"):
        call(a, w, 1.0, x.bfloat16(), (v, v), v, BF16)
    with pytest.raises(InputError, match="norm shift"):
        call(a, w, 1.0, x, (v, v[1:]), v, BF16)
    with pytest.raises(InputError, match=r"bias.*multiple of 16"):
        call(a, w, 1.0, x, (v, v), torch.zeros(129)[1:], BF16)
    with pytest.raises(InputError, match="dtype"):
        call(a, w, 1.0, x, (v, v), v, torch.float16)


# ---- machine code ------------------------------------------------------------------------------------------


@nvcc
@pytest.mark.parametrize("spin_limit", [0, 1 << 15])
@pytest.mark.parametrize(
    ("plan", "n", "size", "out_size"),
    [
        (plan_norm(512, WIDTH), WIDTH, 1, 1),
        (plan_norm(512, 4352), WIDTH, 1, 1),
        (plan_norm(512, 4352), WIDTH, 1, 2),
        (plan_norm(512, 2 * WIDTH), WIDTH, 2, 2),
        (NormPlan(128, True), WIDTH, 2, 2),
        (NormPlan(64, False, halves=2), WIDTH, 1, 1),
        (NormPlan(128, False), 128, 1, 1),
    ],
)
def test_machine_code(tmp_path, plan, n, size, out_size, spin_limit):
    macros = plan.macros(n, size, out_size, pdl=True) | {"SPIN_LIMIT": spin_limit}
    cubin = compiled(tmp_path, norm_product.SOURCES, macros, prelude=norm_product.product_source(plan, n, size))
    code = disassembled(cubin)
    assert code.count("QGMMA" if size == 1 else "HGMMA") == 4
    assert len(re.findall(r"STAS\.128", code)) == 2  # a row pair to eight blocks: two stores for each of four lanes
    assert code.count("UTMALDG.2D.MULTICAST") == (2 if plan.spread else 0)
    assert not re.search(r"MEMBAR\.(SC|ALL)\.(GPU|SYS)", code)  # nothing waits for its stores


# ---- the protocol, on a CPU --------------------------------------------------------------------------------


def emulated(folder, plan, n, size, out_size):
    """norm_product.cu as a program of this machine, its asm in emulated_cluster.h's words."""
    source = norm_product.SOURCES[-1].read_text()
    for name in ("void cluster_arrive()", "void cluster_wait()", "void load2(", "float2 shared2(", "float4 shared4("):
        source = re.sub(
            r"__device__[^\n]*" + re.escape(name) + r"(?:[^\n]*\}\n|.*?\n\}\n)", "", source, count=1, flags=re.S
        )
    stores = r'asm volatile\("st\.shared\.u(\d+) \[%0\], %1;" ::"r"\(at\), "[hr]"\((.*?\))\) : "memory"\);'
    source = re.sub(stores, lambda found: f"store_shared(at, {found[2]}, {int(found[1]) // 8});", source)
    source = source.replace("extern __shared__ __align__(1024) u8 memory[];", "u8* memory = nullptr;")
    assert "asm" not in source
    (folder / "kernel.inc").write_text(source)
    macros = [f"-D{key}={value}" for key, value in plan.macros(n, size, out_size, pdl=True).items()]
    here, program = Path(__file__).parent, folder / "emulated"
    command = [
        "g++",
        "-O1",
        "-std=c++17",
        "-w",
        "-Wno-psabi",
        *macros,
        f"-I{folder}",
        "-o",
        program,
        here / "emulated_norm_product.cpp",
    ]
    subprocess.run(command, check=True)
    return program


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("plan", "size", "out_size", "m", "k"),
    [
        (NormPlan(64, False, 3, 1), 1, 1, 70, 656),
        (NormPlan(64, True, 3, 1), 2, 1, 70, 336),
        (NormPlan(64, False, 3, 2), 2, 2, 37, 336),
        (NormPlan(64, True, 3, 2), 1, 2, 37, 656),
        (NormPlan(128, True, 3, 1), 1, 1, 130, 144),
        (NormPlan(128, False, 8, 1), 2, 2, 20, 16),
    ],
)
def test_threads_in_any_order_agree_with_double(tmp_path, plan, size, out_size, m, k):
    program = emulated(tmp_path, plan, 128, size, out_size)
    for seed in range(3):
        done = subprocess.run([program, str(m), str(k), str(seed)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


# ---- results -----------------------------------------------------------------------------------------------


def inputs(m, k, dtype, n=WIDTH):
    """Operands, the scale of their product, the residual with a mean and rows of very different size, and vectors."""
    a, w = (torch.randn(m, k, device="cuda") * 4).to(dtype), (torch.randn(n, k, device="cuda") * 4).to(dtype)
    x = (torch.randn(m, n, device="cuda") + 3) * torch.logspace(-2, 2, m, device="cuda")[:, None]
    weight, shift, bias = torch.randn(3, n, device="cuda")
    return a, w, k**-0.5 / 16, x, (weight, shift), bias


def relative(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def worst_row(got, expected):
    return float(((got.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


#: of x, by what the operands are: E4M3's products are summed to fewer digits; and of h, by what it is
SUMS, ROUNDED = {BF16: 5e-4, FP8: 4e-3}, {BF16: 5e-3, FP8: 5e-2}


@pytest.mark.parametrize("dtype", [BF16, FP8])
class TestNormProduct:
    pytestmark = hopper

    @pytest.mark.parametrize("m", [1, 37, 64, 200, 512, 768])
    @pytest.mark.parametrize("k", [16, 144, WIDTH, 4352])
    def test_agrees_with_float64(self, m, k, dtype):
        a, w, scale, x, vectors, bias = inputs(m, k, dtype)
        total, normed = norm_product_reference(a, w, scale, x, vectors, bias)
        for out in (BF16, FP8):
            fresh = x.clone()
            h = norm_product.norm_product(a, w, scale, fresh, vectors, bias, out, pdl=True)
            assert h.dtype == out
            assert worst_row(fresh, total) < SUMS[dtype]
            assert worst_row(h.float(), normed) < ROUNDED[out]
            for _ in range(3):
                again = x.clone()
                other = norm_product.norm_product(a, w, scale, again, vectors, bias, out)
                assert torch.equal(again, fresh)
                assert torch.equal(other.view(torch.uint8), h.view(torch.uint8))

    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize(("m", "n"), [(150, WIDTH), (600, WIDTH), (77, 256)])
    def test_every_kind_of_plan(self, plan, m, n, dtype):
        for k in (16, 400, 1200):  # one stage, fewer than the ring has, a ring that turns over
            a, w, scale, x, vectors, bias = inputs(m, k, dtype, n)
            total, normed = norm_product_reference(a, w, scale, x, vectors, bias)
            h = norm_product.norm_product(a, w, scale, x, vectors, bias, dtype, plan=plan, pdl=True)
            assert worst_row(x, total) < SUMS[dtype]
            assert worst_row(h.float(), normed) < ROUNDED[dtype]

    def test_a_mean_far_from_zero_costs_nothing(self, dtype):
        a, w, scale, x, vectors, bias = inputs(100, 256, dtype)
        x += 1000 * x.std(1, keepdim=True)  # the sum of squares alone would lose six of seven digits
        _, normed = norm_product_reference(a, w, scale, x, vectors, bias)
        h = norm_product.norm_product(a, w, scale, x, vectors, bias, BF16)
        assert worst_row(h.float(), normed) < 5e-3

    def test_nan_stays_in_its_row(self, dtype):
        a, w, scale, x, vectors, bias = inputs(200, 272, dtype)
        a[3, 100], x[70, 1151], x[199, 0] = float("nan"), float("nan"), float("inf")
        for out in (BF16, FP8):
            h = norm_product.norm_product(a, w, scale, x.clone(), vectors, bias, out).float()
            wrong = torch.zeros(200, WIDTH, dtype=torch.bool, device="cuda")
            wrong[[3, 70, 199]] = True
            assert torch.equal(torch.isnan(h), wrong)

    def test_what_lies_behind_the_rows_stays(self, dtype):
        a, w, scale, x, vectors, bias = inputs(70, 256, dtype)
        whole = torch.full((200, WIDTH), float("nan"), device="cuda")
        whole[:70] = x
        total, _ = norm_product_reference(a, w, scale, x, vectors, bias)
        for plan in PLANS:
            stream = whole.clone()
            norm_product.norm_product(a, w, scale, stream[:70], vectors, bias, dtype, plan=plan, pdl=True)
            assert worst_row(stream[:70], total) < SUMS[dtype]
            assert torch.isnan(stream[70:]).all()

    def test_a_chain_of_dependent_launches(self, dtype):
        """As vision runs them: each reads what the one before wrote, and starts before that has ended."""
        layers, m = 6, 512
        first, h = torch.randn(m, WIDTH, device="cuda"), torch.randn(m, WIDTH, device="cuda").to(dtype)
        vectors = [torch.randn(3, WIDTH, device="cuda") for _ in range(layers)]
        weights = [(torch.randn(WIDTH, WIDTH, device="cuda") * 4).to(dtype) for _ in range(layers)]

        def run(own):
            x, now = first.clone(), h
            for w, (weight, shift, bias) in zip(weights, vectors, strict=True):
                scale = WIDTH**-0.5 / 4
                if own:
                    now = norm_product.norm_product(now, w, scale, x, (weight, shift), bias, dtype, pdl=True)
                else:
                    total, normed = norm_product_reference(now, w, scale, x, (weight, shift), bias)
                    x, now = total.float(), normed.to(dtype)
            return x

        expected, got = run(own=False), run(own=True)
        assert relative(got, expected.double()) < (3e-2 if dtype == FP8 else 6e-3)
        for _ in range(5):
            assert torch.equal(run(own=True), got)

    def test_agrees_with_the_launches_it_replaces(self, dtype):
        a, w, scale, x, vectors, bias = inputs(512, WIDTH, dtype)
        apart = x.clone()
        h = torch.empty(512, WIDTH, dtype=BF16, device="cuda")
        y = (a.float() @ w.float().T * scale).bfloat16()
        norm.add_norm(apart, h, vectors[0], shift=vectors[1], addend=y, bias=bias, layer_norm=True)
        ours = norm_product.norm_product(a, w, scale, x, vectors, bias, BF16)
        assert relative(x, apart.double()) < 5e-3
        assert relative(ours, h.double()) < 1e-2
