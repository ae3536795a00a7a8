"""Triton helpers that turn numbers into codes and back; every kernel that quantises shares them.

Where PTX says in one instruction what Triton cannot say, there are two forms of the same arithmetic: PTX, and
plain Triton, which Triton's interpreter (TRITON_INTERPRET=1) runs on a CPU. FP4 codes of fp16 values take the
plain form on GPUs, too.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# 1.5 * 2^23: adding it to a float in [0, 2^22) rounds the sum to an integer, ties to even, in the low bits.
ROUND = tl.constexpr(12582912.0)
_ROUND_BITS = 0x4B400000


@triton.jit
def unpack_pair(word, BF16: tl.constexpr):
    """int32 holding two 16-bit floats -> (low, high) in float32."""
    if BF16:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def pack_pair(low, high, BF16: tl.constexpr):
    """(low, high) in float32 -> int32 holding two 16-bit floats."""
    if INTERPRETED:
        half: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
        first = low.to(half).to(tl.int16, bitcast=True).to(tl.int32)
        second = high.to(half).to(tl.int16, bitcast=True).to(tl.int32)
        return (first & 0xFFFF) | (second << 16)
    else:
        # One conversion for two values; one at a time, they go through the slow unit.
        CVT: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if BF16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
        return tl.inline_asm_elementwise(CVT, "=r,f,f", [low, high], tl.int32, is_pure=True, pack=1)


@triton.jit
def _max_of_pairs(a, b):
    """bf16 maxima of the low halves and of the high halves, in one instruction."""
    return tl.inline_asm_elementwise(
        "max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def pair_amax(words, axis: tl.constexpr, BF16: tl.constexpr):
    """Largest magnitude along `axis` of int32 that hold two 16-bit floats each, in float32."""
    if BF16 and not INTERPRETED:
        best = tl.reduce(words & 0x7FFF7FFF, axis, _max_of_pairs)
        low, high = unpack_pair(best, True)
        return tl.maximum(low, high)
    else:
        low, high = unpack_pair(words, BF16)
        return tl.max(tl.maximum(tl.abs(low), tl.abs(high)), axis=axis)


@triton.jit
def _e2m1_magnitude_bits(x):
    """The e2m1 magnitude code (0..7) of |x|, nearest with ties to the even code, in a float's low bits.

    The codes' values are a concave curve over the codes, so code(a) = rint(min(2a, a + 2, a / 2 + 4)); each
    line is rounded once, by the addition that also moves the result to the low mantissa bits. Seven
    comparisons would need twice the integer slots.
    """
    a = tl.abs(x)
    code = tl.minimum(tl.minimum(a * 2.0 + ROUND, a + (ROUND + 2.0)), a * 0.5 + (ROUND + 4.0))
    return tl.minimum(code, ROUND + 7.0).to(tl.int32, bitcast=True)


def _pack_eight() -> str:
    """PTX for `_e2m1_magnitude_bits` and packing: eight bf16, in pairs $1..$4 -> $0, eight codes.

    Pair n is multiplied by $(5 + n), its magnitudes first cut to $(9 + n) (truncated to bf16), which stands
    for the cut at code 7. 11 instructions a value against 20: a pair is compared at once, and multiply-adds,
    which leave the integer pipe alone, bring the codes together.
    """
    lines = [
        "{ .reg .b32 limit, pair, bits, even, odd, first, second, sum, code<8>;",
        ".reg .f32 x, a, b, c;",
    ]
    for code in range(8):
        n = code // 2
        if code % 2 == 0:
            lines.append(f"prmt.b32 limit, ${9 + n}, ${9 + n}, 0x3232;")
            lines.append(f"and.b32 pair, ${1 + n}, 0x7FFF7FFF;")
            lines.append("min.bf16x2 pair, pair, limit;")
        lines.append("and.b32 bits, pair, 0xFFFF0000;" if code % 2 else "shl.b32 bits, pair, 16;")
        lines.append("mov.b32 x, bits;")
        lines.append(f"mul.rn.f32 x, x, ${5 + n};")
        lines.append(f"fma.rn.f32 a, x, 0f40000000, 0f{_ROUND_BITS:X};")
        lines.append(f"add.rn.f32 b, x, 0f{_ROUND_BITS + 2:X};")
        lines.append(f"fma.rn.f32 c, x, 0f3F000000, 0f{_ROUND_BITS + 4:X};")
        lines.append("min.f32 a, a, b;")
        lines.append("min.f32 a, a, c;")
        lines.append(f"mov.b32 code{code}, a;")
    lines.append("mad.lo.u32 sum, code7, 16, code6;")
    lines += [f"mad.lo.u32 sum, sum, 16, code{code};" for code in range(5, -1, -1)]
    lines.append(f"sub.u32 sum, sum, {_ROUND_BITS * 0x11111111 & 0xFFFFFFFF};")  # ROUND's own bits, all eight
    # Signs: the bytes that hold them, even values' and odd values' apart, then their bits into the nibbles.
    lines.append("prmt.b32 first, $1, $2, 0x7351;")
    lines.append("prmt.b32 second, $3, $4, 0x7351;")
    lines.append("prmt.b32 even, first, second, 0x5410;")
    lines.append("prmt.b32 odd, first, second, 0x7632;")
    lines.append("shr.u32 even, even, 4;")
    lines.append("lop3.b32 sum, even, 0x08080808, sum, 0xEA;")  # 0xEA: (a and b) or c
    lines.append("lop3.b32 $0, odd, 0x80808080, sum, 0xEA; }")
    return "\n".join(lines)


_PACK_EIGHT = tl.constexpr(_pack_eight())
_OPERANDS = tl.constexpr("=r" + ",r" * 12)


@triton.jit
def e2m1_pack(words, factor, limit, BF16: tl.constexpr):
    """(blocks, n) int32 of two 16-bit floats each, times factor (blocks,) -> (blocks, n) bytes of two codes.

    The low half's code goes to the low nibble. limit (blocks,): a magnitude that `factor` brings well between
    5 and 7, so that what lies above may be cut to it; infinity where no magnitude comes above 7.
    """
    scaling = tl.broadcast_to(factor[:, None], words.shape)
    if BF16 and not INTERPRETED:
        cut = tl.broadcast_to(limit[:, None], words.shape)
        operands = [words, scaling, cut]
        return tl.inline_asm_elementwise(_PACK_EIGHT, _OPERANDS, operands, tl.int8, is_pure=True, pack=4)
    else:
        low, high = unpack_pair(words, BF16)
        low, high = low * scaling, high * scaling
        magnitude = (_e2m1_magnitude_bits(low) & 7) | ((_e2m1_magnitude_bits(high) << 4) & 0x70)
        sign_low = (low.to(tl.int32, bitcast=True) >> 28) & 8
        sign_high = (high.to(tl.int32, bitcast=True) >> 24) & 0x80
        return (magnitude | sign_low | sign_high).to(tl.int8)


@triton.jit
def e2m1_value(code):
    """The float32 value of an e2m1 code (int32, four bits used)."""
    # The three magnitude bits, placed across a float's exponent and mantissa, are the value times 2^-126
    # (code 1 a denormal), so one exact multiplication decodes all eight.
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def swizzled_offset(row, block, block_tiles):
    """Where the scale of (row, block) lies in 128x4 tiles; `block_tiles` = ceil(blocks / 4)."""
    return (
        ((row >> 7) * block_tiles + (block >> 2)) * 512 + (row & 31) * 16 + ((row >> 5) & 3) * 4 + (block & 3)
    )


@triton.jit
def ceil_pow2_exponent(x):
    """Biased exponent of the smallest power of two >= x, for positive finite float32 x, within 1..254."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    return tl.minimum(tl.maximum(exponent, 1), 254)


