"""The streaming kernel, its layers and the quantisers against their references: interpreter (float32) or GPU."""

import os
from dataclasses import replace

import pytest
import torch
from hybrid_policy.errors import InputError
from hybrid_policy.kernels import activations, fp8, nvfp4, tiles
from hybrid_policy.kernels.gate_up import NormPrologue, geglu_reference, prepare_gate_up
from hybrid_policy.kernels.linear import prepare, quantized
from hybrid_policy.kernels.norm_output import NormOutput
from hybrid_policy.kernels.nvfp4_activation import NVFP4Activation, nvfp4_dequantize, nvfp4_reference, unswizzle
from hybrid_policy.kernels.stream import StreamWeight
from hybrid_policy.kernels.stream_layers import StreamGateUp

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not GPU
DEVICE = "cuda" if GPU else "cpu"
#: The interpreter's fp32 -> bf16 conversion truncates, so outputs are float32 there.
OUT = torch.bfloat16 if GPU else torch.float32
LIMIT = 4e-3 if GPU else 1e-5
pytestmark = pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs a GPU or TRITON_INTERPRET=1")
PRECISIONS = ["bf16", "fp8_w8a8", "nvfp4_w4a16"]


def normal(*shape):
    return torch.randn(*shape, device=DEVICE)


def poison(*shape, dtype=OUT):
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


def error(got, expected):
    assert torch.isfinite(got.float()).all()
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(int.from_bytes(os.urandom(4), "little") if GPU else 0)


def every_code_and_scale():
    """[16 * 127, 16]: row 127 c + s is sixteen times code c under the E4M3 scale of byte s."""
    codes = torch.arange(16, dtype=torch.uint8).repeat_interleave(127)[:, None].expand(-1, 16)
    scales = torch.arange(127, dtype=torch.uint8).repeat(16)[:, None]
    one = torch.ones(())
    return nvfp4.NVFP4Tensor(nvfp4.pack_codes(codes.contiguous()), scales.view(torch.float8_e4m3fn).contiguous(), one)


@pytest.mark.parametrize("swap", [False, True])
def test_w4a16_returns_every_code_times_every_scale_bit_for_bit(swap):
    tensor = every_code_and_scale().to(DEVICE)
    packed = StreamWeight(tensor, None)
    identity = torch.eye(16, device=DEVICE).bfloat16()
    tile = tiles.Tile(16, 64, 128, 4, 2, swap=swap)
    out = poison(16, packed.n, dtype=torch.float32)
    packed.launch(identity, out, tile, geglu=False)
    assert torch.equal(out.T, nvfp4.dequantize(tensor))
    assert torch.equal(packed.dequantized(), nvfp4.dequantize(tensor))


