"""Oracles of the block-scaled products: operands decoded exactly, sums in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Fp8Block, Mxfp4, Nvfp4, Quantized
from ..packed_weights import PackedWeights
from .quantize import e2m1_values, load_scales, unpack, unswizzle


def decode_fp4(codes: Tensor, scales: Tensor, fmt: Nvfp4 | Mxfp4) -> Tensor:
    """Packed codes (rows, k / 2) and stored scale bytes -> float64 (rows, k) of code * block scale."""
    rows, blocks = codes.shape[0], codes.shape[1] * 2 // fmt.block
    raw = scales.view(torch.uint8)
    raw = unswizzle(raw, rows, blocks) if fmt.scales == "swizzled" else raw.reshape(rows, blocks)
    if isinstance(fmt, Nvfp4):
        factor = raw.view(torch.float8_e4m3fn).double()
    else:
        factor = torch.exp2(raw.double() - 127)
    values = e2m1_values(unpack(codes)).double().reshape(rows, blocks, fmt.block)
    return (values * factor.unsqueeze(-1)).flatten(1)


def decode_activations(a: Quantized | Tensor) -> Tensor:
    """float64 (rows, k), without NVFP4's global scale."""
    if isinstance(a, Tensor):
        return a.double()
    if isinstance(a.format, Fp8Block):
        spread = load_scales(a.scales, a.format).double().repeat_interleave(128, 1)
        return a.values.double() * spread[:, : a.shape[1]]
    return decode_fp4(a.values, a.scales, a.format)


def decode_weights(b: PackedWeights, expert: int) -> Tensor:
    """float64 (n, k) of one expert, without NVFP4's global scale."""
    return decode_fp4(b.codes[expert], b.scales[expert], b.format)


def _alpha(a: Quantized | Tensor, b: PackedWeights, expert: int) -> Tensor | float:
    alpha: Tensor | float = 1.0
    if b.global_scales is not None:
        alpha = 1 / b.global_scales[expert].double()
    if isinstance(a, Quantized) and a.global_scale is not None:
        alpha = alpha * (1 / a.global_scale.double())
    return alpha


def scaled_gemm(a: Quantized | Tensor, b: PackedWeights, out: Tensor) -> Tensor:
    """Dense product with the weights of expert 0, written to `out`."""
    return out.copy_(decode_activations(a) @ decode_weights(b, 0).T * _alpha(a, b, 0))


def grouped_scaled_gemm(
    a: Quantized | Tensor, b: PackedWeights, experts: Tensor, block: int, out: Tensor
) -> Tensor:
    """Contiguous grouped product, written to `out`."""
    decoded = decode_activations(a)
    for i, expert in enumerate(experts.tolist()):
        if expert >= 0:
            rows = slice(i * block, (i + 1) * block)
            product = decoded[rows] @ decode_weights(b, expert).T * _alpha(a, b, expert)
            out[rows] = product.to(out.dtype)
    return out


def masked_scaled_gemm(a: Quantized | Tensor, b: PackedWeights, count: Tensor, out: Tensor) -> Tensor:
    """Masked grouped product: writes the rows in use of each expert's slots to `out`."""
    decoded, slots = decode_activations(a), out.shape[0] // b.shape[0]
    for expert, used in enumerate(count.tolist()):
        rows = slice(expert * slots, expert * slots + used)
        out[rows] = (decoded[rows] @ decode_weights(b, expert).T * _alpha(a, b, expert)).to(out.dtype)
    return out