@triton.jit
def fp8_scale(amax, POW2: tl.constexpr):
    """float32 scale of an FP8 block whose largest magnitude is `amax`: amax / 448, at least 1e-10 / 448."""
    scale = tl.maximum(amax, 1e-10) * (1.0 / 448.0)
    if POW2:
        scale = (ceil_pow2_exponent(scale) << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def reciprocal(x):
    """1 / x, correctly rounded."""
    if INTERPRETED:
        return 1.0 / x
    else:
        # div.rn takes twice the instructions of rcp.rn
        return tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def divide(x, scale, inverse):
    """x / scale rounded as IEEE division rounds, from inverse = 1 / scale (correctly rounded)."""
    if INTERPRETED:  # its fma rounds twice
        return x / scale
    else:
        # One Newton step on the quotient: three multiplications where div.rn takes about ten instructions.
        # -0 must stay -0: signs turn by a factor, because Triton's unary minus is 0 - x, and -(+0) then +0.
        quotient = x * inverse
        return tl.fma(tl.fma(quotient, scale, x * -1.0) * -1.0, inverse, quotient)


@triton.jit
def e4m3(x):
    """float32 -> e4m3, nearest even, saturating at 448."""
    if INTERPRETED:
        return tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv)
    else:
        return x.to(tl.float8e4nv)  # the instruction saturates


@triton.jit
def fp8_blocks(x, POW2: tl.constexpr):
    """(blocks, values) in float32 -> their float32 scales (blocks,) and e4m3 codes."""
    scale = fp8_scale(tl.max(tl.abs(x), axis=1), POW2)
    return scale, e4m3(divide(x, scale[:, None], reciprocal(scale)[:, None]))


@triton.jit
def store_fp8_scale(pointer, scale, mask, BYTE: tl.constexpr):
    """Writes float32 scales as they are, or as the biased exponent of a power of two (BYTE)."""
    if BYTE:
        tl.store(pointer, (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8), mask=mask)
    else:
        tl.store(pointer, scale, mask=mask)
