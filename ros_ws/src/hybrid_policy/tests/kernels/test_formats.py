"""NVFP4 and FP8: roundings, scale search, packing and its inverse, checkpoint forms. Plain PyTorch, any machine."""

import math

import pytest
import torch
from hybrid_policy.errors import InputError
from hybrid_policy.kernels import checkpoint_formats, fp8, nvfp4, packing
from hybrid_policy.kernels.nvfp4_activation import nvfp4_dequantize, nvfp4_reference, swizzle, unswizzle
from hybrid_policy.kernels.nvfp4_gptq import hessian, quantize_gptq
from hypothesis import given, settings
from hypothesis import strategies as st


def decibels(weight, rounded):
    return 10 * math.log10(weight.square().sum() / (weight - rounded).square().sum())


def gaussian(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def heavy_tailed(*shape):
    """Student t with 4 degrees of freedom, unit variance."""
    g = torch.Generator().manual_seed(2)
    chi = torch.randn(4, *shape, generator=g).square().sum(0)
    return torch.randn(*shape, generator=g) / (chi / 4).sqrt() / math.sqrt(2)


def test_ties_go_to_the_even_code():
    given_values = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 7.0, 0.0, -0.2])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, 6.0, 0.0, -0.0])
    assert torch.equal(nvfp4.decode_e2m1(nvfp4.encode_e2m1(given_values)), expected)
    assert torch.equal(nvfp4._round_e2m1(given_values), expected)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-8, 8, width=32), min_size=16, max_size=16))
def test_encoding_is_the_nearest_value(values):
    x = torch.tensor(values)
    table = torch.tensor(nvfp4.E2M1_VALUES)
    best = (x.abs().clamp(max=6)[:, None] - table).abs().min(-1).values
    assert torch.equal((x.abs().clamp(max=6) - nvfp4.decode_e2m1(nvfp4.encode_e2m1(x)).abs()).abs(), best)


@pytest.mark.parametrize("draw", [gaussian, heavy_tailed])
def test_the_scale_sweep_reaches_its_bar(draw):
    weight = draw(256, 1024)
    swept = decibels(weight, nvfp4.dequantize(nvfp4.quantize(weight)))
    plain = decibels(weight, nvfp4.dequantize(nvfp4.quantize(weight, rule="max")))
    assert swept >= 21.5
    assert swept > plain + 0.8


def test_no_e4m3_scale_beats_the_swept_one():
    weight = heavy_tailed(8, 64)
    tensor = nvfp4.quantize(weight)
    groups = (weight / tensor.global_scale).reshape(8, 4, 16)
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    errors = torch.stack([(nvfp4._round_e2m1(groups / s) * s - groups).square().sum(-1) for s in every])
    got = (nvfp4.dequantize(tensor) / tensor.global_scale).reshape(8, 4, 16)
    torch.testing.assert_close((got - groups).square().sum(-1), errors.min(0).values, rtol=1e-5, atol=1e-4)


def test_importance_moves_the_error_to_where_it_matters_less():
    weight, importance = gaussian(64, 256), torch.ones(256)
    importance[::4] = 100.0
    weighted = nvfp4.dequantize(nvfp4.quantize(weight, importance=importance)) - weight
    plain = nvfp4.dequantize(nvfp4.quantize(weight)) - weight
    assert weighted[:, ::4].square().sum() < plain[:, ::4].square().sum()


def test_gptq_lowers_the_output_error_on_correlated_inputs():
    g = torch.Generator().manual_seed(5)
    mix = torch.randn(8, 128, generator=g)
    size = torch.randn(128, generator=g).exp()

    def inputs(m):
        return (torch.randn(m, 128, generator=g) * 0.3 + torch.randn(m, 8, generator=g) @ mix) * size

    weight, calibration, test = gaussian(64, 128), inputs(512), inputs(128)
    errors = {}
    for name, tensor in {
        "sweep": nvfp4.quantize(weight),
        "gptq": quantize_gptq(weight, hessian(calibration)),
        "blocks": quantize_gptq(weight, hessian(calibration), block=32),
    }.items():
        errors[name] = float((test @ (nvfp4.dequantize(tensor) - weight).T).norm())
    assert errors["gptq"] < 0.7 * errors["sweep"]
    assert abs(errors["gptq"] - errors["blocks"]) < 0.05 * errors["gptq"]
    with pytest.raises(InputError, match="moments"):
        quantize_gptq(weight, torch.eye(64))


