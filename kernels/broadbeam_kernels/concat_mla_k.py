"""concat_mla_k: k[t, h] = k_nope[t, h] | k_rope[t], the key of MLA prefill.

Bound by memory: 82,048 bytes a token in bf16 with 128 heads. One program copies a run of one token's heads.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contracts import FP8_TYPES, HALF_TYPES, check, check_shape, check_tensor, launches
from .overlap import begin, early
from .reference import layout as oracle
from .tuning import config


@triton.jit
def _kernel(
    k_ptr,
    nope_ptr,
    rope_ptr,
    k_token,
    k_head,
    nope_token,
    nope_head,
    rope_token,
    heads,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    chunks = tl.cdiv(heads, HEADS)
    token = (tl.program_id(0) // chunks).to(tl.int64)
    head = (tl.program_id(0) % chunks) * HEADS + tl.arange(0, HEADS)
    mask = (head < heads)[:, None]
    nope = tl.arange(0, NOPE)
    rope = tl.arange(0, ROPE)
    source = nope_ptr + token * nope_token + head[:, None] * nope_head + nope[None, :]
    a = tl.load(source, mask=mask, eviction_policy="evict_first")
    b = tl.load(rope_ptr + token * rope_token + rope)
    out = k_ptr + token * k_token + head[:, None] * k_head
    tl.store(out + nope[None, :], a, mask=mask)
    tl.store(out + NOPE + rope[None, :], tl.broadcast_to(b[None, :], (HEADS, ROPE)), mask=mask)


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def concat_mla_k(k_nope: Tensor, k_rope: Tensor, out: Tensor | None = None) -> Tensor:
    """k_nope (tokens, heads, nope) | k_rope (tokens, 1, rope) -> (tokens, heads, nope + rope).

    k_rope may also be (tokens, rope). bf16, fp16, e4m3 or e5m2, all alike; nope and rope powers of two;
    inputs and `out` may be strided, their last dimension dense. Source of the shape: FlashInfer
    `concat_mla.cuh` (128 heads, 128 + 64).
    """
    check_tensor("k_nope", k_nope, 3, (*HALF_TYPES, *FP8_TYPES))
    tokens, heads, nope = k_nope.shape
    k_rope = k_rope.unsqueeze(1) if k_rope.dim() == 2 else k_rope
    check_tensor("k_rope", k_rope, 3, (k_nope.dtype,), like=k_nope)
    rope = k_rope.shape[-1]
    check_shape("k_rope", k_rope, (tokens, 1, rope))
    check(_is_power_of_two(nope) and _is_power_of_two(rope), f"nope={nope}, rope={rope}: powers of two only")
    if out is None:
        out = torch.empty((tokens, heads, nope + rope), dtype=k_nope.dtype, device=k_nope.device)
    check_tensor("out", out, 3, (k_nope.dtype,), like=k_nope)
    check_shape("out", out, (tokens, heads, nope + rope))
    for name, x in (("k_nope", k_nope), ("k_rope", k_rope), ("out", out)):
        check(
            x.numel() == 0 or x.stride(-1) == 1,
            f"{name}'s last dimension has stride {x.stride(-1)}, expected 1",
        )
    if not launches(out):
        return oracle.concat_mla_k(k_nope, k_rope, out)
    if out.numel():
        tuned = config("concat_mla_k", out.device, tokens=tokens, bytes=out.element_size())
        programs = tokens * triton.cdiv(heads, tuned["HEADS"])
        _kernel[(programs,)](
            out,
            k_nope,
            k_rope,
            out.stride(0),
            out.stride(1),
            k_nope.stride(0),
            k_nope.stride(1),
            k_rope.stride(0),
            heads,
            NOPE=nope,
            ROPE=rope,
            **early(out.device, programs),
            **tuned,
        )
    return out
