"""A site's matrix product on the device, for the parts where a library's GEMM is the fastest there is.

The product leaves out the scale of FP8 activations' rows: bf16 has float32's range, and the kernel that reads
the product next multiplies each row anyway (``row_scale``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.fp8 import FP8Tensor
from hybrid_policy.kernels.linear import PackedLinear, prepare
from hybrid_policy.kernels.nvfp4 import NVFP4Tensor
from hybrid_policy.runtime.sites import Packed


class Projection:
    """y = x W.T (+ bias), W of one site or of several stacked ones of one precision.

    precision: with NVFP4 weights, ``nvfp4_w4a16`` or ``nvfp4_w4a4``.
    input_scale: FP8 sites only: ``x`` comes divided by this, whatever the row, and y is whole.
    quantised: whether ``x`` must come as float8_e4m3fn with a row scale that the reader of y applies.
    """

    def __init__(
        self,
        weights: Sequence[Packed],
        dtype: torch.dtype,
        bias: Tensor | None = None,
        *,
        precision: str = "nvfp4_w4a16",
        input_scale: float | None = None,
    ) -> None:
        first = weights[0]
        eight = isinstance(first, FP8Tensor)
        if input_scale is not None and not eight:
            raise InputError.at("projection", "input_scale", input_scale, "None where the weights are not FP8")
        self.input_scale = input_scale
        self.quantised = eight and input_scale is None
        self.input_dtype = torch.float8_e4m3fn if eight else dtype
        self.bias = None if bias is None else bias.to(dtype).contiguous()
        self.route = "cuBLAS bf16"
        self._packed: PackedLinear | None = None
        self._factor = 1.0
        self._column_scale: Tensor | None = None
        self._weight: Tensor
        self._input_scale = torch.full((), 1.0 if input_scale is None else input_scale, device=_device(first))
        if isinstance(first, NVFP4Tensor):
            if len(weights) > 1:
                raise InputError("projection: stacked sites in NVFP4 given, expected bf16 or fp8_w8a8")
            self._packed = prepare(first, precision, bias=bias)  # type: ignore[arg-type]
            self.route = self._packed.route
        elif eight:
            scaled = [w for w in weights if isinstance(w, FP8Tensor)]
            self._weight, self._scale, self._column_scale = _stack_fp8(scaled)
            self.route = "cuBLAS FP8"
            self._factor = float(self._scale) * (input_scale or 1.0)
        else:
            self._weight = torch.cat([w.to(dtype) for w in weights if isinstance(w, Tensor)]).contiguous()
        self._dtype = dtype

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [M, K] -> [M, N]; without the rows' scale where ``quantised``. out: where to, bf16 sites only."""
        if self._packed is not None:
            return self._packed(x)
        if self.input_dtype != torch.float8_e4m3fn:
            if out is None:
                return F.linear(x, self._weight, self.bias)
            if self.bias is None:
                return torch.mm(x, self._weight.t(), out=out)
            return torch.addmm(self.bias, x, self._weight.t(), out=out)
        # column factors belong to the product, so a bias then follows them
        bias = self.bias if self._column_scale is None else None
        if x.device.type == "cpu":
            y = x.float() @ self._weight.float().T * (self._scale * self._input_scale)
            y = (y if bias is None else y + bias).to(self._dtype)
        else:
            y = torch._scaled_mm(
                x, self._weight.t(), self._input_scale, self._scale, bias=bias, out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )  # fmt: skip
        if self._column_scale is None:
            return y
        y = y * self._column_scale
        return y if self.bias is None else y + self.bias

    def whole(self) -> tuple[Tensor, float] | None:
        """The weight [N, K] and the one factor that makes ``x W.T`` y (without the bias); None where there is no such
        thing: NVFP4, FP8 without ``input_scale`` or with several scales."""
        return None if self.quantised else self.held()

    def held(self) -> tuple[Tensor, float] | None:
        """The weight as it is held, [N, K] in E4M3 or the model's dtype, and the factor that makes ``x W.T`` y (but for
        the rows' scale, where ``quantised``); None where the weights are NVFP4 or their scales differ."""
        if self._packed is not None or self._column_scale is not None:
            return None
        return self._weight, self._factor

    def gelu(self, x: Tensor) -> Tensor:
        """gelu_tanh(x W.T + bias), bf16 sites only; on a GPU in the product's own epilogue."""
        if self.input_dtype == torch.float8_e4m3fn or self._packed is not None or self.bias is None:
            raise InputError("projection: gelu on a quantised site given, expected a bf16 site with bias")
        if x.device.type == "cpu":
            return F.gelu(F.linear(x, self._weight, self.bias), approximate="tanh")
        return torch._addmm_activation(self.bias, x, self._weight.t(), use_gelu=True)

    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self._packed.weight_bytes() if self._packed is not None else self._weight.nbytes


def padded_between(first: Packed, bias: Tensor, second: Packed) -> tuple[Packed, Tensor, Packed]:
    """Two products, bf16 or FP8, with zero features between them up to a multiple of 128.

    Zeros stay zeros through a GELU, and rows of what lies between then begin where L2's lines do: with 4304 features,
    as SigLIP has, a tile's row of 128 bytes is parts of two lines, and the second product takes 1 to 3 µs longer.
    """
    extra = -first.shape[0] % 128
    return _grown(first, extra, 0), F.pad(bias, (0, extra)), _grown(second, 0, extra)


def _grown(weight: Packed, rows: int, columns: int) -> Packed:
    """With rows and columns of zeros behind its own."""
    if rows == columns == 0 or isinstance(weight, NVFP4Tensor):
        return weight
    if not isinstance(weight, FP8Tensor):
        return F.pad(weight, (0, columns, 0, rows))
    values = F.pad(weight.values.view(torch.uint8), (0, columns, 0, rows)).view(torch.float8_e4m3fn)
    scale = weight.scale if weight.scale.ndim == 0 else F.pad(weight.scale, (0, rows), value=1.0)
    return FP8Tensor(values, scale)


def _device(weight: Packed) -> torch.device:
    if isinstance(weight, FP8Tensor):
        return weight.values.device
    return weight.codes.device if isinstance(weight, NVFP4Tensor) else weight.device


def _stack_fp8(weights: Sequence[FP8Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values, one scale, and column factors where the scales differ (exact: they multiply the product)."""
    values = torch.cat([w.values.view(torch.uint8) for w in weights]).view(torch.float8_e4m3fn)
    scales = [w.scale for w in weights]
    if all(s.ndim == 0 for s in scales) and bool((torch.stack(scales) == scales[0]).all()):
        return values, scales[0].clone(), None
    columns = torch.cat([w.scale.expand(w.shape[0]) for w in weights])
    return values, torch.ones((), device=values.device), columns
