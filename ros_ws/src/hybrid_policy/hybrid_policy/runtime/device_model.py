"""pi0.5 on a device as a fixed sequence of launches over buffers allocated once.

Nothing here looks at a value on the host: the number of valid prefix tokens, the rows that make up the prefix and
real-time chunking's inputs are device tensors, so the sequence can be captured once and replayed for any input.
The same code runs in plain PyTorch on a CPU, which is how tests hold it against the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_policy.kernels.down_product import down_product, pays_in_pairs
from hybrid_policy.kernels.expert import ExpertAttention
from hybrid_policy.kernels.flow_step import Guide
from hybrid_policy.kernels.gate_up import NormPrologue, PackedGateUp
from hybrid_policy.kernels.gate_up_product import gate_up_product
from hybrid_policy.kernels.hopper_product import hopper_product, pays
from hybrid_policy.kernels.norm_product import norm_product
from hybrid_policy.kernels.nvrtc import multiprocessors
from hybrid_policy.kernels.prefix_attention import PrefixAttention
from hybrid_policy.kernels.prefix_inputs import padded_patch
from hybrid_policy.kernels.qkv import rope_tables
from hybrid_policy.kernels.qkv_product import qkv_product
from hybrid_policy.models.flow import step_times
from hybrid_policy.runtime.device_weights import DeviceWeights, GemmaLayer, VisionLayer
from hybrid_policy.runtime.projection import Projection
from hybrid_policy.runtime.rtc import RealTimeChunking
from hybrid_policy.runtime.stages import GLUE, StageTable


@dataclass
class Inputs:
    """What changes between inferences, on the device.

    images: uint8 [V, S, S, 3], or float32 [V, 3, S, S] in [-1, 1]. tokens: int64 [max_token_len].
    rows: int64 [V * P + max_token_len]: which row of (image features, prompt embeddings) each prefix row is;
        valid ones first. valid: int32 [1], how many. noise: float32 [H, A].
    guide: real-time chunking's Y, W and clean count; W = 0 and clean = 0 leave the plain flow.
    """

    images: Tensor
    tokens: Tensor
    rows: Tensor
    valid: Tensor
    noise: Tensor
    guide: Guide


class DeviceModel:
    """Buffers and launches of one model. ``run_*`` may be captured; each fills what the next one reads."""

    def __init__(
        self, weights: DeviceWeights, table: StageTable, rtc: RealTimeChunking, cache: torch.dtype, views: int
    ) -> None:
        config = weights.config
        self.config, self.weights, self.table = config, weights, table
        self.device = weights.embedding.device
        device, dtype = self.device, weights.dtype
        gemma, expert = config.prefix, config.expert
        self.views = views
        self.max_rows = views * config.image_tokens + config.max_token_len
        self.capacity = self.max_rows + config.horizon
        shape = (gemma.depth, self.capacity, gemma.kv_heads, gemma.head_dim)
        # zeros, not garbage: rows behind the valid ones are read (and masked) before they are written
        self.keys = torch.zeros(shape, dtype=cache, device=device)
        self.values = torch.zeros(shape, dtype=cache, device=device)
        self.tables = rope_tables(self.capacity, gemma.head_dim, device)
        times = step_times(config.num_steps)
        self._times = times
        self._strengths = rtc.step_weights(np.asarray(times)).tolist()
        self._clean_rows = rtc.mode == "prefix"
        fused = table.expert != "split"
        if self._clean_rows and fused:
            raise ValueError("fused expert stages have one modulation a launch; mode prefix needs expert=split")
        self._glue = {name: table.glue(name) for name in GLUE}
        self._attention: dict[tuple[int, int, bool], object] = {}
        tokens, width = views * config.image_tokens, config.vision.width
        self.vision_x = torch.empty(tokens, width, dtype=torch.float32, device=device)
        self.patches = torch.empty(tokens, padded_patch(config.vision.patch), dtype=dtype, device=device)
        self.features = torch.empty(tokens, gemma.width, dtype=dtype, device=device)
        self.prefix_x = torch.empty(self.max_rows, gemma.width, dtype=torch.float32, device=device)
        self.x = torch.empty(config.horizon, config.max_action_dim, dtype=torch.float32, device=device)
        self.suffix_x = torch.empty(config.horizon, expert.width, dtype=torch.float32, device=device)
        self.suffix_h = torch.empty(config.horizon, expert.width, dtype=dtype, device=device)
        self._fused_scale = weights.modulations.fused_scale() if fused else None
        if weights.loop is not None:
            last = weights.modulations.scale[-1, :, 0], weights.modulations.shift[-1, :, 0]
            weights.loop.set_flow(weights.flow, last, times, self._strengths)
        self._expert_attention: ExpertAttention | None = None
        if table.expert == "cluster":
            self._expert_attention = ExpertAttention(
                config.horizon, expert.heads, expert.kv_heads, expert.head_dim, pdl=table.pdl
            )

    # ---- vision ------------------------------------------------------------------------------------------

    def run_vision(self, inputs: Inputs) -> None:
        """Images to prefix features of all views."""
        w, x, config = self.weights, self.vision_x, self.config.vision
        self._glue["cut_patches"](inputs.images, self.patches, x, w.patch_bias, config.patch)
        bias: Tensor | None = None
        addend = F.linear(self.patches, w.patch)
        for layer in w.vision:
            h = self._layer_normed(layer.norm1, layer.qkv.input_dtype, addend, bias)
            qkv = self._vision_product(layer.qkv, h)
            seen = self._glue["vision_attention"](qkv, config.heads, self.config.image_tokens, layer.seen_scale)
            h = self._vision_out(layer, seen)
            act = self._vision_product(layer.fc1, h, gelu=True, out_scale=layer.fc2.input_scale)
            addend, bias = self._vision_product(layer.fc2, act), layer.fc2_bias
        w.projector(self._layer_normed(w.post_norm, w.dtype, addend, bias), out=self.features)

    def _vision_out(self, layer: VisionLayer, seen: Tensor) -> Tensor:
        """The product behind attention onto vision_x, then its norm: in one launch where both are FP8."""
        whole, dtype = layer.out.whole(), layer.fc1.input_dtype
        if self.table.vision_norm == "out" and whole is not None and whole[0].dtype == dtype == torch.float8_e4m3fn:
            return norm_product(seen, *whole, self.vision_x, layer.norm2, layer.out_bias, pdl=self.table.pdl)
        return self._layer_normed(layer.norm2, dtype, self._vision_product(layer.out, seen), layer.out_bias)

    def _vision_product(
        self, product: Projection, x: Tensor, *, gelu: bool = False, out_scale: float | None = None
    ) -> Tensor:
        """The product, with its bias where it has one, or its GELU; the GELU in FP8 with ``out_scale``."""
        whole = product.whole()
        if self.table.vision_product == "hopper" and whole is not None and pays(x.dtype, x.shape[0], *whole[0].shape):
            pdl = self.table.pdl
            return hopper_product(x, *whole, bias=product.bias, gelu=gelu, out_scale=out_scale, pdl=pdl)
        if out_scale is None:
            return product.gelu(x) if gelu else product(x)
        y = product(x)
        act = torch.empty(y.shape, dtype=torch.float8_e4m3fn, device=self.device)
        self._glue["gelu_quantise"](y, act, out_scale)
        return act

    def _layer_normed(
        self, norm: tuple[Tensor, Tensor], dtype: torch.dtype, addend: Tensor, bias: Tensor | None
    ) -> Tensor:
        """vision_x += addend + bias, then its norm; in FP8 the norm comes folded with a scale that holds any row."""
        h = torch.empty(self.vision_x.shape, dtype=dtype, device=self.device)
        self._glue["add_norm"](self.vision_x, h, norm[0], shift=norm[1], addend=addend, bias=bias, layer_norm=True)
        return h

    # ---- prefix ------------------------------------------------------------------------------------------

    def run_prefix(self, inputs: Inputs, rows: int) -> None:
        """Features and prompt to the keys and values of every layer; ``rows`` prefix rows are computed."""
        w, gemma = self.weights, self.config.prefix
        x = self.prefix_x[:rows]
        self._glue["gather_rows"](self.features, w.embedding, inputs.tokens, inputs.rows[:rows], x, gemma.width**0.5)
        attention = self._attention_of(rows, gemma.heads, prefix=True)
        addend, row_scale = None, None
        for i, layer in enumerate(w.prefix):
            last = i == len(w.prefix) - 1
            h, scale = self._normed(x, layer.qkv, layer.norm1, addend, row_scale)
            heads = 0 if last else gemma.heads
            q = torch.empty(rows, heads, gemma.head_dim, dtype=w.dtype, device=self.device)
            self._prefix_qkv(h, scale, layer.qkv, q, i)
            if last:
                break
            addend, row_scale = self._attend(q, i, 0, attention, layer, inputs)
            if self.table.gate_up == "hopper" and layer.gated() is not None:
                addend, row_scale = self._gated(x, layer, addend, row_scale)
                continue
            h, scale = self._normed(x, layer.mlp_in, layer.norm2, addend, row_scale)
            addend, row_scale = self._mlp(h, scale, layer)

    def _prefix_qkv(self, h: Tensor, scale: Tensor | None, product: Projection, q: Tensor, i: int) -> None:
        """Queries, keys and values of layer ``i``, turned and in their places."""
        places, held = (q, self.keys[i], self.values[i], self.tables, None), product.held()
        if self.table.qkv == "hopper" and held is not None:
            weight, factor = held
            qkv_product(h, weight, *places, row_scale=scale, scale=factor, pdl=self.table.pdl)
            return
        self._glue["rope_split"](product(h), *places, row_scale=scale)

    def _gated(
        self, x: Tensor, layer: GemmaLayer, addend: Tensor, row_scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's second norm and its MLP with GeGLU in the product's launch; what `_mlp` returns."""
        gated, down = layer.gated(), layer.down
        assert gated is not None
        assert down is not None
        weight, factor = gated
        if not down.quantised:
            h, _ = self._normed(x, layer.mlp_in, layer.norm2, addend, row_scale)
            return self._down(gate_up_product(h, weight, pdl=self.table.pdl), down), None
        assert layer.act_factor is not None
        squares, act_scale = torch.empty(2, x.shape[0], dtype=torch.float32, device=self.device)
        h, scale = self._normed(x, layer.mlp_in, layer.norm2, addend, row_scale, squares=squares)
        act = gate_up_product(
            h, weight, row_scale=scale, squares=squares, out_scale=act_scale, weight_scale=factor,
            out_factor=layer.act_factor, pdl=self.table.pdl,
        )  # fmt: skip
        return self._down(act, down), act_scale

    def _down(self, act: Tensor, product: Projection) -> Tensor:
        """The product behind GeGLU."""
        held = product.held()
        if self.table.down == "hopper" and held is not None:
            n, k = held[0].shape
            if pays_in_pairs(act.dtype, act.shape[0], n, k, multiprocessors(self.device)):
                return down_product(act, *held, pdl=self.table.pdl)
        return product(act)

    # ---- action expert -----------------------------------------------------------------------------------

    def run_denoise(self, inputs: Inputs) -> None:
        """Noise to actions in ``x``: all flow steps."""
        loop = self.weights.loop
        if loop is not None:
            loop.start()
            loop(inputs.noise, self.x, inputs.guide, self.keys, self.values, inputs.valid, self.tables)
            return
        fused = self.table.expert != "split"
        step = self._glue["flow_step"]
        h = self.suffix_h if fused else self.suffix_x
        n = self.config.num_steps
        self.x.copy_(inputs.noise)
        common = (self.weights.flow, inputs.guide)
        step(h, self.x, h, *common, 0.0, 0.0, 0.0, first=True)
        modulations = self.weights.modulations
        for k, (t, strength) in enumerate(zip(self._times, self._strengths, strict=True)):
            if fused:
                if self.table.expert == "cluster":
                    self._cluster_step(k, inputs)
                else:
                    self._fused_step(k, inputs)
                last = modulations.scale[-1, k, 0], modulations.shift[-1, k, 0]
                step(h, self.x, h, *common, t, 1.0 / n, strength, norm=last)
            else:
                normed = self._split_step(k, inputs)
                step(normed, self.x, h, *common, t, 1.0 / n, strength)

    def _cluster_step(self, k: int, inputs: Inputs) -> None:
        config, m, h = self.config.expert, self.weights.modulations, self.suffix_h
        assert self._fused_scale is not None
        assert self._expert_attention is not None
        q = torch.empty(self.config.horizon, config.heads, config.head_dim, dtype=h.dtype, device=self.device)
        seen = torch.empty_like(q)
        act = torch.empty(self.config.horizon, config.mlp_dim, dtype=h.dtype, device=self.device)
        for i, layer in enumerate(self.weights.cluster):
            first, second = 2 * i, 2 * i + 1
            keys, values = self.keys[i], self.values[i]
            layer.qkv(
                h, q, factor=self._fused_scale[first, k], shift=layer.qkv_shift[k], caches=(keys, values),
                tables=self.tables, start=inputs.valid,
            )  # fmt: skip
            self._expert_attention(q, keys, values, inputs.valid, seen)
            layer.out(seen.flatten(1), h, gate=m.gate[first, k, 0])
            layer.gate_up(h, act, factor=self._fused_scale[second, k], shift=layer.gate_up_shift[k])
            layer.down(act, h, gate=m.gate[second, k, 0])

    def _fused_step(self, k: int, inputs: Inputs) -> None:
        config, m, h = self.config.expert, self.weights.modulations, self.suffix_h
        assert self._fused_scale is not None
        pdl = self.table.pdl
        rows = self.config.horizon
        attention = self._attention_of(rows, config.heads)
        q = torch.empty(rows, config.heads, config.head_dim, dtype=h.dtype, device=self.device)
        seen = torch.empty_like(q)
        for i, layer in enumerate(self.weights.fused):
            first, second = 2 * i, 2 * i + 1
            keys, values = self.keys[i], self.values[i]
            layer.qkv(
                h,
                self._fused_scale[first, k],
                layer.qkv_shift[k],
                q,
                keys,
                values,
                self.tables,
                inputs.valid,
                pdl=pdl,
            )
            attention(q, keys, values, inputs.valid, rows, seen)  # type: ignore[operator]
            layer.out(seen.flatten(1), out=h, residual=h, gate=m.gate[first, k, 0], pdl=pdl)
            norm = NormPrologue(self._fused_scale[second, k], layer.gate_shift[k], layer.up_shift[k])
            act = layer.gate_up(h, norm=norm, pdl=pdl)
            layer.down(act, out=h, residual=h, gate=m.gate[second, k, 0], pdl=pdl)

    def _split_step(self, k: int, inputs: Inputs) -> Tensor:
        """One pass of the expert over ``suffix_x``; the normed output."""
        config, x = self.config.expert, self.suffix_x
        rows = self.config.horizon
        attention = self._attention_of(rows, config.heads)
        addend: Tensor | None = None
        row_scale: Tensor | None = None
        clean = inputs.guide.clean if self._clean_rows else None
        site = 0

        def modulated(product: Projection | PackedGateUp | None) -> tuple[Tensor, Tensor | None]:
            """The next norm of the sequence: adds what came before, gated as its own norm says."""
            nonlocal site
            m = self.weights.modulations
            pick = slice(None) if clean is not None else 0
            gate = m.gate[site - 1, k, pick] if addend is not None else None
            scale, shift = m.scale[site, k, pick], m.shift[site, k, pick]
            site += 1
            return self._normed(x, product, scale, addend, row_scale, shift=shift, gate=gate, clean=clean)

        for i, layer in enumerate(self.weights.expert):
            h, scale = modulated(layer.qkv)
            q = torch.empty(rows, config.heads, config.head_dim, dtype=self.weights.dtype, device=self.device)
            keys, values = self.keys[i], self.values[i]
            self._glue["rope_split"](layer.qkv(h), q, keys, values, self.tables, inputs.valid, row_scale=scale)
            addend, row_scale = self._attend(q, i, rows, attention, layer, inputs)
            h, scale = modulated(layer.mlp_in)
            addend, row_scale = self._mlp(h, scale, layer)
        return modulated(None)[0]

    # ---- what prefix and expert share --------------------------------------------------------------------

    def _attention_of(self, rows: int, heads: int, *, prefix: bool = False) -> object:
        gemma, key = self.config.prefix, (rows, heads, prefix)
        if key not in self._attention:
            self._attention[key] = self.table.make_attention(
                rows, heads, gemma.kv_heads, gemma.head_dim, self.capacity, self.device, prefix=prefix
            )
        return self._attention[key]

    def _normed(
        self,
        x: Tensor,
        product: Projection | PackedGateUp | None,
        scale: Tensor | None,
        addend: Tensor | None,
        row_scale: Tensor | None,
        *,
        shift: Tensor | None = None,
        gate: Tensor | None = None,
        clean: Tensor | None = None,
        squares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x += addend, then its norm in the form that ``product`` takes: (rows, their scale or None).

        squares: receives the sum of each row's squares.
        """
        quantised = isinstance(product, Projection) and product.quantised
        dtype = torch.float8_e4m3fn if quantised else self.weights.dtype
        h = torch.empty(x.shape, dtype=dtype, device=self.device)
        out_scale = torch.empty(x.shape[0], dtype=torch.float32, device=self.device) if quantised else None
        self._glue["add_norm"](
            x,
            h,
            scale,
            shift=shift,
            addend=addend,
            row_scale=row_scale,
            gate=gate,
            out_scale=out_scale,
            out_squares=squares,
            clean=clean,
        )
        return h, out_scale

    def _quantised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=self.device)
        scale = torch.empty(x.shape[0], dtype=torch.float32, device=self.device)
        self._glue["quantise_rows"](x, out, scale)
        return out, scale

    def _attend(
        self, q: Tensor, i: int, extra: int, attention: object, layer: GemmaLayer, inputs: Inputs
    ) -> tuple[Tensor, Tensor | None]:
        """Attention and its output projection: the product, and the scale of its rows if that is still to apply."""
        assert layer.out is not None
        if layer.out.quantised and isinstance(attention, PrefixAttention):
            eight = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device=self.device)
            scale = torch.empty(q.shape[0], dtype=torch.float32, device=self.device)
            attention(q, self.keys[i], self.values[i], inputs.valid, extra, eight, out_scale=scale)
            return layer.out(eight.flatten(1)), scale
        seen = torch.empty_like(q)
        attention(q, self.keys[i], self.values[i], inputs.valid, extra, seen)  # type: ignore[operator]
        rows = seen.flatten(1)
        if not layer.out.quantised:
            return layer.out(rows), None
        rows, scale = self._quantised(rows)
        return layer.out(rows), scale

    def _mlp(self, h: Tensor, scale: Tensor | None, layer: GemmaLayer) -> tuple[Tensor, Tensor | None]:
        """GeGLU: the down projection's product, and the scale of its rows if that is still to apply."""
        assert layer.mlp_in is not None
        assert layer.down is not None
        if isinstance(layer.mlp_in, PackedGateUp):
            act = layer.mlp_in(h)
            if not layer.down.quantised:
                return self._down(act, layer.down), None
            act, act_scale = self._quantised(act)
            return self._down(act, layer.down), act_scale
        both = layer.mlp_in(h)
        shape = (both.shape[0], both.shape[1] // 2)
        if not layer.down.quantised:
            act = torch.empty(shape, dtype=self.weights.dtype, device=self.device)
            self._glue["geglu"](both, act, row_scale=scale)
            return self._down(act, layer.down), None
        act = torch.empty(shape, dtype=torch.float8_e4m3fn, device=self.device)
        act_scale = torch.empty(shape[0], dtype=torch.float32, device=self.device)
        self._glue["geglu"](both, act, row_scale=scale, out_scale=act_scale)
        return self._down(act, layer.down), act_scale
