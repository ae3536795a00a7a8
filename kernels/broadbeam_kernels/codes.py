"""Triton helpers that turn numbers into codes and back; every kernel that quantises shares them."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: adding it to a float in [0, 2^22) rounds the sum to an integer, ties to even, in the low bits.
ROUND = tl.constexpr(12582912.0)


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
    if BF16:
        a = low.to(tl.bfloat16).to(tl.int16, bitcast=True)
        b = high.to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        a = low.to(tl.float16).to(tl.int16, bitcast=True)
        b = high.to(tl.float16).to(tl.int16, bitcast=True)
    return (a.to(tl.int32) & 0xFFFF) | (b.to(tl.int32) << 16)


@triton.jit
def e2m1_magnitude_bits(x):
    """The e2m1 magnitude code (0..7) of |x|, nearest with ties to the even code, in a float's low bits.

    The codes' values are a concave curve over the codes, so code(a) = rint(min(2a, a + 2, a / 2 + 4)); each
    line is rounded once, by the addition that also moves the result to the low mantissa bits. Seven
    comparisons would need twice the integer slots, and integer slots are what bounds this on Hopper.
    """
    a = tl.abs(x)
    code = tl.minimum(tl.minimum(a * 2.0 + ROUND, a + (ROUND + 2.0)), a * 0.5 + (ROUND + 4.0))
    return tl.minimum(code, ROUND + 7.0).to(tl.int32, bitcast=True)


@triton.jit
def e2m1_pack(low, high):
    """Two values, already divided by their scale -> one byte, `low` in the low nibble."""
    magnitude = (e2m1_magnitude_bits(low) & 7) | ((e2m1_magnitude_bits(high) << 4) & 0x70)
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
def divide(x, scale, inverse):
    """x / scale rounded as IEEE division rounds, from inverse = 1 / scale (correctly rounded)."""
    # One Newton step on the quotient: three multiplications where div.rn takes about ten instructions.
    # -0 must stay -0: signs turn by a factor, because Triton's unary minus is 0 - x, which makes -(+0) a +0.
    quotient = x * inverse
    return tl.fma(tl.fma(quotient, scale, x * -1.0) * -1.0, inverse, quotient)


@triton.jit
def e4m3(x):
    """float32 -> e4m3, nearest even, saturating at 448."""
    return tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv)
