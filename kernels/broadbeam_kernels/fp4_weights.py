"""FP4 weights as the matrix kernel reads them: prepared once at load, never unpacked in memory.

A 64 x 64 tile is what one warpgroup feeds to the tensor core from registers, so its codes lie thread by
thread: 16 bytes a thread, one 32-bit word for each 16 columns. The eight codes of a word are spread over
its two 16-bit halves such that one rotation and one mask put a code's three magnitude bits across exponent
and mantissa of a bf16 (bits 8 to 6), and its sign where a sign belongs (bit 15):

    bits of a half   15   14   13   12..10  9    8..7     6..4  3    2..0
    code             s0   0.0  s3   m2      s1   0.2 0.1  m3    s2   m1

Code 1 is rotated by 6, code 2 by 12 (its magnitudes lie in the other half), code 3 by 2; code 0 lies in place
but for its last bit, 8 too high. No four rotations of one mask fill a word, so one code must pay a fifth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .contracts import check, check_multiple
from .formats import Mxfp4, Nvfp4, Quantized, align
from .packed_weights import PackedWeights, check_alike, pack_weights
from .paths import matrix_path, runs_kernels
from .reference import scaled_gemm as packed_oracle
from .reference.quantize import unpack, unswizzle

# The kernel multiplies 2^-126 times a code's value by 2^117 times its scale.
UNSCALE = 512.0


@dataclass(frozen=True, slots=True)
class Fp4Weights:
    """(experts, n, k) weights in `format`: codes int32, scales int16, alpha float32 (experts,).

    n is padded to 128 with zeros in the tiles. alpha is the factor that turns the kernel's sums into values:
    512 over the expert's global scale.
    """

    codes: Tensor
    scales: Tensor
    alpha: Tensor
    format: Nvfp4 | Mxfp4
    shape: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        """Bytes a product reads: codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


