"""What vision and the prefix run between their products: inputs, GeGLU and attention in CUDA C++, static scales."""

import os

import pytest
import torch
import torch.nn.functional as F
from hybrid_policy.errors import InputError
from hybrid_policy.kernels import geglu_rows, hopper_product, norm, prefix_attention, prefix_inputs
from hybrid_policy.kernels.attention import attention_reference
from hybrid_policy.kernels.fp8 import FP8Tensor
from hybrid_policy.runtime import static_scales
from hybrid_policy.runtime.projection import padded_between

from .devices import on_hopper
from .machine_code import compiled, nvcc

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available(),
    reason="needs a GPU or TRITON_INTERPRET=1",
)
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device("cpu")


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@interpreted
@pytest.mark.parametrize("as_bytes", [True, False])
def test_cut_patches(as_bytes):
    views, patch, side, width = 2, 14, 2, 40
    size = side * patch + 3  # what is no whole patch is cut off
    images = torch.randint(0, 256, (views, size, size, 3), dtype=torch.uint8)
    if not as_bytes:
        images = torch.randn(views, 3, size, size)
    position = torch.randn(side * side, width)
    shapes = (views * side * side, prefix_inputs.padded_patch(patch)), (views * side * side, width)
    ours, theirs = ([torch.full(s, float("nan")) for s in shapes] for _ in range(2))
    prefix_inputs.cut_patches(images, *ours, position, patch)
    prefix_inputs.cut_patches_reference(images, *theirs, position, patch)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours[1], theirs[1], atol=0, rtol=0)
    assert shapes[0][1] == 592
    assert not ours[0][:, 588:].any()


def test_cut_patches_are_the_convolution():
    images, weight = torch.randn(1, 3, 28, 28), torch.randn(24, 3, 14, 14)
    out, x = torch.empty(4, 592), torch.empty(4, 24)
    prefix_inputs.cut_patches_reference(images, out, x, torch.zeros(4, 24), 14)
    expected = F.conv2d(images, weight, stride=14).flatten(2)[0].T
    torch.testing.assert_close(out @ F.pad(weight.flatten(1), (0, 4)).T, expected, atol=1e-4, rtol=1e-4)


@interpreted
def test_gather_rows():
    features, embedding = torch.randn(6, 24), torch.randn(11, 24)
    tokens = torch.tensor([3, 0, 10, 7])
    rows = torch.tensor([5, 4, 0, 6, 7, 8, 9, 0])
    ours, theirs = torch.full((8, 24), float("nan")), torch.empty(8, 24)
    prefix_inputs.gather_rows(features, embedding, tokens, rows, ours, 1.5)
    prefix_inputs.gather_rows_reference(features, embedding, tokens, rows, theirs, 1.5)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours[5], embedding[10] * 1.5)


