"""FP4 weights of several experts as the quantisers leave them: packed codes and scales, stacked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .contracts import check, check_device, check_quantized
from .formats import Mxfp4, Nvfp4, Quantized


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """(experts, n, k) weights in `format`: codes uint8 (experts, n, k / 2), scales uint8 (experts, bytes).

    An expert's scales lie as the format says, linear or swizzled. global_scales float32 (experts,) in the
    direction of quantisation, NVFP4 only.
    """

    codes: Tensor
    scales: Tensor
    global_scales: Tensor | None
    format: Nvfp4 | Mxfp4
    shape: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        """Bytes a product reads: codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


def check_alike(weights: list[Quantized]) -> None:
    """At least one matrix, all in one FP4 format and shape, on one device."""
    check(len(weights) > 0, "no weights given, expected one for each expert")
    first = weights[0]
    for i, q in enumerate(weights):
        check_quantized(f"weights[{i}]", q, Nvfp4, Mxfp4)
        check(
            q.format == first.format and q.shape == first.shape,
            f"weights differ in format or shape: weights[{i}] is {q.format} of {q.shape}, "
            f"weights[0] {first.format} of {first.shape}",
        )
        check_device(f"weights[{i}]", q.values, first.values)


def pack_weights(weights: list[Quantized]) -> PackedWeights:
    """One quantised (n, k) matrix per expert, all in one FP4 format and shape -> stacked, nothing re-laid."""
    check_alike(weights)
    fmt, (n, k) = weights[0].format, weights[0].shape
    assert isinstance(fmt, Nvfp4 | Mxfp4)
    scales = torch.stack([q.scales.view(torch.uint8).flatten() for q in weights])
    largest = [q.global_scale for q in weights if q.global_scale is not None and isinstance(fmt, Nvfp4)]
    global_scales = torch.cat([g.float().reshape(1) for g in largest]) if largest else None
    codes = torch.stack([q.values for q in weights])
    return PackedWeights(codes, scales, global_scales, fmt, (len(weights), n, k))


def one_matrix(q: Quantized) -> PackedWeights:
    """A single quantised matrix as the weights of one expert, sharing its storage where it is dense."""
    check_quantized("b", q, Nvfp4, Mxfp4)
    fmt = q.format
    assert isinstance(fmt, Nvfp4 | Mxfp4)
    scales = q.scales.contiguous().view(torch.uint8).reshape(1, -1)
    global_scales = None if q.global_scale is None else q.global_scale.float().reshape(1)
    return PackedWeights(q.values.contiguous().unsqueeze(0), scales, global_scales, fmt, (1, *q.shape))
