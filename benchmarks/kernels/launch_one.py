"""Launch the kernels of the comparison a few times each, for a profiler to watch (ncu -k regex:...)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import problems as p
import torch
from hybrid_policy.kernels import wgmma_linear, wgmma_tiles


def main() -> int:
    """Three launches of each of Hopper's kernels on weights that no cache holds."""
    for problem in (p.EXPERT, p.PREFIX_SMALL, p.PREFIX):
        inputs, out = p.Inputs.random(problem, 0), p.output(problem)
        tile = wgmma_tiles.gate_up_tile(problem.m, problem.n, problem.k)
        for seed in range(3):
            p.random_slabs(problem, seed).launch(inputs.x, out, tile)
    for problem in (p.DOWN, p.DOWN_GIVEN):
        inputs, out = p.Inputs.random(problem, 0), p.output(problem)
        small = wgmma_tiles.linear_tile(problem.m, problem.n, problem.k)
        assert small is not None
        for seed in range(3):
            weight = p.random_weight(problem, seed)
            assert weight.row_scale is not None
            wgmma_linear.launch(
                weight.weight, weight.row_scale, inputs.operand, out, small, residual=inputs.residual,
                gate=inputs.gate, x_scale=inputs.x_scale,
            )  # fmt: skip
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
