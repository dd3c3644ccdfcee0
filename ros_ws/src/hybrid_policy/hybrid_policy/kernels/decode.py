"""Triton building blocks of the low-bit kernels: NVFP4 decode, FP8 encode, prefetch, dependent launch.

Every block has two forms, chosen by a constexpr: the hardware's (inline PTX, bfloat16) and EXACT, plain float32
arithmetic for Triton's interpreter, which has no inline PTX and whose bfloat16 and FP8 conversions are wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Four pairs of a word (see packing.py), each multiplied by the group's scale: $4 the word, $5 the scale twice.
#: Products are written as fma with -0, which is the same number and, unlike mul.bf16x2, exists before sm_90.
_DECODE_WORD: tl.constexpr = tl.constexpr("""
{
    .reg .b32 a, b, c, d, t, u, z;
    mov.b32 z, 0x80008000;
    and.b32 a, $4, 0x81C081C0;
    shl.b32 t, $4, 3;
    shl.b32 u, $4, 2;
    lop3.b32 b, t, u, 0x81C081C0, 0x28;
    shl.b32 t, $4, 6;
    and.b32 c, t, 0x81C081C0;
    shl.b32 t, $4, 1;
    shr.u32 u, $4, 4;
    lop3.b32 d, t, u, 0x81C081C0, 0x28;
    fma.rn.bf16x2 $0, a, $5, z;
    fma.rn.bf16x2 $1, b, $5, z;
    fma.rn.bf16x2 $2, c, $5, z;
    fma.rn.bf16x2 $3, d, $5, z;
}
""")

#: E4M3 bits placed in a bfloat16 are s * 2**-120 (subnormals included); times 2**119 times 2**120 is s * 2**119.
_EXPAND_SCALE: tl.constexpr = tl.constexpr("""
{
    .reg .b32 t, u, v, z;
    mov.b32 z, 0x80008000;
    mov.b32 u, 0x7B007B00;
    mov.b32 v, 0x7B807B80;
    fma.rn.bf16x2 t, $1, u, z;
    fma.rn.bf16x2 $0, t, v, z;
}
""")

_PREFETCH_LINE: tl.constexpr = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")

#: A decoded value is v * s * 2**-7: the epilogue multiplies by 2**7 * global (see ``NVFP4_ROW_FACTOR``).
NVFP4_ROW_FACTOR = 128.0


@triton.jit
def nvfp4_tile(words, scales, BN: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr):
    """words int32 [BN, BK/8], scales uint8 [BN, BK/16] -> [BN, BK] of v * s * 2**-7 (bf16; EXACT: float32)."""
    if EXACT:
        bits = scales.to(tl.int32)
        exponent = bits >> 3
        mantissa = (bits & 7).to(tl.float32)
        # 2**(e - 10) from an fp32 exponent field; a subnormal is m * 2**-9.
        power = ((tl.maximum(exponent, 1) + 117) << 23).to(tl.float32, bitcast=True)
        scale = tl.where(exponent == 0, mantissa, mantissa + 8.0) * power * 0.0078125
        scale = tl.broadcast_to(scale.reshape(BN, BK // 16, 1), (BN, BK // 16, 2)).reshape(BN, BK // 8)
        p0 = words & -2118090304
        p1 = ((words << 3) ^ (words << 2)) & -2118090304
        p2 = (words << 6) & -2118090304
        p3 = ((words << 1) ^ ((words >> 4) & 0x0FFFFFFF)) & -2118090304
        pairs = tl.join(tl.join(p0, p2), tl.join(p1, p3))
        halves = tl.join(pairs & 0xFFFF, (pairs >> 16) & 0xFFFF)
        index = (halves >> 6) & 7
        two_e = ((tl.maximum(index >> 1, 1) + 126) << 23).to(tl.float32, bitcast=True)
        mantissa_v = (index & 1).to(tl.float32) * 0.5
        value = tl.where(index < 2, mantissa_v, 1.0 + mantissa_v) * two_e
        value = tl.where(halves >= 0x8000, -value, value)
        return value.reshape(BN, BK) * tl.broadcast_to(scale.reshape(BN, BK // 8, 1), (BN, BK // 8, 8)).reshape(BN, BK)
    else:
        bits = scales.to(tl.int32) << 4
        scale = tl.inline_asm_elementwise(
            _EXPAND_SCALE, "=r,r", [bits | (bits << 16)], dtype=tl.int32, is_pure=True, pack=1
        )
        scale = tl.broadcast_to(scale.reshape(BN, BK // 16, 1), (BN, BK // 16, 2)).reshape(BN, BK // 8)
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            _DECODE_WORD,
            "=r,=r,=r,=r,r,r",
            [words, scale],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        pairs = tl.join(tl.join(p0, p2), tl.join(p1, p3))
        halves = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
        return halves.to(tl.bfloat16, bitcast=True).reshape(BN, BK)


@triton.jit
def round_e4m3(x):
    """float32 -> the nearest E4M3 value as float32, ties to even, |x| <= 464 (rounds into 448); NaN kept."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
    # Below 2**-6 the spacing is 2**-9: adding and subtracting 1.5 * 2**14 rounds to it in float32.
    small = (x + 24576.0) - 24576.0
    out = tl.where(tl.abs(x) < 0.015625, small, rounded)
    out = tl.minimum(tl.maximum(out, -448.0), 448.0)
    return tl.where(x != x, x, out)  # noqa: PLR0124 (NaN)


@triton.jit
def fp8_scale(amax):
    """(scale, 1 / scale): the least power of two with amax / scale <= 448; Inf (and 1) where amax is Inf.

    E4M3 is a floating format, so a power of two costs no precision above its subnormals, multiplies exactly and
    needs no division.
    """
    bits = amax.to(tl.int32, bitcast=True)
    # 448 = 1.75 * 2**8: a mantissa above 1.75 needs the next power.
    exponent = tl.maximum((bits >> 23) - 8 + tl.where((bits & 0x7FFFFF) > 0x600000, 1, 0), 1)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    finite = bits < 0x7F800000
    return tl.where(finite, scale, float("inf")), tl.where(finite, inverse, 1.0)


@triton.jit
def fp8_group(x, EXACT: tl.constexpr):
    """x float32 [BM, G] -> (E4M3 [BM, G], float32 scales [BM]), one scale a row.

    A NaN stays NaN in the values; an Inf makes the scale Inf: products are Inf or NaN either way.
    """
    scale, inverse = fp8_scale(tl.max(tl.abs(x), axis=1))
    scaled = x * inverse[:, None]
    if EXACT:
        return round_e4m3(scaled), scale
    else:
        return scaled.to(tl.float8e4nv), scale


@triton.jit
def prefetch_lines(base, lines):
    """Ask L2 for the 128-byte lines at byte offsets ``lines`` (int tensor) from ``base``."""
    tl.inline_asm_elementwise(
        _PREFETCH_LINE,
        "=r,l",
        [base.to(tl.pointer_type(tl.uint8)) + lines],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_acquire(pointer):
    """One int32 by every thread; what another program released before it is visible behind this load."""
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [pointer], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def gelu_tanh(x, EXACT: tl.constexpr):
    """tanh-approximated GELU by a sigmoid: x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3).

    The hardware form takes 2^t and 1/t from the special-function unit (relative error 2e-7 together).
    """
    # -2 u log2(e)
    t = x * (-2.302208198144325 - 0.10294324 * x * x)
    if EXACT:
        return x / (1.0 + tl.exp2(t))
    else:
        return x * tl.inline_asm_elementwise(
            "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.ftz.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
            "=f,f",
            [t],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