def _words(codes: Tensor) -> Tensor:
    """(rows, k) codes -> int32 (rows / 128, k / 128, 2 halves of k, 2 of the rows, 128 threads, 4 words)."""
    rows, k = codes.shape
    # row = tile, half, warp, row half, g; column = step, half, word, k half, t, pair
    tiles = codes.reshape(rows // 128, 2, 4, 2, 8, k // 128, 2, 4, 2, 4, 2).to(torch.int32)
    tiles = tiles.permute(0, 5, 6, 1, 2, 4, 9, 7, 10, 8, 3)  # ... warp g t word pair (k half, row half)
    c0, c1, c2, c3 = tiles.flatten(-2).unbind(-1)
    half = (c0 & 8) << 12 | (c0 & 6) << 6 | (c0 & 1) << 14 | (c1 & 8) << 6 | (c1 & 7)
    half = half | (c2 & 8) | (c2.flip(-1) & 7) << 10 | (c3 & 8) << 10 | (c3 & 7) << 4
    word = half[..., 0] | (half[..., 1] << 16)
    return word.reshape(rows // 128, k // 128, 2, 2, 128, 4).contiguous()


def _scale_tiles(scales: Tensor, per_step: int) -> Tensor:
    """(rows, blocks) scale bytes -> int16 (rows / 128, steps, 2, 2, 32, blocks of 64 columns)."""
    rows, blocks = scales.shape
    part = per_step // 2
    tiles = scales.reshape(rows // 128, 2, 4, 2, 8, blocks // per_step, 2, part)
    tiles = tiles.permute(0, 5, 6, 1, 2, 4, 7, 3).contiguous()  # ... warp g block (row half)
    return tiles.view(torch.int16).reshape(rows // 128, blocks // per_step, 2, 2, 32, part)


def _e5m3(scales: Tensor) -> Tensor:
    """Positive e4m3 -> 8 bits of exponent + 10 and 3 bits of mantissa: no denormals, zero stays 0."""
    mantissa, exponent = torch.frexp(scales.float())  # value = mantissa * 2^exponent, mantissa in [0.5, 1)
    bits = ((exponent + 9).to(torch.int32) << 3) | (mantissa * 16 - 8).to(torch.int32)
    return torch.where(scales.float() > 0, bits, torch.zeros_like(bits)).to(torch.uint8)


def _positive(global_scale: Tensor) -> float:
    g = float(global_scale.item())
    check(0 < g < math.inf, f"weights have a global scale of {g}, expected a positive finite number")
    return g


def prepare_fp4_weights(weights: list[Quantized]) -> Fp4Weights | PackedWeights:
    """One quantised (n, k) matrix per expert -> what `fp4_gemm` and `grouped_fp4_gemm` read on their device.

    Tiles, or stacked as they are for a GPU that is not a Hopper. All in one format and shape; k a multiple of
    128. MXFP4 exponents above 2^10 do not fit the arithmetic of the tiles' kernel and are refused.
    """
    check_alike(weights)
    if runs_kernels(weights[0].values) and matrix_path(weights[0].values.device) == "portable":
        return pack_weights(weights)
    fmt, (n, k) = weights[0].format, weights[0].shape
    assert isinstance(fmt, Nvfp4 | Mxfp4)
    check_multiple("k", k, 128, least=128)
    padding = (0, 0, 0, align(n, 128) - n)
    words, tiles, alpha = [], [], []
    for q in weights:
        scales = unswizzle(q.scales, n, k // fmt.block) if fmt.scales == "swizzled" else q.scales
        codes = unpack(q.values)
        if isinstance(fmt, Nvfp4):
            assert q.global_scale is not None
            zero = (scales.float() == 0).repeat_interleave(fmt.block, 1)
            codes = torch.where(zero, torch.zeros_like(codes), codes)
            scales = _e5m3(scales)
            alpha.append(UNSCALE / _positive(q.global_scale))
        else:
            largest = int(scales.max().item()) if scales.numel() else 0
            check(largest <= 137, f"weights hold an MXFP4 scale of 2^{largest - 127}, it is above 2^10")
            alpha.append(UNSCALE)
        words.append(_words(F.pad(codes, padding)))
        tiles.append(_scale_tiles(F.pad(scales, padding), 128 // fmt.block))
    device = weights[0].values.device
    return Fp4Weights(
        torch.stack(words),
        torch.stack(tiles),
        torch.tensor(alpha, dtype=torch.float32, device=device),
        fmt,
        (len(weights), n, k),
    )


def decode_fp4_weights(w: Fp4Weights | PackedWeights, expert: int) -> Tensor:
    """float32 (n, k) of one expert: the inverse of `prepare_fp4_weights`, for the oracle."""
    if isinstance(w, PackedWeights):
        scale = 1.0 if w.global_scales is None else 1 / w.global_scales[expert].double()
        return (packed_oracle.decode_weights(w, expert) * scale).float()
    _, n, k = w.shape
    padded = align(n, 128)
    halves = torch.stack((w.codes[expert] & 0xFFFF, (w.codes[expert] >> 16) & 0xFFFF), dim=-1)
    fields = (
        halves >> 12 & 8 | halves >> 6 & 6 | halves >> 14 & 1,
        halves >> 6 & 8 | halves & 7,
        halves & 8 | halves.flip(-1) >> 10 & 7,
        halves >> 10 & 8 | halves >> 4 & 7,
    )
    # tile step (k half) (row half) warp g t word pair (k half, row half)
    tiles = torch.stack(fields, dim=-1).reshape(padded // 128, k // 128, 2, 2, 4, 8, 4, 4, 2, 2, 2)
    codes = tiles.permute(0, 3, 4, 10, 5, 1, 2, 7, 9, 6, 8).reshape(padded, k)
    part = 64 // w.format.block
    raw = (
        w.scales[expert].contiguous().view(torch.uint8).reshape(padded // 128, k // 128, 2, 2, 4, 8, part, 2)
    )
    raw = raw.permute(0, 3, 4, 7, 5, 1, 2, 6).reshape(padded, k // w.format.block).int()
    if isinstance(w.format, Nvfp4):
        scale = torch.where(raw > 0, torch.exp2(((raw >> 3) - 10).float()) * (1 + (raw & 7) / 8), 0.0)
    else:
        scale = torch.exp2((raw - 127).float())
    magnitude = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=codes.device)[codes & 7]
    values = torch.where(codes & 8 > 0, -magnitude, magnitude)
    spread = scale.repeat_interleave(w.format.block, 1)
    return (values * spread * (w.alpha[expert] / UNSCALE))[:n]
