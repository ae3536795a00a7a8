"""The PTX that makes FP4 codes, evaluated on a CPU instruction by instruction, against the oracle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from broadbeam_kernels.codes import _pack_eight
from broadbeam_kernels.reference import quantize as oracle
from broadbeam_kernels.testing import gaussian

Bits = NDArray[np.uint32]


def float_of(bits: Bits) -> NDArray[np.float32]:
    return bits.view(np.float32)


def bits_of(x: NDArray[np.float32] | NDArray[np.float64]) -> Bits:
    return x.astype(np.float32).view(np.uint32)


def permute(a: Bits, b: Bits, selector: Bits) -> Bits:
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros_like(both)
    for n in range(4):
        byte = (selector >> np.uint32(4 * n) & np.uint32(7)).astype(np.uint64) * np.uint64(8)
        out |= (both >> byte & np.uint64(0xFF)) << np.uint64(8 * n)
    return out.astype(np.uint32)


def least_halves(a: Bits, b: Bits) -> Bits:
    """Minima of two positive bf16 each: they order as their bits do."""
    low: Bits = np.minimum(a & np.uint32(0xFFFF), b & np.uint32(0xFFFF))
    high: Bits = np.minimum(a >> np.uint32(16), b >> np.uint32(16))
    return low | (high << np.uint32(16))


def fused(a: Bits, b: Bits, c: Bits) -> Bits:
    # A float64 holds the sum's bits down to 2^-29, below any that decides a rounding here.
    return bits_of(float_of(a).astype(np.float64) * float_of(b) + float_of(c))


OPERATIONS: dict[str, Callable[..., Bits]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "sub.u32": lambda a, b: a - b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": permute,
    "lop3.b32": lambda a, b, c, table: (a & b) | c,  # table 0xEA
    "min.bf16x2": least_halves,
    "mul.rn.f32": lambda a, b: bits_of(float_of(a) * float_of(b)),
    "add.rn.f32": lambda a, b: bits_of(float_of(a).astype(np.float64) + float_of(b)),
    "fma.rn.f32": fused,
    "min.f32": lambda a, b: bits_of(np.minimum(float_of(a), float_of(b))),
}


def evaluate(ptx: str, operands: dict[str, Bits]) -> Bits:
    """Registers hold one value per lane; `$0` is the result."""
    registers = dict(operands)

    def value(token: str) -> Bits:
        if token in registers:
            return registers[token]
        number = int(token[2:], 16) if token.startswith("0f") else int(token, 0)
        return np.full_like(operands["$1"], number)

    for statement in ptx.strip("{}; \n").split(";"):
        name, *rest = statement.split(maxsplit=1)
        if name != ".reg":
            target, *sources = (token.strip() for token in rest[0].split(","))
            registers[target] = OPERATIONS[name](*(value(token) for token in sources))
    return registers["$0"]


def packed_by_ptx(x: torch.Tensor, factor: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """x (lanes, 8) bf16; factor and limit (lanes, 4), one a pair -> (lanes, 4) bytes."""
    pairs = x.view(torch.int32).numpy().view(np.uint32)
    columns = np.concatenate((pairs, bits_of(factor.numpy()), bits_of(limit.numpy())), axis=1)
    operands = {f"${n + 1}": np.ascontiguousarray(columns[:, n]) for n in range(12)}
    return torch.from_numpy(evaluate(_pack_eight(), operands).view(np.uint8).reshape(-1, 4))


@pytest.mark.parametrize("scale", [1.0, 0.3, 7.25e4, 1e-20])
def test_codes_match_the_oracle_bit_for_bit(scale: float) -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    x = torch.cat((gaussian(4096, 8, device="cpu").float() * 3, ties.repeat(2, 1), torch.zeros(1, 8)))
    x[-2] *= -1
    x[-3, ::2] = torch.nextafter(ties[::2], torch.tensor(0.0))
    x = (x * scale).to(torch.bfloat16)
    x[-1, ::2] = -0.0
    steps = scale * (1 + torch.rand(x.shape[0], 4))  # every pair may belong to a block of its own
    steps[-3:] = scale
    factor = 1 / steps
    scaled = x.float() * factor.repeat_interleave(2, dim=1)
    want = oracle.pack(oracle.e2m1_codes(scaled.clamp(-6, 6)))
    assert torch.equal(packed_by_ptx(x, factor, steps * 6.5), want)


def test_without_a_limit_values_up_to_7_take_the_last_code() -> None:
    x = torch.tensor([[6.0, -6.5, 6.97, 0.0, 5.0, -5.03, 3.5, 1.0]]).to(torch.bfloat16)
    one = torch.ones(1, 4)
    want = oracle.pack(oracle.e2m1_codes(x.float().clamp(-6, 6)))
    assert torch.equal(packed_by_ptx(x, one, one * float("inf")), want)
