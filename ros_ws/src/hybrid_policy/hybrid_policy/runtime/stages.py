"""Which implementation runs each stage of the device model: an explicit table, chosen at load and logged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from hybrid_policy.errors import InputError
from hybrid_policy.kernels import attention, flow_step, norm, prefix_attention, prefix_inputs, qkv, vision_attention

Implementation = Literal["reference", "kernel"]

#: stage -> (plain PyTorch, kernel); both have one signature
GLUE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "add_norm": (norm.add_norm_reference, norm.add_norm),
    "geglu": (norm.geglu_reference, norm.geglu),
    "quantise_rows": (norm.quantise_rows_reference, norm.quantise_rows),
    "gelu_quantise": (norm.gelu_quantise_reference, norm.gelu_quantise),
    "vision_attention": (vision_attention.vision_attention_reference, vision_attention.vision_attention),
    "cut_patches": (prefix_inputs.cut_patches_reference, prefix_inputs.cut_patches),
    "gather_rows": (prefix_inputs.gather_rows_reference, prefix_inputs.gather_rows),
    "rope_split": (qkv.rope_split_reference, qkv.rope_split),
    "flow_step": (flow_step.flow_step_reference, flow_step.flow_step),
}
STAGES = (*GLUE, "attention", "prefix_attention", "vision_product", "vision_norm", "gate_up", "qkv", "down", "expert")
#: what the stages that are no glue may be
_CHOICES = {
    "expert": ("loop", "cluster", "fused", "split"),
    "prefix_attention": ("hopper", "kernel", "reference"),
    "vision_product": ("hopper", "library"),
    "vision_norm": ("out", "apart"),
    "gate_up": ("hopper", "library"),
    "qkv": ("hopper", "library"),
    "down": ("hopper", "library"),
    "pdl": ("on", "off"),
}


@dataclass(frozen=True)
class StageTable:
    """stage -> implementation.

    ``expert`` is ``loop`` (kernels/expert_loop.py), ``cluster`` (kernels/expert.py), ``fused`` (Triton) or ``split``
    (norm, GEMM, glue). ``prefix_attention`` is ``hopper`` (kernels/prefix_attention.py), or as ``attention``.
    ``vision_product``: vision's products by ``hopper`` (kernels/hopper_product.py), where that pays, or the library.
    ``vision_norm``: vision's residual and norm behind attention in the launch of ``out``, the product before them
    (kernels/norm_product.py; layers whose ``out`` and fc1 are FP8, the others as with ``apart``), or ``apart`` in a
    launch of their own. Those behind fc2 always are: together took longer.
    ``gate_up``: the prefix's gate and up with their GeGLU in one launch (``hopper``, kernels/gate_up_product.py; layers
    that it does not take by the library all the same), or by the library and a pass behind it.
    ``qkv``: the prefix's queries, keys and values with their RoPE in one launch (``hopper``, kernels/qkv_product.py),
    or by the library and ``rope_split`` behind it, as are FP8 weights with several scales either way.
    ``down``: the prefix's product behind GeGLU by pairs of blocks (``hopper``, kernels/down_product.py) where that
    pays, or by the library.

    pdl: kernels may start before their predecessor ends (programmatic dependent launch).
    """

    add_norm: Implementation = "kernel"
    geglu: Implementation = "kernel"
    quantise_rows: Implementation = "kernel"
    gelu_quantise: Implementation = "kernel"
    vision_attention: Implementation = "kernel"
    cut_patches: Implementation = "kernel"
    gather_rows: Implementation = "kernel"
    rope_split: Implementation = "kernel"
    flow_step: Implementation = "kernel"
    attention: Implementation = "kernel"
    prefix_attention: Literal["hopper", "kernel", "reference"] = "hopper"
    vision_product: Literal["hopper", "library"] = "hopper"
    vision_norm: Literal["out", "apart"] = "out"
    gate_up: Literal["hopper", "library"] = "hopper"
    qkv: Literal["hopper", "library"] = "hopper"
    down: Literal["hopper", "library"] = "hopper"
    expert: Literal["loop", "cluster", "fused", "split"] = "loop"
    pdl: bool = True

    def glue(self, stage: str) -> Callable[..., Any]:
        """The function of a glue stage."""
        reference, kernel = GLUE[stage]
        if getattr(self, stage) == "reference":
            return reference
        return partial(kernel, pdl=True) if self.pdl else kernel

    def make_attention(
        self,
        rows: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        device: torch.device,
        *,
        prefix: bool = False,
    ) -> Callable[..., None]:
        """Attention of one shape: called with (q, k, v, valid, extra, out).

        prefix: of the prefix's rows; a `prefix_attention.PrefixAttention` where the table says ``hopper``.
        """
        chosen = self.prefix_attention if prefix else self.attention
        if chosen == "hopper":
            return prefix_attention.PrefixAttention(rows, heads, capacity, device, pdl=self.pdl)
        if chosen == "kernel":
            kernel = attention.Attention(rows, heads, kv_heads, head_dim, capacity, device)
            return partial(kernel, pdl=True) if self.pdl else kernel

        def plain(q: Any, k: Any, v: Any, valid: Any, extra: int, out: Any) -> None:
            attention.attention_reference(q, k, v, valid, extra, out, head_dim**-0.5)

        return plain

    def describe(self) -> str:
        """One line for the log."""
        parts = [f"{stage} {getattr(self, stage)}" for stage in STAGES]
        return ", ".join([*parts, "pdl" if self.pdl else "no pdl"])


def plain_table() -> StageTable:
    """Everything in plain PyTorch around library GEMMs: what the kernels are compared with."""
    plain: dict[str, Any] = dict.fromkeys((*GLUE, "attention", "prefix_attention"), "reference")
    library: dict[str, Any] = dict.fromkeys(("vision_product", "gate_up", "qkv", "down"), "library")
    return StageTable(**plain, **library, vision_norm="apart", expert="split", pdl=False)


def parse_table(text: str) -> StageTable:
    """A table from ``name=value,name=value`` over the default; ``plain`` for `plain_table`.

    Raises:
        InputError: an unknown stage or implementation.
    """
    if text == "plain":
        return plain_table()
    changes: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        allowed = _CHOICES.get(name, ("reference", "kernel"))
        if name not in (*STAGES, "pdl") or value not in allowed:
            raise InputError.at("stages", name, value, f"{', '.join(STAGES)} or pdl, with {' or '.join(allowed)}")
        changes[name] = value == "on" if name == "pdl" else value
    return StageTable(**changes)
