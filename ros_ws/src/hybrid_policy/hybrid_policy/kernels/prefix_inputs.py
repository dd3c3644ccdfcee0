"""What vision and the prefix read, in one pass each: images cut to patches, features and prompt gathered to rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.norm import pdl_option


def padded_patch(patch: int) -> int:
    """Columns of a cut patch: 3 * patch² rounded up to 16 values, or a GEMM reads it two bytes at a time."""
    return -(-3 * patch * patch // 16) * 16


def cut_patches_reference(images: Tensor, out: Tensor, x: Tensor, position: Tensor, patch: int) -> None:
    """The mathematics of `cut_patches`, in plain PyTorch."""
    is_bytes = images.dtype == torch.uint8
    if is_bytes:
        images = images.permute(0, 3, 1, 2)
    side = images.shape[-1] // patch
    cut = images[..., : side * patch, : side * patch].unflatten(-1, (side, patch)).unflatten(2, (side, patch))
    cut = cut.permute(0, 2, 4, 1, 3, 5).reshape(len(out), -1).float()
    out.zero_()
    out[:, : cut.shape[1]] = cut * (2.0 / 255.0) - 1.0 if is_bytes else cut
    x.copy_(position.repeat(images.shape[0], 1))


@triton.jit
def _cut_patches_kernel(
    images_ptr, out_ptr, x_ptr, position_ptr, size, side,
    PATCH: tl.constexpr, PADDED: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    view = row // (side * side)
    place = row % (side * side)
    k = tl.arange(0, BLOCK_K)
    channel = k // (PATCH * PATCH)
    within = k % (PATCH * PATCH)
    iy = place // side * PATCH + within // PATCH
    ix = place % side * PATCH + within % PATCH
    inside = k < 3 * PATCH * PATCH
    if BYTES:  # [V, S, S, 3]
        pixel = tl.load(images_ptr + ((view * size + iy) * size + ix) * 3 + channel, mask=inside, other=0)
        value = pixel.to(tl.float32) * (2.0 / 255.0) - 1.0
    else:  # [V, 3, S, S]
        value = tl.load(images_ptr + ((view * 3 + channel) * size + iy) * size + ix, mask=inside, other=0.0)
    value = tl.where(inside, value, 0.0)
    tl.store(out_ptr + row * PADDED + k, value.to(out_ptr.dtype.element_ty), mask=k < PADDED)
    w = tl.arange(0, BLOCK_W)
    position = tl.load(position_ptr + place * WIDTH + w, mask=w < WIDTH, other=0.0)
    tl.store(x_ptr + row * WIDTH + w, position, mask=w < WIDTH)


def cut_patches(images: Tensor, out: Tensor, x: Tensor, position: Tensor, patch: int, *, pdl: bool = False) -> None:
    """Patches in [-1, 1] in the order of the convolution's weight, and the residual stream's start.

    Args:
        images: uint8 [V, S, S, 3], or float32 [V, 3, S, S] in [-1, 1].
        out: [V * P, padded_patch(patch)]: channel, row, column of each patch, then zeros.
        x: float32 [V * P, width], receives ``position`` for each view.
        position: float32 [P, width]: position embedding and the convolution's bias.
        pdl: taken like the other stages do, and without effect: what comes before is a copy, not a kernel.
    """
    size = images.shape[1] if images.dtype == torch.uint8 else images.shape[-1]
    side = size // patch
    rows, padded = out.shape
    width = x.shape[1]
    if rows != images.shape[0] * side * side or padded != padded_patch(patch) or x.shape[0] != rows:
        got = (tuple(images.shape), tuple(out.shape), tuple(x.shape))
        raise InputError.at("cut_patches", "images, out, x", got, f"patches of {patch} pixels in rows, padded to 16")
    _cut_patches_kernel[(rows,)](
        images, out, x, position, size, side,
        PATCH=patch, PADDED=padded, BLOCK_K=triton.next_power_of_2(padded), WIDTH=width,
        BLOCK_W=triton.next_power_of_2(width), BYTES=images.dtype == torch.uint8, num_warps=4,
    )  # fmt: skip


def gather_rows_reference(
    features: Tensor, embedding: Tensor, tokens: Tensor, rows: Tensor, x: Tensor, factor: float
) -> None:
    """The mathematics of `gather_rows`, in plain PyTorch."""
    words = embedding.index_select(0, tokens).float() * factor
    torch.index_select(torch.cat((features.float(), words)), 0, rows, out=x)


@triton.jit
def _gather_rows_kernel(
    features_ptr, embedding_ptr, tokens_ptr, rows_ptr, x_ptr, patches, factor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < WIDTH
    source = tl.load(rows_ptr + row)
    token = tl.load(tokens_ptr + tl.maximum(source - patches, 0))
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    is_word = source >= patches
    word = tl.load(embedding_ptr + token * WIDTH + col, mask=inside & is_word, other=0.0).to(tl.float32)
    feature = tl.load(features_ptr + source * WIDTH + col, mask=inside & (source < patches), other=0.0).to(tl.float32)
    tl.store(x_ptr + row * WIDTH + col, tl.where(is_word, word * factor, feature), mask=inside)


def gather_rows(
    features: Tensor,
    embedding: Tensor,
    tokens: Tensor,
    rows: Tensor,
    x: Tensor,
    factor: float,
    *,
    pdl: bool = False,
) -> None:
    """The prefix's residual stream: row r of ``x`` is row ``rows[r]`` of (features, prompt's embeddings).

    Args:
        features: [P, width]. embedding: [vocabulary, width], multiplied by ``factor``.
        tokens: int64 [T]. rows: int64 [M]: below P a feature, else token ``rows[r] - P``. x: float32 [M, width].
    """
    patches, width = features.shape
    if x.shape != (len(rows), width) or embedding.shape[1] != width or x.dtype != torch.float32:
        raise InputError.at("gather_rows", "x", (tuple(x.shape), x.dtype), f"float32 [{len(rows)}, {width}]")
    _gather_rows_kernel[(len(rows),)](
        features, embedding, tokens, rows, x, patches, factor,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), PDL=pdl, num_warps=4, **pdl_option(pdl),
    )  # fmt: skip