def test_inputs_of_other_shapes_are_refused():
    image, rows = torch.zeros(1, 28, 28, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(InputError, match="cut_patches"):
        prefix_inputs.cut_patches(image, torch.empty(4, 588), torch.empty(4, 8), torch.empty(4, 8), 14)
    with pytest.raises(InputError, match="gather_rows"):
        prefix_inputs.gather_rows(torch.empty(2, 8), torch.empty(5, 8), rows, rows, torch.empty(2, 8), 1.0)


@pytest.mark.parametrize("outlier", [1.0, 50.0])
def test_no_row_saturates_a_static_scale(outlier):
    k, n = 64, 96
    weight, bias = torch.randn(k), torch.randn(k) * 0.3
    weight[3] *= outlier
    product, shift = torch.randn(n, k), torch.randn(n)
    rows = torch.randn(4000, k)
    rows[: 2 * k] = torch.cat((torch.eye(k), -torch.eye(k)))  # the worst a norm can give: all in one channel
    h = F.layer_norm(rows, (k,), weight, bias)
    scale = static_scales.norm_output_scale(weight, bias)
    assert 0.9 < (h.abs().amax() / (448 * scale)) <= 1.0
    eight = (h / scale).to(torch.float8_e4m3fn)
    y = eight.float() * scale @ product.T + shift
    y = torch.cat((y, y.to(torch.bfloat16).float()))
    # rows that a product's own row lines up with come closest to its bound
    lined = F.layer_norm(product * weight - (product * weight).mean(1, keepdim=True), (k,), weight, bias)
    y2 = (lined / scale).to(torch.float8_e4m3fn).float() * scale @ product.T + shift
    bound = static_scales.product_scale(product, shift, weight, bias) * 448
    assert max(y.abs().amax(), y2.abs().amax()) <= bound
    assert y2.abs().amax() > 0.4 * bound
    folded = static_scales.folded((weight, bias), scale)
    torch.testing.assert_close(F.layer_norm(rows, (k,), *folded) * scale, h, atol=1e-4, rtol=1e-4)


def test_a_weight_that_is_not_finite_keeps_its_scale_from_looking_fine():
    bad = torch.tensor([1.0, float("nan")])
    assert static_scales.norm_output_scale(bad, torch.zeros(2)) != static_scales.norm_output_scale(bad, torch.zeros(2))


@pytest.mark.parametrize(
    ("rows", "cluster"), [(560 * 8, 3), (656 * 8, 2), (712 * 8, 2), (968 * 8, 2), (2000 * 8, 1), (8, 4)]
)
def test_clusters_fill_the_device_and_no_more(rows, cluster):
    assert prefix_attention.plan_cluster(rows, 132) == cluster


def test_which_attention_fits():
    fits = prefix_attention.fits
    assert fits((9, 0), 8, 1, 256, torch.bfloat16)
    assert not fits((10, 0), 8, 1, 256, torch.bfloat16)
    assert not fits((9, 0), 8, 2, 256, torch.bfloat16)
    assert not fits((9, 0), 8, 1, 128, torch.bfloat16)
    assert not fits((9, 0), 8, 1, 256, torch.float8_e4m3fn)


def test_geglu_plans():
    assert geglu_rows.plan_geglu(16384) == (512, 3)
    assert geglu_rows.plan_geglu(1024) == (128, 12)
    assert geglu_rows.plan_geglu(100) is None
    assert geglu_rows.plan_geglu(16384 * 8) is None


@pytest.mark.parametrize("rows", [32, 256, 512, 560, 768])
@pytest.mark.parametrize(("n", "k"), [(3456, 1152), (1152, 1152), (4352, 1152), (1152, 4352), (1152, 4304), (384, 128)])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("processors", [132, 114])
def test_product_plans_fit_the_device(rows, n, k, size, processors):
    plan = hopper_product.plan_product(rows, n, k, size, processors)
    assert plan.nt % 8 == 0
    assert plan.nt % plan.cm == 0
    assert plan.shared + 1200 <= 227 * 1024
    assert 2 <= plan.stages <= 8
    assert plan.blocks(rows, n) <= processors
    assert plan.blocks(rows, n) % (plan.cm * plan.cn) == 0
    assert plan.blocks(rows, n) * 128 * plan.nt >= rows * n


def test_bf16_takes_the_kernel_where_it_was_measured():
    pays = hopper_product.pays
    assert pays(torch.bfloat16, 768, 1152, 4352)
    assert not pays(torch.bfloat16, 512, 1152, 4352)
    assert not pays(torch.bfloat16, 256, 3456, 1152)
    assert pays(torch.float8_e4m3fn, 256, 3456, 1152)


def test_zeros_between_two_products_change_nothing():
    first, bias, second = torch.randn(20, 8), torch.randn(20), torch.randn(6, 20)
    x = torch.randn(5, 8)
    expected = F.gelu(x @ first.T + bias) @ second.T
    for scale in (torch.tensor(2.0), torch.rand(20) + 0.5):
        eight = FP8Tensor(first.to(torch.float8_e4m3fn), scale)
        grown, wider, last = padded_between(eight, bias, second)
        assert (grown.shape, wider.shape, last.shape) == ((128, 8), (128,), (6, 128))
        wide = grown.values.float() * (grown.scale if scale.ndim == 0 else grown.scale[:, None])
        narrow = eight.values.float() * (scale if scale.ndim == 0 else scale[:, None])
        ours = F.gelu(x @ wide.T + wider) @ last.T
        torch.testing.assert_close(ours, F.gelu(x @ narrow.T + bias) @ second.T, atol=1e-4, rtol=1e-4)
    grown, wider, last = padded_between(first, bias, second)
    torch.testing.assert_close(F.gelu(x @ grown.T + wider) @ last.T, expected, atol=1e-4, rtol=1e-4)


EIGHT = {"SIZE": 1, "BIAS": 1, "GELU": 1, "EIGHT": 1, "PDL": 1}
SIXTEEN = {"SIZE": 2, "BIAS": 1, "GELU": 1, "EIGHT": 0, "PDL": 1}


@nvcc
@pytest.mark.parametrize(
    ("sources", "macros"),
    [
        (prefix_attention.SOURCES, {"GROUP": 8, "CLUSTER": 3, "QUANTISE": 1, "PDL": 1}),
        (prefix_attention.SOURCES, {"GROUP": 4, "CLUSTER": 1, "QUANTISE": 0, "PDL": 0}),
        (geglu_rows.SOURCES, {"WIDTH": 16384, "THREADS": 512, "BLOCKS": 3, "PDL": 1}),
        (hopper_product.SOURCES, {"NT": 136, "STAGES": 6, "CM": 1, "CN": 1} | EIGHT),
        (hopper_product.SOURCES, {"NT": 64, "STAGES": 8, "CM": 2, "CN": 2} | EIGHT),
        (hopper_product.SOURCES, {"NT": 144, "STAGES": 6, "CM": 2, "CN": 2} | SIXTEEN),
        (hopper_product.SOURCES, {"NT": 240, "STAGES": 4, "CM": 1, "CN": 1} | SIXTEEN),
    ],
)
def test_machine_code_without_spills_or_serialised_products(tmp_path, sources, macros):
    prelude = hopper_product.product_source(macros["SIZE"], macros["NT"]) if "NT" in macros else ""
    assert compiled(tmp_path, sources, macros, prelude=prelude).stat().st_size > 0


@pytest.mark.parametrize("rows", [37, 560])
@pytest.mark.parametrize("cluster", [1, 2, 3, 4])
class TestPrefixAttention:
    pytestmark = on_hopper

    def test_agrees_with_the_reference(self, rows, cluster):
        capacity = 800
        for heads, valid_keys in ((8, 560), (8, 523), (4, 64), (8, 3)):
            q = torch.randn(rows, heads, 256, dtype=torch.bfloat16) * 2
            k, v = torch.randn(2, capacity, 1, 256, dtype=torch.bfloat16)
            expected = torch.empty(q.shape)
            valid = torch.tensor([valid_keys], dtype=torch.int32)
            attention_reference(q, k, v, valid, 0, expected, 1 / 16)
            k[valid_keys:], v[valid_keys:] = float("nan"), float("nan")
            call = prefix_attention.PrefixAttention(rows, heads, capacity, torch.device("cuda"), cluster=cluster)
            out = torch.full(q.shape, float("nan"), dtype=torch.bfloat16)
            call(q, k, v, valid, 0, out)
            assert relative(out, expected) < 6e-3
            eight, scale = torch.empty(q.shape, dtype=torch.float8_e4m3fn), torch.full((rows,), float("nan"))
            call(q, k, v, valid, 0, eight, out_scale=scale)
            assert relative(eight.float() * scale[:, None, None], expected) < 4e-2
            torch.testing.assert_close(scale, expected.abs().amax((1, 2)) / 448, rtol=2e-2, atol=0)


class TestGeglu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("width", [1024, 16384])
    def test_agrees_with_the_reference(self, width):
        both = torch.randn(37, 2 * width, dtype=torch.bfloat16) * 3
        both[5] = 0
        row_scale = torch.rand(37) + 0.5
        out, scale = torch.empty(37, width, dtype=torch.float8_e4m3fn), torch.full((37,), float("nan"))
        norm.geglu(both, out, row_scale=row_scale, out_scale=scale)
        expected = torch.empty(37, width)
        norm.geglu_reference(both, expected, row_scale=row_scale)
        assert relative(out.float() * scale[:, None], expected) < 3e-2
        assert not (out[5].float() * scale[5]).any()

    def test_nan_does_not_turn_into_a_number(self):
        both = torch.randn(3, 2048, dtype=torch.bfloat16)
        both[1, 17] = float("nan")
        out, scale = torch.empty(3, 1024, dtype=torch.float8_e4m3fn), torch.empty(3)
        norm.geglu(both, out, out_scale=scale)
        assert torch.isnan(out.float() * scale[:, None])[1].any()
        assert torch.isfinite(scale[[0, 2]]).all()


@pytest.mark.parametrize("rows", [37, 512, 768])
@pytest.mark.parametrize(("n", "k"), [(3456, 1152), (1152, 4352), (4352, 1152), (136, 144)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
class TestProduct:
    pytestmark = on_hopper

    def test_agrees_with_float64(self, rows, n, k, dtype):
        product = hopper_product.hopper_product
        x, w = ((torch.randn(size, k) * 4).to(dtype) for size in (rows, n))
        bias, scale = torch.randn(n, dtype=torch.bfloat16), k**-0.5 / 16
        expected = x.double() @ w.double().T * scale
        assert relative(product(x, w, scale), expected) < 5e-3
        expected = expected + bias.double()
        first = product(x, w, scale, bias=bias, pdl=True)
        assert relative(first, expected) < 5e-3
        assert torch.equal(first, product(x, w, scale, bias=bias, pdl=True))
        curved = F.gelu(expected, approximate="tanh")
        wide = product(x, w, scale, bias=bias, gelu=True)
        assert relative(wide, curved) < 5e-3
        if dtype == torch.bfloat16:  # right to the last place wherever on the curve, but for what the sum loses
            assert ((wide - curved).abs() <= 2**-8 * curved.abs() + 2e-5 * curved.abs().max()).all()
        ours = product(x, w, scale, bias=bias, gelu=True, out_scale=0.02)
        assert relative(ours.float() * 0.02, curved) < 4e-2

    def test_clusters_change_nothing_but_the_order(self, rows, n, k, dtype):
        x, w = ((torch.randn(size, k) * 4).to(dtype) for size in (rows, n))
        expected = x.double() @ w.double().T
        # half of 72 columns ends within the eight rows of a swizzle's pattern
        for nt, cm, cn in ((64, 1, 1), (64, 1, 2), (64, 2, 1), (64, 2, 2), (72, 2, 1)):
            plan = hopper_product.make_plan(nt, cm, cn, k * dtype.itemsize)
            assert relative(hopper_product.hopper_product(x, w, plan=plan), expected) < 5e-3


class TestGeluQuantise:
    pytestmark = on_gpu

    def test_agrees_with_the_reference(self):
        y = torch.randn(33, 72, dtype=torch.bfloat16) * 3
        out, expected = (torch.empty(33, 72, dtype=torch.float8_e4m3fn) for _ in range(2))
        norm.gelu_quantise(y, out, 0.02)
        norm.gelu_quantise_reference(y, expected, 0.02)
        assert relative(out, expected) < 5e-3
