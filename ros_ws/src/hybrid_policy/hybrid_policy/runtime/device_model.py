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

from hybrid_policy.kernels.expert import ExpertAttention
from hybrid_policy.kernels.flow_step import Guide
from hybrid_policy.kernels.gate_up import NormPrologue, PackedGateUp
from hybrid_policy.kernels.qkv import rope_tables
from hybrid_policy.models.flow import step_times
from hybrid_policy.runtime.device_weights import DeviceWeights, GemmaLayer
from hybrid_policy.runtime.projection import Projection
from hybrid_policy.runtime.rtc import RealTimeChunking
from hybrid_policy.runtime.stages import StageTable


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
        self._glue = {
            name: table.glue(name) for name in ("add_norm", "geglu", "quantise_rows", "rope_split", "flow_step")
        }
        self._attention: dict[tuple[int, int], object] = {}
        tokens, width = views * config.image_tokens, config.vision.width
        self._patches = tokens
        self.vision_x = torch.empty(tokens, width, dtype=torch.float32, device=device)
        self.vision_h = torch.empty(tokens, width, dtype=dtype, device=device)
        self.features = torch.empty(tokens, gemma.width, dtype=dtype, device=device)
        self.prefix_x = torch.empty(self.max_rows, gemma.width, dtype=torch.float32, device=device)
        self.x = torch.empty(config.horizon, config.max_action_dim, dtype=torch.float32, device=device)
        self.suffix_x = torch.empty(config.horizon, expert.width, dtype=torch.float32, device=device)
        self.suffix_h = torch.empty(config.horizon, expert.width, dtype=dtype, device=device)
        self._fused_scale = weights.modulations.fused_scale() if fused else None
        self._expert_attention: ExpertAttention | None = None
        if table.expert == "cluster":
            self._expert_attention = ExpertAttention(
                config.horizon, expert.heads, expert.kv_heads, expert.head_dim, pdl=table.pdl
            )

    # ---- vision ------------------------------------------------------------------------------------------

    def run_vision(self, inputs: Inputs) -> None:
        """Images to prefix features of all views."""
        w, add_norm = self.weights, self._glue["add_norm"]
        config = self.config.vision
        x, h = self.vision_x, self.vision_h
        patches = self._cut(inputs.images)
        y = F.linear(patches, w.patch).unflatten(0, (self.views, -1))
        torch.add(y, w.patch_bias, out=x.unflatten(0, (self.views, -1)))
        bias: Tensor | None = None
        addend: Tensor | None = None
        for layer in w.vision:
            add_norm(x, h, layer.norm1[0], shift=layer.norm1[1], addend=addend, bias=bias, layer_norm=True)
            heads = layer.qkv(h).view(self.views, -1, 3, config.heads, config.head_dim)
            q, k, v = (part.transpose(1, 2) for part in heads.unbind(2))
            seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
            addend, bias = layer.out(seen), layer.out_bias
            add_norm(x, h, layer.norm2[0], shift=layer.norm2[1], addend=addend, bias=bias, layer_norm=True)
            addend, bias = layer.fc2(layer.fc1.gelu(h)), layer.fc2_bias
        add_norm(x, h, w.post_norm[0], shift=w.post_norm[1], addend=addend, bias=bias, layer_norm=True)
        self.features.copy_(w.projector(h))

    def _cut(self, images: Tensor) -> Tensor:
        """Patches [V * P, 3 * p * p] in [-1, 1], in the order of the convolution's weight."""
        p = self.config.vision.patch
        side = self.config.image_size // p
        if images.dtype == torch.uint8:
            images = images.permute(0, 3, 1, 2)
        cut = images[..., : side * p, : side * p].unflatten(-1, (side, p)).unflatten(2, (side, p))
        cut = cut.permute(0, 2, 4, 1, 3, 5).reshape(self._patches, -1)
        if images.dtype == torch.uint8:
            return (cut.float() * (2.0 / 255.0) - 1.0).to(self.weights.dtype)
        return cut.to(self.weights.dtype)

    # ---- prefix ------------------------------------------------------------------------------------------

    def run_prefix(self, inputs: Inputs, rows: int) -> None:
        """Features and prompt to the keys and values of every layer; ``rows`` prefix rows are computed."""
        w, gemma = self.weights, self.config.prefix
        words = w.embedding.index_select(0, inputs.tokens).float() * gemma.width**0.5
        together = torch.cat((self.features.float(), words))
        x = self.prefix_x[:rows]
        torch.index_select(together, 0, inputs.rows[:rows], out=x)
        attention = self._attention_of(rows, self.config.prefix.heads)
        addend, row_scale = None, None
        for i, layer in enumerate(w.prefix):
            last = i == len(w.prefix) - 1
            h, scale = self._normed(x, layer.qkv, layer.norm1, addend, row_scale)
            heads = 0 if last else gemma.heads
            q = torch.empty(rows, heads, gemma.head_dim, dtype=w.dtype, device=self.device)
            keys, values = self.keys[i], self.values[i]
            self._glue["rope_split"](layer.qkv(h), q, keys, values, self.tables, None, row_scale=scale)
            if last:
                break
            addend, row_scale = self._attend(q, i, 0, attention, layer, inputs)
            assert layer.mlp_in is not None
            h, scale = self._normed(x, layer.mlp_in, layer.norm2, addend, row_scale)
            addend, row_scale = self._mlp(h, scale, layer)

    # ---- action expert -----------------------------------------------------------------------------------

    def run_denoise(self, inputs: Inputs) -> None:
        """Noise to actions in ``x``: all flow steps."""
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

    def _attention_of(self, rows: int, heads: int) -> object:
        gemma = self.config.prefix
        if (rows, heads) not in self._attention:
            self._attention[rows, heads] = self.table.make_attention(
                rows, heads, gemma.kv_heads, gemma.head_dim, self.capacity, self.device
            )
        return self._attention[rows, heads]

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
    ) -> tuple[Tensor, Tensor | None]:
        """x += addend, then its norm in the form that ``product`` takes: (rows, their scale or None)."""
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
                return layer.down(act), None
            act, act_scale = self._quantised(act)
            return layer.down(act), act_scale
        both = layer.mlp_in(h)
        shape = (both.shape[0], both.shape[1] // 2)
        if not layer.down.quantised:
            act = torch.empty(shape, dtype=self.weights.dtype, device=self.device)
            self._glue["geglu"](both, act, row_scale=scale)
            return layer.down(act), None
        act = torch.empty(shape, dtype=torch.float8_e4m3fn, device=self.device)
        act_scale = torch.empty(shape[0], dtype=torch.float32, device=self.device)
        self._glue["geglu"](both, act, row_scale=scale, out_scale=act_scale)
        return layer.down(act), act_scale