@pytest.mark.parametrize(
    ("weight", "named"),
    [(torch.zeros(4, 24), "K % 16"), (torch.zeros(16), "K % 16"), (torch.full((4, 16), float("nan")), "finite")],
)
def test_bad_weights_are_named(weight, named):
    with pytest.raises(InputError, match=named):
        nvfp4.quantize(weight)


def test_all_zero_weights_stay_zero():
    assert torch.equal(nvfp4.dequantize(nvfp4.quantize(torch.zeros(4, 32))), torch.zeros(4, 32))
    assert torch.equal(fp8.dequantize(fp8.quantize(torch.zeros(4, 32))), torch.zeros(4, 32))


@settings(deadline=None, max_examples=50)
@given(st.binary(min_size=32, max_size=32))
def test_words_unpack_to_the_codes_they_were_packed_from(data):
    codes = torch.tensor(list(data), dtype=torch.uint8) & 15
    assert torch.equal(packing.unpack_words(packing.pack_words(codes)), codes)


def test_pairs_are_bf16_patterns_of_the_values():
    codes = torch.arange(16, dtype=torch.uint8).repeat(8)
    pairs = packing.pair_words(packing.pack_words(codes))
    eight = codes.reshape(-1, 8)
    for index, pair in enumerate(pairs):
        for half in (0, 1):
            bits = ((pair >> 16 * half) & 0xFFFF).to(torch.int32) << 16
            value = bits.view(torch.float32).double() * 2.0**126
            assert torch.equal(value, nvfp4.decode_e2m1(eight[:, 2 * index + half]).double())


@pytest.mark.parametrize("k", [16, 256, 272, 1024])
def test_prepack_has_an_exact_inverse(k):
    tensor = nvfp4.quantize(gaussian(40, k))
    back = packing.unprepack(*packing.prepack(tensor), tensor.global_scale, k)
    assert torch.equal(back.codes, tensor.codes)
    assert torch.equal(back.scales.view(torch.uint8), tensor.scales.view(torch.uint8))


def test_interleaved_rows_separate_again():
    gate, up = gaussian(24, 5), gaussian(24, 5) + 1
    both = packing.interleave_rows(gate, up)
    assert torch.equal(both[8:16], up[:8])
    assert all(torch.equal(a, b) for a, b in zip(packing.separate_rows(both), (gate, up)))
    with pytest.raises(InputError, match="multiple of 8"):
        packing.interleave_rows(gate[:5], up[:5])


def test_fp8_saturates_and_keeps_nan():
    encoded = fp8.encode_e4m3(torch.tensor([449.0, -1e9, float("inf"), float("nan"), 0.0])).float()
    assert encoded[:3].tolist() == [448.0, -448.0, 448.0]
    assert math.isnan(encoded[3])


def test_power_of_two_scales():
    got = fp8.power_of_two_scale(torch.tensor([448.0, 449.0, 224.0, 1.0, 0.0, float("inf")]))
    assert got.tolist() == [1.0, 2.0, 0.5, 2.0**-8, 2.0**-126, float("inf")]
    x = gaussian(64, 512)
    rounded = fp8.dequantize_activation(*fp8.quantize_activation(x, 128), 128)
    exact_scale = (x.abs().amax(-1, keepdim=True) / 448).float()
    plain = fp8.encode_e4m3(x / exact_scale).float() * exact_scale
    assert decibels(x, rounded) > decibels(x, plain) - 0.3  # a power of two costs next to nothing


