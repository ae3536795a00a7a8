"""Launches that begin while the one ahead ends: every operation still reads what was written before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from broadbeam_kernels.add_rms_norm import add_rms_norm
from broadbeam_kernels.concat_mla_k import concat_mla_k
from broadbeam_kernels.finalize import finalize
from broadbeam_kernels.formats import FP8_BLOCK128, FP8_BLOCK128_WEIGHT, MXFP4, NVFP4, NVFP4_SWIZZLED
from broadbeam_kernels.pad_quant import pad_quant
from broadbeam_kernels.quantize import dequantize, quantize
from broadbeam_kernels.rope_quantize import Rotary, rope_quantize
from broadbeam_kernels.silu_mul_quant import silu_mul_quant, silu_mul_quant_masked
from broadbeam_kernels.testing import gaussian

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

Step = Callable[[Tensor], Tensor]
HIDDEN = 2048


def _through(fmt: object) -> Step:
    return lambda x: dequantize(quantize(x, fmt))  # type: ignore[arg-type]


def _norm(x: Tensor) -> Tensor:
    y = add_rms_norm(x, x.clone(), torch.ones_like(x[0]))
    assert isinstance(y, Tensor)
    return y


def _silu(x: Tensor) -> Tensor:
    return dequantize(silu_mul_quant(torch.cat((x, torch.ones_like(x)), dim=1)))


def _masked(x: Tensor) -> Tensor:
    doubled = torch.cat((x, torch.ones_like(x)), dim=1).view(4, -1, 2 * x.shape[1])
    count = torch.full((4,), doubled.shape[1], dtype=torch.int32, device=x.device)
    values, scales = silu_mul_quant_masked(doubled, count)
    return (values.float() * scales.repeat_interleave(128, 2)).view_as(x).to(x.dtype)


def _rope(x: Tensor) -> Tensor:
    q = x.view(x.shape[0], 8, 256)
    angles = torch.ones(1, 64, device=x.device)
    positions = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    out = rope_quantize(
        q[..., :128], q[..., 128:192], q[:, 0, 192:], Rotary(angles, positions), out_dtype=torch.bfloat16
    )
    return torch.cat((out, q[..., 192:]), dim=2).view_as(x)


def _concat(x: Tensor) -> Tensor:
    heads = x.view(x.shape[0], 16, 128)
    return concat_mla_k(heads[..., :64], heads[:, 0, 64:]).view_as(x)


def _finalize(x: Tensor) -> Tensor:
    rows = torch.arange(x.shape[0], dtype=torch.int32, device=x.device).view(-1, 1).expand(-1, 2)
    return finalize(x, rows, torch.full(rows.shape, 0.5, device=x.device))


STEPS: dict[str, Step] = {
    "nvfp4": _through(NVFP4),
    "nvfp4 swizzled": _through(NVFP4_SWIZZLED),
    "mxfp4": _through(MXFP4),
    "fp8": _through(FP8_BLOCK128),
    "fp8 weights": _through(FP8_BLOCK128_WEIGHT),
    "pad": lambda x: dequantize(pad_quant(x, HIDDEN, FP8_BLOCK128)),
    "norm": _norm,
    "silu": _silu,
    "masked silu": _masked,
    "rope": _rope,
    "concat": _concat,
    "finalize": _finalize,
}


def run(x: Tensor, order: list[str], between: Callable[[], object] = lambda: None) -> Tensor:
    for name in order:
        x = STEPS[name](x)
        between()
    return x


@pytest.mark.parametrize("rows", [4, 64, 4096])
@pytest.mark.parametrize("name", list(STEPS))
def test_an_operation_after_itself_gives_what_it_gives_after_a_pause(name: str, rows: int) -> None:
    for _ in range(20):
        x = gaussian(rows, HIDDEN)
        want = run(x, [name] * 6, torch.cuda.synchronize)
        assert torch.equal(run(x, [name] * 6), want)


@pytest.mark.parametrize("rows", [4, 64, 4096])
def test_operations_in_any_order_give_what_they_give_with_pauses_between(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    for _ in range(20):
        order = [list(STEPS)[i] for i in torch.randperm(len(STEPS), generator=generator).tolist()]
        x = gaussian(rows, HIDDEN)
        want = run(x, order, torch.cuda.synchronize)
        assert torch.equal(run(x, order), want), order
