"""The expert's cluster kernels: packing on any machine, machine code where nvcc is, results where a GPU is."""

import math

import pytest
import torch
from hybrid_policy.kernels import expert, expert_packing, fp8, nvfp4, qkv

from .machine_code import compiled, nvcc

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FULL = {  # (epilogue, N, K) of pi0.5's expert
    "qkv": (expert.QKV, 2560, 1024),
    "o": (expert.RESIDUAL, 1024, 2048),
    "gate_up": (expert.GEGLU, 8192, 1024),
    "down": (expert.RESIDUAL, 1024, 4096),
}
H100_LIMIT = 232448  # bytes of shared memory a block


def lanes_of(n, k, bn, cluster, per16):
    """Flat position (16-byte units) and (k8, r8, e, step) of element (n, k), from the module's description."""
    tile, row = divmod(n, bn)
    mtile, r = divmod(row, 16)
    r8, g = divmod(r, 8)
    return tile, mtile, r8, g


def unpacked(flat, n_rows, k_total, bn, cluster, per16, read):
    """Walk every element by the description in expert_packing and read it with ``read(block16, step, k8, r8, e)``."""
    kc = k_total // cluster
    steps, mtiles = kc // 16, bn // 16
    out = torch.zeros(n_rows, k_total, dtype=torch.float64)
    units = flat.view(-1, 16)
    for n in range(n_rows):
        tile, mtile, r8, g = lanes_of(n, 0, bn, cluster, per16)
        for k in range(k_total):
            rank, within = divmod(k, kc)
            step, j = divmod(within, 16)
            k8, rest = divmod(j, 8)
            t, e = divmod(rest, 2)
            unit = (((tile * cluster + rank) * mtiles + mtile) * (steps // per16) + step // per16) * 32 + 4 * g + t
            out[n, k] = read(units[unit], step % per16, k8, r8, e)
    return out


def as_bf16(bits):
    return torch.tensor([bits], dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double().item()


def test_bf16_order():
    weight = torch.randn(64, 64).bfloat16()

    def read(unit, step, k8, r8, e):
        return unit.view(torch.bfloat16)[4 * k8 + 2 * r8 + e].double()

    assert torch.equal(unpacked(expert_packing.pack_bf16(weight, 32, 2), 64, 64, 32, 2, 1, read), weight.double())


def test_e4m3_order_and_decode():
    values = torch.randn(32, 128).to(torch.float8_e4m3fn)

    def read(unit, step, k8, r8, e):
        half = int(unit.view(torch.int32)[2 * step + k8]) & 0xFFFFFFFF
        byte = half >> (8 * (2 * r8 + e)) & 0xFF
        placed = byte << 8  # one of the kernel's two halves after the byte permutation
        return as_bf16((placed & 0x8000) | ((placed >> 4) & 0x07F0)) * 2.0**120

    packed = expert_packing.pack_e4m3(values, 32, 2)
    assert torch.equal(unpacked(packed, 32, 128, 32, 2, 2, read), values.double())


def test_nvfp4_order_and_decode():
    codes = torch.randint(0, 16, (32, 128), dtype=torch.uint8)

    def read(unit, step, k8, r8, e):
        word = int(unit.view(torch.int32)[step]) & 0xFFFFFFFF
        i = 2 * k8 + r8
        shifted = word << (12 - 4 * i) & 0xFFFFFFFF
        bits = (shifted & 0x80008000) | (shifted >> 6 & 0x01C001C0)
        return as_bf16(bits >> 16 * e & 0xFFFF) * 2.0**126

    packed = expert_packing.pack_nvfp4(codes, 32, 2)
    assert torch.equal(unpacked(packed, 32, 128, 32, 2, 4, read), nvfp4.decode_e2m1(codes).double())


def test_every_scale_times_every_code_is_exact():
    scales = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    wide = (scales.float() * 2.0**119).to(torch.bfloat16)
    assert torch.equal(wide.double() / 2.0**119, scales.double())
    codes = torch.arange(16, dtype=torch.uint8)
    product = nvfp4.decode_e2m1(codes).double()[None] * scales.double()[:, None] * 2.0**-7
    assert torch.equal(product.to(torch.bfloat16).double(), product)


def test_scale_order():
    scales = torch.rand(32, 8).to(torch.float8_e4m3fn)  # K = 128
    flat = expert_packing.pack_scales(scales, 32, 2).view(torch.bfloat16).view(1, 2, 2, 4, 8, 2)
    for n in range(32):
        for group in range(8):
            mtile, r8, g = n // 16, n % 16 // 8, n % 8
            assert flat[0, group // 4, mtile, group % 4, g, r8].double() / 2.0**119 == scales[n, group].double()


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("fmt", ["bf16", "e4m3", "nvfp4"])
@pytest.mark.parametrize("tokens", [10, 15, 50, 64, 100])
def test_full_size_has_a_plan(name, fmt, tokens):
    epilogue, n, k = FULL[name]
    plan = expert.plan_gemm(epilogue, fmt, n, k, tokens, H100_LIMIT)
    assert plan is not None
    assert plan.wm * plan.wk == 8


def test_a_width_that_does_not_divide_has_no_plan():
    assert expert.plan_gemm(expert.QKV, "bf16", 96, 48, 16, H100_LIMIT) is None


@pytest.mark.slow
@nvcc
@pytest.mark.parametrize("arch", ["90", "100", "110", "120"])
@pytest.mark.parametrize("name", [*FULL, "attention"])
def test_compiles_without_spilling(tmp_path, arch, name):
    heads = {"HEADS": 8, "KV_HEADS": 1, "HEAD_DIM": 256, "PDL": 1}
    if name == "attention":
        configurations = [{"GROUP": 8, "CLUSTER": 8, **heads}]
    else:
        epilogue, n, k = FULL[name]
        configurations = []
        for fmt, number in expert.FORMATS.items():
            plan = expert.plan_gemm(epilogue, fmt, n, k, 50, H100_LIMIT)
            configurations.append(
                {
                    "K_TOTAL": k, "N_TOTAL": n, "BN": plan.bn, "CLUSTER": plan.cluster, "WM": plan.wm,
                    "WK": plan.wk, "MT": 56, "FORMAT": number, "EPILOGUE": epilogue,
                    "NORM": int(epilogue != expert.RESIDUAL), **heads,
                }
            )  # fmt: skip
    sources = expert.ATTENTION_SOURCES if name == "attention" else expert.GEMM_SOURCES
    for macros in configurations:
        compiled(tmp_path, sources, macros, arch=arch)


def weight_of(fmt, n, k):
    dense = torch.randn(n, k, device="cuda") / math.sqrt(k)
    if fmt == "bf16":
        return dense.bfloat16()
    return fp8.quantize(dense, per_row=False) if fmt == "e4m3" else nvfp4.quantize(dense, rule="max")


def dense_of(weight):
    return expert.decoded(*expert.stack([weight])).double()


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("fmt", ["bf16", "e4m3", "nvfp4"])
@pytest.mark.parametrize(("tokens", "k", "n"), [(50, 2048, 1024), (50, 4096, 1024), (16, 512, 512), (100, 1024, 256)])
class TestResidual:
    pytestmark = gpu

    def test_gated_residual(self, fmt, tokens, k, n):
        torch.manual_seed(0)
        weight = weight_of(fmt, n, k)
        x = torch.randn(tokens, k, device="cuda").bfloat16()
        h, gate = torch.randn(tokens, n, device="cuda").bfloat16(), torch.randn(n, device="cuda")
        expected = h.double() + gate.double() * (x.double() @ dense_of(weight).T)
        out = h.clone()
        expert.ExpertGemm([weight], expert.RESIDUAL, tokens)(x, out, gate=gate)
        assert relative(out, expected) < 4e-3


@pytest.mark.parametrize("fmt", ["bf16", "e4m3", "nvfp4"])
@pytest.mark.parametrize(("tokens", "width", "features"), [(50, 1024, 4096), (16, 512, 1024)])
class TestGeGlu:
    pytestmark = gpu

    def test_norm_and_geglu(self, fmt, tokens, width, features):
        torch.manual_seed(0)
        gate, up = weight_of(fmt, features, width), weight_of(fmt, features, width)
        h = (torch.randn(tokens, width, device="cuda") * 3).bfloat16()
        factor = (1 + 0.3 * torch.randn(width, device="cuda")).bfloat16()
        shift = 0.3 * torch.randn(width, device="cuda")
        product = expert.ExpertGemm([gate, up], expert.GEGLU, tokens)
        out = torch.full((tokens, features), float("nan"), device="cuda", dtype=torch.bfloat16)
        product(h, out, factor=factor, shift=product.shift_rows(shift))
        wide = h.double()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * factor.double() + shift.double()
        g, u = normed @ dense_of(gate).T, normed @ dense_of(up).T
        assert relative(out, torch.nn.functional.gelu(g, approximate="tanh") * u) < 8e-3


@pytest.mark.parametrize("fmt", ["bf16", "e4m3"])
@pytest.mark.parametrize(("tokens", "width", "heads"), [(50, 1024, (8, 1, 256)), (16, 512, (4, 2, 128))])
class TestQkv:
    pytestmark = gpu

    def test_norm_rope_and_cache(self, fmt, tokens, width, heads):
        torch.manual_seed(0)
        h_count, kv, dim = heads
        weights = [weight_of(fmt, rows * dim, width) for rows in (h_count, kv, kv)]
        h = (torch.randn(tokens, width, device="cuda") * 3).bfloat16()
        factor = (1 + 0.3 * torch.randn(width, device="cuda")).bfloat16()
        shift = 0.3 * torch.randn(width, device="cuda")
        capacity, start = 200, torch.tensor([77], dtype=torch.int32, device="cuda")
        tables = qkv.rope_tables(capacity, dim, "cuda")
        caches = [torch.zeros(capacity, kv, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        q = torch.full((tokens, h_count, dim), float("nan"), device="cuda", dtype=torch.bfloat16)
        product = expert.ExpertGemm(weights, expert.QKV, tokens, heads=heads)
        product(
            h,
            q,
            factor=factor,
            shift=product.shift_rows(shift),
            caches=tuple(caches),
            tables=tables,
            start=start,
        )
        wide = h.double()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * factor.double() + shift.double()
        projected = (normed @ torch.cat([dense_of(w) for w in weights]).T).float()
        expected = torch.zeros(tokens, h_count, dim, device="cuda")
        wanted = [torch.zeros(capacity, kv, dim, device="cuda") for _ in range(2)]
        qkv.rope_split_reference(projected, expected, wanted[0], wanted[1], tables, start)
        assert relative(q, expected) < 8e-3
        for ours, theirs in zip(caches, wanted, strict=True):
            assert relative(ours, theirs) < 8e-3
            assert (ours[:77] == 0).all()
            assert (ours[77 + tokens :] == 0).all()


@pytest.mark.parametrize(("tokens", "heads"), [(50, (8, 1, 256)), (16, (4, 2, 128)), (10, (8, 1, 256))])
@pytest.mark.parametrize("valid", [3, 560, 968, 1500])
class TestAttention:
    pytestmark = gpu

    def test_over_prefix_and_chunk(self, tokens, heads, valid):
        torch.manual_seed(0)
        h_count, kv, dim = heads
        capacity = 1600
        q = torch.randn(tokens, h_count, dim, device="cuda").bfloat16()
        k, v = (torch.randn(capacity, kv, dim, device="cuda").bfloat16() for _ in range(2))
        k[valid + tokens :] = float("nan")
        v[valid + tokens :] = float("nan")
        count = torch.tensor([valid], dtype=torch.int32, device="cuda")
        run = expert.ExpertAttention(tokens, h_count, kv, dim)
        from hybrid_policy.kernels.attention import attention_reference

        expected = torch.empty(tokens, h_count, dim, device="cuda")
        attention_reference(q, k, v, count, tokens, expected, dim**-0.5)
        first = None
        for _ in range(3):
            out = torch.full_like(q, float("nan"))
            run(q, k, v, count, out)
            assert relative(out, expected) < 8e-3
            first = out if first is None else first
            assert torch.equal(out, first)