def test_bad_activations_stay_bad():
    x = gaussian(4, 64)
    x[1, 3], x[2, 40] = float("nan"), float("inf")
    wide = fp8.dequantize_activation(*fp8.quantize_activation(x, 32), 32)
    assert torch.isnan(wide[1, 3])
    assert not torch.isfinite(wide[2, 40])
    assert torch.isfinite(wide[0]).all()
    wide4 = nvfp4_dequantize(nvfp4_reference(x))
    assert torch.isnan(wide4[1, :16]).all()
    assert torch.isnan(wide4[2, 32:48]).all()
    assert torch.isfinite(wide4[3]).all()


@pytest.mark.parametrize(("m", "c"), [(1, 3), (128, 4), (200, 17)])
def test_swizzle_has_an_inverse_and_the_documented_order(m, c):
    scales = torch.arange(m * c).reshape(m, c).to(torch.uint8)
    flat = swizzle(scales)
    assert torch.equal(unswizzle(flat, m, c), scales)
    r, column = m - 1, c - 1
    tile = r // 128 * (-(-c // 4)) + column // 4
    assert flat[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + column % 4] == scales[r, column]


def test_checkpoint_forms_read_back_bit_for_bit():
    four, eight = nvfp4.quantize(gaussian(32, 64)), fp8.quantize(gaussian(32, 64), per_row=False)
    stored = checkpoint_formats.write_modelopt("a", four)
    stored |= checkpoint_formats.write_compressed_tensors("b", four)
    stored |= checkpoint_formats.write_modelopt("c", eight, torch.tensor(0.5)) | {"d.weight": gaussian(4, 4)}
    for name in ("a", "b"):
        back = checkpoint_formats.read(stored, name)
        assert torch.equal(back.codes, four.codes)
        torch.testing.assert_close(nvfp4.dequantize(back), nvfp4.dequantize(four), rtol=1e-6, atol=0)
    assert torch.equal(fp8.dequantize(checkpoint_formats.read(stored, "c")), fp8.dequantize(eight))
    assert checkpoint_formats.read_input_scale(stored, "c") == 0.5
    assert checkpoint_formats.read_input_scale(stored, "a") is None
    assert torch.equal(checkpoint_formats.read(stored, "d"), stored["d.weight"])
    config = checkpoint_formats.modelopt_config({"a": "nvfp4_w4a16", "c": "fp8_w8a8", "d": "bf16"})["quantization"]
    assert config["quantized_layers"] == {
        "a": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "c": {"quant_algo": "FP8"},
    }


def test_missing_tensors_are_listed_in_the_form_that_is_there():
    missing = checkpoint_formats.missing
    assert missing({"a.weight"}, "a", "bf16") == []
    assert missing({"a.weight"}, "a", "fp8_w8a8") == ["a.weight_scale"]
    assert missing({"a.weight"}, "a", "nvfp4_w4a16") == ["a.weight_scale_2", "a.weight_scale"]
    assert missing({"a.weight_packed"}, "a", "nvfp4_w4a4") == ["a.weight_global_scale", "a.weight_scale"]
    four = nvfp4.quantize(gaussian(32, 64))
    for write in (checkpoint_formats.write_modelopt, checkpoint_formats.write_compressed_tensors):
        assert missing(write("a", four), "a", "nvfp4_w4a16") == []


def test_checkpoint_errors_name_the_tensor():
    stored = checkpoint_formats.write_modelopt("a", nvfp4.quantize(gaussian(32, 64)))
    with pytest.raises(InputError, match=r"b\.weight: not in the checkpoint"):
        checkpoint_formats.read(stored, "b")
    with pytest.raises(InputError, match=r"a\.weight_scale: not in"):
        checkpoint_formats.read({k: v for k, v in stored.items() if k != "a.weight_scale"}, "a")
    with pytest.raises(InputError, match=r"a\.weight_scale_2"):
        checkpoint_formats.read(stored | {"a.weight_scale_2": torch.tensor(-1.0)}, "a")
    with pytest.raises(InputError, match="scales"):
        checkpoint_formats.read(stored | {"a.weight_scale": stored["a.weight_scale"][:, :2]}, "a")
