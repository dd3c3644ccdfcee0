"""Hopper's kernels in CUDA C++: the order of their weights, their machine code, and on a GPU their results."""

import os
import random

import pytest
import torch
from hybrid_policy.kernels import fp8, nvfp4, wgmma, wgmma_linear, wgmma_packing, wgmma_tiles
from hybrid_policy.kernels.gate_up import NormPrologue, geglu_reference, prepare_gate_up
from hybrid_policy.kernels.linear import prepare
from hybrid_policy.kernels.wgmma_tiles import WgmmaTile

from .devices import HOPPER, on_hopper
from .machine_code import compiled, disassembled, loop_instructions, nvcc

TOKENS = (1, 7, 16, 50, 64, 100, 560, 968)


@pytest.fixture(autouse=True)
def never_hang(monkeypatch):
    monkeypatch.setattr(wgmma_linear, "SPIN_LIMIT", 1 << 22)
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))


def normal(*shape):
    return torch.randn(*shape, device="cuda" if HOPPER else "cpu")


def poison(*shape, dtype=torch.bfloat16):
    return torch.full(shape, float("nan"), device="cuda", dtype=dtype)


def error(got, expected):
    assert torch.isfinite(got.float()).all()
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def every_scale(n, k):
    """Random codes; the first 127 groups have every E4M3 scale."""
    tensor = nvfp4.quantize(torch.randn(n, k) * torch.rand(n, 1).mul(8).exp(), rule="max")
    scales = tensor.scales.view(torch.uint8).clone()
    scales.view(-1)[:127] = torch.arange(127, dtype=torch.uint8)
    return nvfp4.NVFP4Tensor(tensor.codes, scales.view(torch.float8_e4m3fn), torch.ones(()))


