"""Launch every kernel of the streaming family once on small odd shapes, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck  python benchmarks/kernels/sanitize.py
compute-sanitizer --tool racecheck python benchmarks/kernels/sanitize.py
"""

from __future__ import annotations

import sys

import torch
from hybrid_policy.kernels import activations, fp8, nvfp4, tiles
from hybrid_policy.kernels.nvfp4_activation import NVFP4Activation
from hybrid_policy.kernels.stream import StreamWeight


def main() -> int:
    """Launch; every output must be finite."""
    device = "cuda"

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    outs: dict[str, torch.Tensor] = {}
    # (name, format, GeGLU, M, N, K, the tile)
    t = tiles.Tile
    cases = [
        ("expert gate/up", "nvfp4", True, 50, 256, 1024, t(64, 64, 256, 4, 3, swap=True, tma_x=True, tma_w=True)),
        ("prefix gate/up", "nvfp4", True, 50, 256, 512, t(64, 128, 128, 8, 3, swap=True, tma_x=True)),
        ("many tokens", "nvfp4", True, 300, 256, 512, t(256, 128, 128, 8, 2, swap=True, bm2=32, tma_x=True)),
        ("pointers, ragged", "nvfp4", True, 37, 208, 272, t(64, 64, 128, 4, 2)),
        ("down, split", "fp8", False, 50, 128, 4096, t(64, 64, 512, 8, 1, split=8)),
        ("down, bulk", "fp8", False, 50, 128, 4096, t(64, 32, 256, 4, 2, split=4)),
        ("bf16", "bf16", False, 50, 160, 1024, t(64, 32, 256, 4, 3, tma_x=True, tma_w=True)),
        ("bf16 ragged", "bf16", False, 9, 72, 200, t(16, 32, 128, 4, 2)),
    ]
    for name, fmt, geglu, m, n, k, tile in cases:
        wide = normal(n, k)
        weight = fp8.quantize(wide) if fmt == "fp8" else nvfp4.quantize(wide, rule="max") if fmt == "nvfp4" else wide
        packed, x = StreamWeight(weight, None), normal(m, k).bfloat16()
        for pdl in (False, True):
            out = torch.full((m, n // 2 if geglu else n), float("nan"), device=device, dtype=torch.bfloat16)
            extra = {} if geglu else {"residual": normal(m, n).bfloat16(), "gate": normal(n), "bias": normal(n)}
            packed.launch(x, out, tile, geglu=geglu, pdl=pdl, **extra)
            outs[f"{name}, pdl {pdl}"] = out
    x, factor = normal(37, 272).bfloat16(), normal(272).bfloat16()
    for swizzled in (False, True):
        packed4 = NVFP4Activation.empty(37, 272, device, swizzled=swizzled)
        activations.quantize_nvfp4(x, packed4, factor=factor, shift=normal(272))
        outs[f"to NVFP4, swizzled {swizzled}"] = packed4.row_scale
    values, scale = torch.empty(37, 272, device=device, dtype=torch.float8_e4m3fn), torch.empty(37, device=device)
    activations.quantize_fp8(x, values, scale)
    outs["to FP8"] = values.float()
    outs["norm"] = activations.rms_norm(x, torch.empty_like(x), factor=factor)
    y, out = normal(37, 272).bfloat16(), torch.empty(37, 272, device=device, dtype=torch.bfloat16)
    activations.finish_rows(y, out, bias=normal(272), gate=normal(272), residual=y)
    outs["finish"] = out
    half = torch.empty(37, 136, device=device, dtype=torch.bfloat16)
    activations.finish_geglu(y, half)
    outs["GeGLU"] = half
    torch.cuda.synchronize()
    bad = [name for name, out in outs.items() if not bool(torch.isfinite(out.float()).all())]
    print(f"{len(outs)} outputs, not finite: {bad or 'none'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