SHAPES = [(1, 64, 256), (50, 96, 272), (100, 160, 256)]
if GPU:
    SHAPES += [
        (m, n, k) for m in (1, 7, 16, 50, 64, 100, 560, 968) for n, k in ((2048, 1024), (4096, 2048), (1024, 4096))
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_gate_up(precision, m, n, k):
    if precision != "nvfp4_w4a16" and m > 64 and not GPU:
        pytest.skip("cuBLAS's route needs a GPU")
    gate, up, x = normal(n // 2, k) / k**0.5, normal(n // 2, k) / k**0.5, normal(m, k).bfloat16()
    layer = StreamGateUp(*(quantized(w, precision, None) for w in (gate, up)), precision)
    out = layer(x, out=poison(m, n // 2, dtype=torch.bfloat16))
    expected = geglu_reference(x, *(w.double() for w in layer.effective_weights()), None)
    # bf16 rounding of the output (which the interpreter truncates), and FP8's of the activations.
    limit = {"fp8_w8a8": 0.08}.get(precision, 4e-3 if GPU else 6e-3)
    assert error(out, expected) < limit


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_linear_with_gated_residual(precision, m, n, k):
    if precision != "nvfp4_w4a16" and m > 64 and not GPU:
        pytest.skip("cuBLAS's route needs a GPU")
    layer = prepare(normal(n, k) / k**0.5, precision, bias=normal(n), implementation="kernel")
    x, residual, gate = normal(m, k).bfloat16(), normal(m, n).bfloat16(), normal(n)
    for _ in range(2):  # split K leaves its counters ready for the next call
        out = layer(x, out=poison(m, n), residual=residual, gate=gate)
    expected = (x.double() @ layer.effective_weight().double().T + layer.bias) * gate + residual
    assert error(out, expected) < (0.08 if precision == "fp8_w8a8" else LIMIT)


@pytest.mark.parametrize("split", [2, 4])
@pytest.mark.parametrize("fmt", ["bf16", "fp8", "nvfp4"])
def test_splits_of_k_agree_with_the_reference(fmt, split):
    m, n, k = 19, 64, 512
    wide = normal(n, k)
    weight = {"bf16": lambda: wide, "fp8": lambda: fp8.quantize(wide), "nvfp4": lambda: nvfp4.quantize(wide)}[fmt]()
    packed, x = StreamWeight(weight, None), normal(m, k).bfloat16()
    tile = tiles.Tile(32, 32, 128, 4, 2, split=split)
    out = poison(m, n)
    packed.launch(x, out, tile, geglu=False)
    seen = fp8.dequantize_activation(*fp8.quantize_activation(x, 128), 128) if fmt == "fp8" else x
    assert error(out, seen.double() @ packed.dequantized().double().T) < LIMIT


def test_changing_splits_on_one_weight_keeps_their_counters_apart():
    packed, x = StreamWeight(normal(64, 512), None), normal(16, 512).bfloat16()
    outs = []
    for split in (2, 4, 2):
        outs.append(poison(16, 64))
        packed.launch(x, outs[-1], tiles.Tile(16, 32, 128, 4, 2, split=split), geglu=False)
    assert all(torch.isfinite(out.float()).all() for out in outs)
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("bm2", [0, 16])
def test_two_token_tiles_and_bulk_copies(swap, bm2):
    if bm2 and not swap:
        pytest.skip("a second token tile goes with SWAP")
    packed = StreamWeight(nvfp4.quantize(normal(256, 512)), None)
    x, out = normal(50, 512).bfloat16(), poison(50, 128)
    tile = tiles.Tile(32, 64, 256, 4, 2, swap=swap, bm2=bm2)
    packed.launch(x, out, tile, geglu=True)
    plain = out.clone()
    if not GPU or torch.cuda.get_device_capability()[0] >= 9:
        packed.launch(x, out.fill_(float("nan")), replace(tile, tma_x=True, tma_w=True), geglu=True)
        assert error(out, plain) < LIMIT


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_bad_activations_never_become_numbers(precision, bad):
    x = normal(16, 512).bfloat16()
    x[3, 77] = bad
    linear = prepare(normal(64, 512), precision, implementation="kernel")
    out = linear(x, out=poison(16, 64))
    assert not torch.isfinite(out[3].float()).any()
    assert torch.isfinite(out[[0, 1, 2, 4]].float()).all()
    gate_up = prepare_gate_up(normal(64, 512), normal(64, 512), precision, implementation="kernel")
    h = gate_up(x)
    # GELU of -Inf is 0 in the limit and 0 * Inf is NaN: no element may be a plausible number, except exact 0.
    assert (~torch.isfinite(h[3].float()) | (h[3] == 0)).all()
    assert not torch.isfinite(h[3].float()).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_norm_in_the_kernel_and_through_the_linear_before(precision):
    m, k, f = 20, 512, 64
    gate_up = prepare_gate_up(normal(f, k) / 20, normal(f, k) / 20, precision, implementation="kernel")
    factor = (1 + 0.2 * normal(k)).bfloat16()
    shifts = gate_up.shift_rows(0.1 * normal(k))
    before = prepare(normal(k, 256) / 16, precision, implementation="kernel")
    x, residual = normal(m, 256).bfloat16(), normal(m, k).bfloat16()
    squares = torch.zeros(before.norm_tiles(m), m, device=DEVICE)
    norm_out = NormOutput(factor, poison(m, k), squares)
    h = before(x, out=poison(m, k), residual=residual, norm_out=norm_out)
    assert error(norm_out.scaled, h.double() * factor.double()) < LIMIT
    assert error(squares.sum(0), h.double().square().sum(-1)) < 1e-5
    expected = geglu_reference(
        h.bfloat16(), *(w.double() for w in gate_up.effective_weights()), NormPrologue(factor, *shifts)
    )
    limit = 0.06 if precision == "fp8_w8a8" else 1e-2  # x * factor is rounded to bf16 before the product
    assert error(gate_up(h.bfloat16(), norm=NormPrologue(factor, *shifts)), expected) < limit
    through = gate_up(norm_out.scaled.bfloat16(), norm=NormPrologue(None, *shifts, squares=squares))
    assert error(through, expected) < limit


def test_fp8_activations_from_gate_up_feed_down():
    if not GPU:
        pytest.skip("the interpreter's fp32 -> fp8 conversion is wrong")
    gate_up = prepare_gate_up(normal(512, 256) / 16, normal(512, 256) / 16, "nvfp4_w4a16")
    down = prepare(normal(128, 512) / 22, "fp8_w8a8")
    x, scale = normal(50, 256).bfloat16(), torch.tensor(0.02, device=DEVICE)
    h8 = gate_up(x, out_scale=scale)
    assert error(h8.float() * scale, gate_up(x)) < 0.04
    y = down(h8, x_scale=scale)
    assert error(y, (h8.float() * scale).double() @ down.effective_weight().double().T) < LIMIT


@pytest.mark.parametrize("k", [48, 272, 2048])
@pytest.mark.parametrize("swizzled", [False, True])
def test_nvfp4_quantiser_is_its_reference_bit_for_bit(k, swizzled):
    x = (normal(37, k) * torch.rand(37, 1, device=DEVICE).mul(8).exp()).bfloat16()
    x[3] = 0
    x[5, 7], x[6, 9] = float("nan"), float("inf")
    out = activations.quantize_nvfp4(x, NVFP4Activation.empty(37, k, DEVICE, swizzled=swizzled))
    expected = nvfp4_reference(x)
    scales = unswizzle(out.scales, 37, k // 16) if swizzled else out.scales
    assert torch.equal(scales, expected.scales)
    assert torch.equal(out.row_scale, expected.row_scale)
    good = (expected.scales != 0x7F).repeat_interleave(8, dim=1)
    assert torch.equal(out.codes[good], expected.codes[good])
    wide = nvfp4_dequantize(out)
    assert torch.isnan(wide[5, :16]).all()
    assert torch.isnan(wide[6, :16]).all()


@pytest.mark.parametrize("to", ["bf16", "fp8"])
def test_norm_and_fp8_quantiser(to):
    x, factor, shift = normal(9, 272).bfloat16(), (1 + normal(272)).bfloat16(), normal(272)
    expected = activations.norm_reference(x, factor, shift)
    if to == "bf16":
        out = activations.rms_norm(x, poison(9, 272), factor=factor, shift=shift)
        assert error(out, expected) < LIMIT
        return
    target = torch.empty(9, 272, device=DEVICE, dtype=torch.float8_e4m3fn if GPU else torch.float32)
    scale = torch.empty(9, device=DEVICE)
    activations._launch_rows(x, factor, shift, 1e-6, (target, None, scale), "fp8", False, False)
    values, scales = fp8.quantize_activation(expected)
    assert torch.equal(scale, scales[:, 0])
    assert error(target.float(), values.float()) < 1e-2


def test_arguments_that_do_not_fit_are_named():
    layer = prepare(normal(64, 128), "bf16", implementation="kernel")
    with pytest.raises(InputError, match=r"linear: x: .*contiguous \[M, 128\]"):
        layer(normal(4, 64).bfloat16())
    with pytest.raises(InputError, match=r"x\.dtype"):
        layer(normal(4, 128))
    with pytest.raises(InputError, match="residual"):
        layer(normal(4, 128).bfloat16(), gate=normal(64))
    with pytest.raises(InputError, match=r"K % 16"):
        activations.quantize_nvfp4(normal(4, 24).bfloat16(), NVFP4Activation.empty(4, 24, DEVICE, swizzled=False))