def test_packing_has_its_inverse():
    for n, k in ((200, 208), (512, 64), (8, 16)):
        tensor = every_scale(max(n, 16 if k > 16 else 8), k) if n * k >= 127 * 16 else nvfp4.quantize(torch.randn(n, k))
        slabs = wgmma_packing.pack(tensor)
        assert slabs.shape == (-(-n // 512) * 4, -(-k // 64), wgmma_packing.SLAB)
        back = wgmma_packing.unpack(slabs, *tensor.shape, tensor.global_scale)
        assert torch.equal(nvfp4.dequantize(back), nvfp4.dequantize(tensor))


def bfloat(bits):
    magnitude = torch.tensor([(bits & 0x7FFF) << 16], dtype=torch.int32).view(torch.float32).item()
    return -magnitude if bits & 0x8000 else magnitude


def test_a_thread_decodes_its_share_of_the_register_operand():
    """The kernel's ``decode`` in Python, against PTX's layout of matrix A of wgmma m64k16."""
    n, k = 200, 208
    tensor = every_scale(n, k)
    dense, slabs = nvfp4.dequantize(tensor), wgmma_packing.pack(tensor)
    mask, choose = 0x81C081C0, random.Random(0)
    for _ in range(300):
        slab, chunk, half = choose.randrange(2), choose.randrange(slabs.shape[1]), choose.randrange(2)
        thread, step = choose.randrange(128), choose.randrange(4)
        warp, g, q = thread // 32, thread % 32 // 4, thread % 4
        block = slabs[slab, chunk]
        word = int(block[half * 2048 + thread * 16 + step * 4 :][:4].clone().view(torch.int32)[0]) & 0xFFFFFFFF
        at = 4096 + half * 256 + (warp * 8 + g) * 8 + step * 2
        pair = (int(block[at]) | int(block[at + 1]) << 16) * 16 + 0x76807680
        operand = [
            word & mask,
            ((word << 3) ^ (word << 2)) & mask,
            (word << 6) & mask,
            ((word << 1) ^ (word >> 4)) & mask,
        ]
        for register, bits in enumerate(operand):
            for element in range(2):
                scale = bfloat(pair >> 16 if register % 2 else pair & 0xFFFF)
                value = bfloat(bits >> 16 * element & 0xFFFF) * scale * 128
                row = slab * 128 + half * 64 + warp * 16 + g + 8 * (register % 2)
                column = chunk * 64 + step * 16 + register // 2 * 8 + 2 * q + element
                assert value == (dense[row, column] if row < n and column < k else 0.0)


@pytest.mark.parametrize(("n", "k"), [(8192, 1024), (32768, 2048), (2048, 1040), (96, 272), (16, 16)])
def test_tiles_fit(n, k):
    for m in (*TOKENS, 33, 200, 700, 5000):
        tile = wgmma_tiles.gate_up_tile(m, n, k)
        limit = wgmma_tiles.SHARED if tile.blocks == 1 else wgmma_tiles.SHARED_OF_TWO
        assert tile.stages >= 1
        assert tile.shared_bytes(fp8_out=False, squares=True) <= limit
        assert tile.nt % (16 if tile.multicast else 8) == 0
        assert tile.split == 1 or (tile.mt == 1 and -(-k // 64) % 2 == 0)
        linear = wgmma_tiles.linear_tile(m, n, k)
        assert linear is None or (m <= 64 and linear.cluster * linear.groups * 128 == k)


@nvcc
@pytest.mark.parametrize(
    ("m", "n", "k", "most"), [(50, 8192, 1024, 4.5), (50, 32768, 2048, 4.5), (560, 32768, 2048, 3.5)]
)
@pytest.mark.parametrize("extras", [False, True])
def test_gate_up_compiles_without_spilling(tmp_path, m, n, k, most, extras):
    tile = wgmma_tiles.gate_up_tile(m, n, k)
    options = wgmma.macros(tile, k // 64, fp8_out=extras, squares=extras, shifts=extras, pdl=True)
    code = disassembled(compiled(tmp_path, wgmma.SOURCES, options, prelude=wgmma.product_source(tile.nt)))
    assert f"HGMMA.64x{tile.nt}x16" in code
    # two chunks of 64 columns an iteration, 16 rows of each product a warp: everything in the loop, not decode alone
    assert loop_instructions(code) / (2 * 64 * 16 * tile.mt / 32) < most


@nvcc
@pytest.mark.parametrize(("m", "given"), [(50, False), (50, True), (64, False)])
def test_down_compiles_without_spilling(tmp_path, m, given):
    tile = wgmma_tiles.linear_tile(m, 1024, 4096)
    options = wgmma_linear.macros(
        tile, given=given, bias=False, gate=torch.float32, residual=torch.bfloat16, out=torch.bfloat16, pdl=True
    )
    prelude = wgmma_linear.product_source(tile.nt)
    code = disassembled(compiled(tmp_path, wgmma_linear.SOURCES, options, prelude=prelude))
    assert f"QGMMA.64x{tile.nt}x32" in code


class TestOnTheGPU:
    pytestmark = on_hopper

    def test_identity_gives_back_every_code_and_scale_bit_for_bit(self):
        """gelu(g) u with g = 32 (so that gelu is the identity) in the gate's rows."""
        k = 256
        up = every_scale(256, k).to("cuda")
        gate = nvfp4.quantize(torch.full((256, k), 32.0, device="cuda"))
        layer = prepare_gate_up(gate, up, "nvfp4_w4a16")
        assert isinstance(layer, wgmma.WgmmaGateUp)
        assert torch.equal(layer.effective_weights()[1], nvfp4.dequantize(up))
        out = layer(torch.eye(k, device="cuda").bfloat16())
        expected = nvfp4.dequantize(up).T * nvfp4.dequantize(gate)[0, 0]
        assert torch.equal(out, expected.bfloat16())

    @pytest.mark.parametrize("m", TOKENS)
    @pytest.mark.parametrize(("n", "k"), [(2048, 1024), (8192, 1024), (4096, 2048), (336, 272)])
    def test_gate_up(self, m, n, k):
        gate, up, x = normal(n // 2, k) / k**0.5, normal(n // 2, k) / k**0.5, normal(m, k).bfloat16()
        gate, up = (nvfp4.quantize(w, rule="max") for w in (gate, up))
        layer = prepare_gate_up(gate, up, "nvfp4_w4a16")
        expected = geglu_reference(x, *(w.double() for w in layer.effective_weights()), None)
        for pdl in (False, True):
            assert error(layer(x, out=poison(m, n // 2), pdl=pdl), expected) < 4e-3

    @pytest.mark.parametrize("m", [50, 560])
    def test_prefix_size(self, m):
        n, k = 32768, 2048
        x = normal(m, k).bfloat16()
        layer = prepare_gate_up(*(nvfp4.quantize(normal(n // 2, k) / 45, rule="max") for _ in range(2)), "nvfp4_w4a16")
        expected = geglu_reference(x, *(w.double() for w in layer.effective_weights()), None)
        assert error(layer(x, out=poison(m, n // 2)), expected) < 4e-3

    @pytest.mark.parametrize(
        "tile",
        [
            WgmmaTile(mt=1, nt=56, stages=4, split=2, blocks=2),
            WgmmaTile(mt=1, nt=56, stages=3, group=2, blocks=2),
            WgmmaTile(mt=1, nt=64, stages=3, group=1, multicast=True),
            WgmmaTile(mt=2, nt=56, stages=5),
            WgmmaTile(mt=2, nt=56, stages=3, group=1, buffers=4),
            WgmmaTile(mt=2, nt=64, stages=5, group=2, multicast=True),
            WgmmaTile(mt=2, nt=176, stages=4, group=1, multicast=True),
            WgmmaTile(mt=2, nt=192, stages=4, group=1),
        ],
    )
    def test_every_kind_of_tile(self, tile):
        m, n, k = 300, 2048, 576 if tile.split == 1 else 640
        gate, up = (nvfp4.quantize(normal(n // 2, k) / k**0.5, rule="max") for _ in range(2))
        layer, x = prepare_gate_up(gate, up, "nvfp4_w4a16"), normal(m, k).bfloat16()
        expected = geglu_reference(x, *(w.double() for w in layer.effective_weights()), None)
        out = poison(m, n // 2)
        for _ in range(3):
            layer.packed.launch(x, out.fill_(float("nan")), tile)
            assert error(out, expected) < 4e-3

    @pytest.mark.parametrize("m", [20, 300])
    def test_norm_and_fp8_output(self, m):
        f, k = 256, 512
        layer = prepare_gate_up(*(nvfp4.quantize(normal(f, k) / 20, rule="max") for _ in range(2)), "nvfp4_w4a16")
        x = normal(m, k).bfloat16()
        norm = NormPrologue(None, *layer.shift_rows(0.1 * normal(k)), squares=torch.rand(4, m, device="cuda") * k)
        expected = geglu_reference(x, *(w.double() for w in layer.effective_weights()), norm)
        assert error(layer(x, norm=norm), expected) < 4e-3
        scale = expected.abs().max().float() / 448
        out = layer(x, norm=norm, out_scale=scale)
        assert out.dtype == torch.float8_e4m3fn
        assert error(out.float() * scale, expected) < 0.04

    @pytest.mark.parametrize("m", [m for m in TOKENS if m <= 64])
    @pytest.mark.parametrize(("n", "k"), [(1024, 4096), (2560, 1024), (1024, 2048), (72, 256)])
    @pytest.mark.parametrize("given", [False, True])
    def test_fp8_linear(self, m, n, k, given):
        layer = prepare(normal(n, k) / k**0.5, "fp8_w8a8", bias=normal(n))
        x, residual, gate = normal(m, k).bfloat16(), normal(m, n).bfloat16(), normal(n)
        values, scales = fp8.quantize_activation(x, k if given else 128)
        seen = fp8.dequantize_activation(values, scales, k if given else 128)
        plain = seen.double() @ layer.effective_weight().double().T + layer.bias
        arguments = {"x_scale": scales.reshape(-1)} if given else {}
        tile = wgmma_tiles.linear_tile(m, n, k)
        for pdl in (False, True):
            if given:
                out = poison(m, n)
                wgmma_linear.launch(
                    layer.packed.weight, layer.packed.row_scale, values, out, tile, bias=layer.bias, pdl=pdl,
                    residual=residual, gate=gate, **arguments,
                )  # fmt: skip
            else:
                out = layer(x, out=poison(m, n), residual=residual, gate=gate, pdl=pdl)
            assert error(out, plain * gate + residual) < 4e-3
        wide = layer(x, out=poison(m, n, dtype=torch.float32), residual=residual.float(), gate=gate.bfloat16())
        if not given:
            assert error(wide, plain * gate.bfloat16() + residual) < 4e-4  # FP8 products keep some 14 bits

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_bad_activations_never_become_numbers(self, bad):
        for m in (16, 100):
            x = normal(m, 512).bfloat16()
            x[3, 77] = bad
            h = prepare_gate_up(normal(64, 512), normal(64, 512), "nvfp4_w4a16")(x)
            assert (~torch.isfinite(h[3].float()) | (h[3] == 0)).all()
            assert not torch.isfinite(h[3].float()).all()
            assert torch.isfinite(h[[0, 1, 2, 4, 15]].float()).all()
        y = prepare(normal(64, 512), "fp8_w8a8")(x[:16].contiguous())
        assert not torch.isfinite(y[3].float()).any()
        assert torch.isfinite(y[[0, 1, 2, 4]].float()).all()
