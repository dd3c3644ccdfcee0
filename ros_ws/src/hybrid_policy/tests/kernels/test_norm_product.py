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
from hybrid_policy.kernels.norm_product import norm_product_reference

from .devices import on_hopper
from .machine_code import compiled, disassembled, nvcc

FP8 = torch.float8_e4m3fn
WIDTH = 1152


@pytest.fixture(autouse=True)
def never_hang(monkeypatch):
    monkeypatch.setattr(norm_product, "SPIN_LIMIT", 1 << 15)
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")  # what a failure shows
    torch.manual_seed(seed)


# ---- host side ---------------------------------------------------------------------------------------------


def test_what_fits():
    assert norm_product.fits((9, 0), WIDTH, WIDTH)
    assert not norm_product.fits((10, 0), WIDTH, WIDTH)
    assert not norm_product.fits((9, 0), WIDTH + 64, WIDTH)
    assert not norm_product.fits((9, 0), 2048, WIDTH)
    assert not norm_product.fits((9, 0), WIDTH, WIDTH + 8)
    stage = (64 + WIDTH // 8) * 128
    assert 227 * 1024 - stage < norm_product.shared_bytes(WIDTH) <= 227 * 1024  # and not one stage more


def test_the_reference_is_the_product_and_the_norm():
    a, w, x = torch.randn(5, 48), torch.randn(128, 48), torch.randn(5, 128)
    weight, shift, bias = torch.randn(3, 128)
    total, normed = norm_product_reference(a, w, 0.5, x, (weight, shift), bias)
    expected, h = x.clone(), torch.empty(5, 128)
    norm.add_norm_reference(expected, h, weight, shift=shift, addend=a @ w.T * 0.5, bias=bias, layer_norm=True)
    torch.testing.assert_close(total.float(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(normed.float(), h, atol=1e-4, rtol=1e-4)


def test_inputs_of_other_shapes_are_refused():
    a, w, x, v = torch.zeros(3, 256).to(FP8), torch.zeros(128, 256).to(FP8), torch.zeros(3, 128), torch.zeros(128)
    call = norm_product.norm_product
    with pytest.raises(InputError, match="a, weight"):
        call(a[:, :128].contiguous(), w, 1.0, x, (v, v), v)
    with pytest.raises(InputError, match="a, weight"):
        call(a, w[:120], 1.0, x, (v, v), v)
    with pytest.raises(InputError, match="a, weight"):
        call(a.bfloat16(), w.bfloat16(), 1.0, x, (v, v), v)
    with pytest.raises(InputError, match="norm_product: x"):
        call(a, w, 1.0, x.bfloat16(), (v, v), v)
    with pytest.raises(InputError, match="norm shift"):
        call(a, w, 1.0, x, (v, v[1:]), v)
    with pytest.raises(InputError, match=r"bias.*multiple of 16"):
        call(a, w, 1.0, x, (v, v), torch.zeros(129)[1:])


# ---- machine code ------------------------------------------------------------------------------------------


@nvcc
@pytest.mark.parametrize("spin_limit", [0, 1 << 15])
@pytest.mark.parametrize("n", [128, WIDTH])
def test_machine_code(tmp_path, n, spin_limit):
    macros = norm_product.macros(n, pdl=True) | {"SPIN_LIMIT": spin_limit}
    code = disassembled(compiled(tmp_path, norm_product.SOURCES, macros, prelude=norm_product.prelude(n)))
    assert code.count("QGMMA") == 4
    assert len(re.findall(r"STAS\.128", code)) == 2  # a row pair to eight blocks: two stores for each of four lanes
    assert not re.search(r"MEMBAR\.(SC|ALL)\.(GPU|SYS)", code)  # nothing waits for its stores


# ---- the protocol, on a CPU --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """norm_product.cu as a program of this machine, its asm in emulated_cluster.h's words; 128 columns."""
    source, folder = norm_product.SOURCES[-1].read_text(), tmp_path_factory.mktemp("emulated")
    for name in ("void load2(", "float2 shared2("):
        source = re.sub(
            r"__device__[^\n]*" + re.escape(name) + r"(?:[^\n]*\}\n|.*?\n\}\n)", "", source, count=1, flags=re.S
        )
    store = r'asm volatile\("st\.shared\.u16 \[%0\], %1;" ::"r"\(at\), "h"\((.*?\))\) : "memory"\);'
    source = re.sub(store, r"store_shared(at, \1);", source)
    source = source.replace("extern __shared__ __align__(1024) u8 memory[];", "u8* memory = nullptr;")
    assert "asm" not in source
    (folder / "kernel.inc").write_text(source)
    macros = [f"-D{key}={value}" for key, value in norm_product.macros(128, pdl=True).items()]
    here, program = Path(__file__).parent, folder / "emulated"
    options = ["-O1", "-std=c++17", "-w", *macros, f"-I{folder}"]
    subprocess.run(["g++", *options, "-o", program, here / "emulated_norm_product.cpp"], check=True)
    return program


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("m", "k"), [(70, 1168), (37, 656), (20, 16)]
)  # a ring that turns over, that does not; a stage
def test_threads_in_any_order_agree_with_double(emulated, m, k):
    for seed in range(3):
        done = subprocess.run([emulated, str(m), str(k), str(seed)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


# ---- results -----------------------------------------------------------------------------------------------


def inputs(m, k, n=WIDTH):
    """Operands, the scale of their product, the residual with a mean and rows of very different size, and vectors."""
    a, w = (torch.randn(m, k, device="cuda") * 4).to(FP8), (torch.randn(n, k, device="cuda") * 4).to(FP8)
    x = (torch.randn(m, n, device="cuda") + 3) * torch.logspace(-2, 2, m, device="cuda")[:, None]
    weight, shift, bias = torch.randn(3, n, device="cuda")
    return a, w, k**-0.5 / 16, x, (weight, shift), bias


def relative(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def worst_row(got, expected):
    return float(((got.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


#: of x: E4M3's products are summed to few digits; and of h, by its rounding
SUMS, ROUNDED = 4e-3, 5e-2


class TestNormProduct:
    pytestmark = on_hopper

    @pytest.mark.parametrize("m", [1, 37, 64, 200, 512, 768])
    @pytest.mark.parametrize("k", [16, 144, WIDTH])
    @pytest.mark.parametrize("n", [128, 256, WIDTH])
    def test_agrees_with_float64(self, m, k, n):
        given = inputs(m, k, n)
        total, normed = norm_product_reference(*given)
        a, w, scale, x, vectors, bias = given
        fresh = x.clone()
        h = norm_product.norm_product(a, w, scale, fresh, vectors, bias, pdl=True)
        assert worst_row(fresh, total) < SUMS
        assert worst_row(h.float(), normed) < ROUNDED
        for _ in range(3):
            again = x.clone()
            other = norm_product.norm_product(a, w, scale, again, vectors, bias)
            assert torch.equal(again, fresh)
            assert torch.equal(other.view(torch.uint8), h.view(torch.uint8))

    def test_a_mean_far_from_zero_costs_nothing(self):
        a, w, scale, x, vectors, bias = inputs(100, 256)
        x += 3000 * x.std(1, keepdim=True)  # the sum of squares alone would lose all of its digits
        _, normed = norm_product_reference(a, w, scale, x, vectors, bias)
        h = norm_product.norm_product(a, w, scale, x, vectors, bias)
        assert worst_row(h.float(), normed) < ROUNDED

    def test_nan_stays_in_its_row(self):
        a, w, scale, x, vectors, bias = inputs(200, 272)
        a[3, 100], x[70, 1151], x[199, 0] = float("nan"), float("nan"), float("inf")
        h = norm_product.norm_product(a, w, scale, x, vectors, bias).float()
        wrong = torch.zeros(200, WIDTH, dtype=torch.bool, device="cuda")
        wrong[[3, 70, 199]] = True
        assert torch.equal(torch.isnan(h), wrong)

    def test_what_lies_behind_the_rows_stays(self):
        a, w, scale, x, vectors, bias = inputs(70, 256)
        stream = torch.full((200, WIDTH), float("nan"), device="cuda")
        stream[:70] = x
        total, _ = norm_product_reference(a, w, scale, x, vectors, bias)
        norm_product.norm_product(a, w, scale, stream[:70], vectors, bias, pdl=True)
        assert worst_row(stream[:70], total) < SUMS
        assert torch.isnan(stream[70:]).all()

    def test_a_chain_of_dependent_launches(self):
        """Each reads what the one before wrote, and starts before that has ended."""
        layers, m = 6, 512
        first, h = torch.randn(m, WIDTH, device="cuda"), torch.randn(m, WIDTH, device="cuda").to(FP8)
        vectors = [torch.randn(3, WIDTH, device="cuda") for _ in range(layers)]
        weights = [(torch.randn(WIDTH, WIDTH, device="cuda") * 4).to(FP8) for _ in range(layers)]

        def run(own):
            x, now = first.clone(), h
            for w, (weight, shift, bias) in zip(weights, vectors, strict=True):
                scale = WIDTH**-0.5 / 4
                if own:
                    now = norm_product.norm_product(now, w, scale, x, (weight, shift), bias, pdl=True)
                else:
                    total, normed = norm_product_reference(now, w, scale, x, (weight, shift), bias)
                    x, now = total.float(), normed.to(FP8)
            return x

        expected, got = run(own=False), run(own=True)
        assert relative(got, expected.double()) < 3e-2
        for _ in range(5):
            assert torch.equal(run(own=True), got)

    def test_agrees_with_the_launches_it_replaces(self):
        a, w, scale, x, vectors, bias = inputs(512, WIDTH)
        apart, h = x.clone(), torch.empty(512, WIDTH, dtype=FP8, device="cuda")
        y = (a.float() @ w.float().T * scale).bfloat16()
        norm.add_norm(apart, h, vectors[0], shift=vectors[1], addend=y, bias=bias, layer_norm=True)
        ours = norm_product.norm_product(a, w, scale, x, vectors, bias)
        assert relative(x, apart.double()) < 5e-3
        assert relative(ours.float(), h.double()) < 3e-2
