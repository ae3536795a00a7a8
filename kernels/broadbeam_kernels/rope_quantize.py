"""RoPE + quantise + Q write + KV-cache write of MLA, decode and prefill alike, in one launch.

Bound by memory: per token and head 576 values in at 2 bytes and out at 1 (decode). The grid is one program
for some heads of a token, and one more per token for the cache row.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import codes
from .contracts import HALF_TYPES, check, check_range, check_shape, check_tensor, launches, paired
from .overlap import begin, early
from .reference import rope as oracle
from .tuning import config

CACHE_TYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)


@triton.jit
def _rotate(
    x_ptr, at, angle_ptr, position, mask, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BF16: tl.constexpr
):
    """The two halves of rotated pairs, (rows, HALF) each, in float32. `x_ptr` is the tensor's 16-bit view."""
    pair = tl.arange(0, HALF)
    cos = tl.load(angle_ptr + position * (2 * HALF) + pair)[None, :]
    sin = tl.load(angle_ptr + position * (2 * HALF) + HALF + pair)[None, :]
    if INTERLEAVED:
        words = x_ptr.to(tl.pointer_type(tl.int32))
        a, b = codes.unpack_pair(tl.load(words + at[:, None] // 2 + pair[None, :], mask=mask, other=0), BF16)
    else:
        a = tl.load(x_ptr + at[:, None] + pair[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + at[:, None] + HALF + pair[None, :], mask=mask, other=0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _cast(x, factor, target: tl.constexpr):
    if target == tl.float8e4nv:
        return codes.e4m3(x * factor)
    else:
        return x.to(target)


@triton.jit
def _store_rotated(out_ptr, at, a, b, factor, mask, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    pair = tl.arange(0, HALF)
    first = _cast(a, factor, out_ptr.dtype.element_ty)
    second = _cast(b, factor, out_ptr.dtype.element_ty)
    if INTERLEAVED:
        # Two dimensions, not three: stores are as wide as the last one.
        both = tl.interleave(first, second)  # (rows, 2 * HALF)
        tl.store(out_ptr + at[:, None] + tl.arange(0, 2 * HALF)[None, :], both, mask=mask)
    else:
        tl.store(out_ptr + at[:, None] + pair[None, :], first, mask=mask)
        tl.store(out_ptr + at[:, None] + HALF + pair[None, :], second, mask=mask)


@triton.jit
def _kernel(
    nope_ptr,
    rope_ptr,
    latent_ptr,
    key_rope_ptr,
    angle_ptr,
    position_ptr,
    slot_ptr,
    out_ptr,
    cache_ptr,
    key_out_ptr,
    q_factor,
    kv_factor,
    heads,
    nope_token,
    nope_head,
    rope_token,
    rope_head,
    latent_token,
    key_rope_token,
    out_token,
    out_head,
    cache_row,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BF16: tl.constexpr,
    CACHE: tl.constexpr,
    KEY_OUT: tl.constexpr,
    HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    chunks = tl.cdiv(heads, HEADS)
    programs = chunks + (1 if CACHE or KEY_OUT else 0)
    token = (tl.program_id(0) // programs).to(tl.int64)
    chunk = tl.program_id(0) % programs
    position = tl.load(position_ptr + token).to(tl.int64)
    HALF: tl.constexpr = ROPE // 2
    if chunk < chunks:
        head = chunk * HEADS + tl.arange(0, HEADS)
        mask = (head < heads)[:, None]
        column = tl.arange(0, NOPE)
        source = nope_ptr + token * nope_token + head[:, None] * nope_head + column[None, :]
        nope = tl.load(source, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        a, b = _rotate(
            rope_ptr,
            token * rope_token + head * rope_head,
            angle_ptr,
            position,
            mask,
            HALF,
            INTERLEAVED,
            BF16,
        )
        out = token * out_token + head * out_head
        tl.store(
            out_ptr + out[:, None] + column[None, :],
            _cast(nope, q_factor, out_ptr.dtype.element_ty),
            mask=mask,
        )
        _store_rotated(out_ptr, out + NOPE, a, b, q_factor, mask, HALF, INTERLEAVED)
    else:
        one = tl.arange(0, 1)
        key_a, key_b = _rotate(
            key_rope_ptr,
            token * key_rope_token + one,
            angle_ptr,
            position,
            one[:, None] == 0,
            HALF,
            INTERLEAVED,
            BF16,
        )
        if KEY_OUT:
            _store_rotated(
                key_out_ptr, token * ROPE + one, key_a, key_b, 1.0, one[:, None] == 0, HALF, INTERLEAVED
            )
        if CACHE:
            slot = tl.load(slot_ptr + token).to(tl.int64)
            wide = tl.arange(0, LATENT)
            latent = tl.load(latent_ptr + token * latent_token + wide).to(tl.float32)
            row = slot * cache_row
            kept = slot >= 0  # padding tokens carry slot -1
            tl.store(cache_ptr + row + wide, _cast(latent, kv_factor, cache_ptr.dtype.element_ty), mask=kept)
            inside = (one[:, None] == 0) & kept
            _store_rotated(cache_ptr, row + LATENT + one, key_a, key_b, kv_factor, inside, HALF, INTERLEAVED)


@dataclass(frozen=True, slots=True)
class Rotary:
    """Angles and their use: `cos_sin` float32 (positions, rope) = cos | sin, `positions` int (tokens,).

    interleaved: pairs are (2i, 2i + 1), as DeepSeek has them; otherwise (i, i + rope / 2), as Llama has them.
    """

    cos_sin: Tensor
    positions: Tensor
    interleaved: bool = True


@dataclass(frozen=True, slots=True)
class LatentCache:
    """What goes into the KV cache and where: row `slots[t]` of `cache` = kv_c[t] | rotated k_rope[t].

    cache: (rows, latent + rope) bf16, fp16 or e4m3, rows possibly strided; slots: int (tokens,), -1 for none.
    Values are multiplied by `multiplier` before they become e4m3, and stored as they are otherwise.
    """

    kv_c: Tensor
    cache: Tensor
    slots: Tensor
    multiplier: float = 1.0


def _check_power_of_two(name: str, n: int) -> None:
    check(n >= 2 and n & (n - 1) == 0, f"{name}={n} is not a power of two")


def _check_cache(kv: LatentCache, tokens: int, rope: int, q: Tensor) -> None:
    check_tensor("kv_c", kv.kv_c, 2, (q.dtype,), like=q)
    check(kv.kv_c.shape[0] == tokens, f"kv_c has {kv.kv_c.shape[0]} rows, expected {tokens}")
    check_tensor("cache", kv.cache, 2, CACHE_TYPES, like=q)
    check_shape("cache", kv.cache, (kv.cache.shape[0], kv.kv_c.shape[1] + rope))
    check(kv.cache.stride(1) == 1, f"cache's last dimension has stride {kv.cache.stride(1)}, expected 1")
    _check_power_of_two("latent", kv.kv_c.shape[1])
    check_tensor("slots", kv.slots, 1, (torch.int32, torch.int64), like=q)
    check_shape("slots", kv.slots, (tokens,))
    check_range("slots", kv.slots, -1, kv.cache.shape[0] - 1)


def rope_quantize(
    q_nope: Tensor,
    q_rope: Tensor,
    k_rope: Tensor,
    rotary: Rotary,
    kv: LatentCache | None = None,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.float8_e4m3fn,
    q_multiplier: float = 1.0,
    k_rope_out: Tensor | None = None,
) -> Tensor:
    """Rotate q_rope and k_rope, write q = q_nope | q_rope and the cache row kv_c | k_rope; one launch.

    q_nope (tokens, heads, nope), q_rope (tokens, heads, rope), k_rope (tokens, rope): bf16 or fp16, strided
    as they come (dense last dimension); decode passes the absorbed q_nope (nope = 512), prefill the plain one
    (nope = 128). nope, rope and the latent width are powers of two. Returns `out` (tokens, heads,
    nope + rope), e4m3 = value * q_multiplier or, for bf16/fp16, the value. k_rope_out (tokens, rope), when
    given, receives the rotated k_rope in its own type (prefill's concat_mla_k wants it).
    Formula: RoFormer; cache row as vLLM's MLA cache; multiplier's direction as FlashInfer's quant_scale_q.
    """
    check_tensor("q_nope", q_nope, 3, HALF_TYPES)
    tokens, heads, nope = q_nope.shape
    check_tensor("q_rope", q_rope, 3, (q_nope.dtype,), like=q_nope)
    rope = q_rope.shape[2]
    check_shape("q_rope", q_rope, (tokens, heads, rope))
    check_tensor("k_rope", k_rope, 2, (q_nope.dtype,), like=q_nope)
    check_shape("k_rope", k_rope, (tokens, rope))
    check_tensor("cos_sin", rotary.cos_sin, 2, (torch.float32,), like=q_nope)
    check(rotary.cos_sin.shape[1] == rope, f"cos_sin has {rotary.cos_sin.shape[1]} columns, expected {rope}")
    check_tensor("positions", rotary.positions, 1, (torch.int32, torch.int64), like=q_nope)
    check_shape("positions", rotary.positions, (tokens,))
    check_range("positions", rotary.positions, 0, rotary.cos_sin.shape[0] - 1)
    _check_power_of_two("nope", nope)
    _check_power_of_two("rope", rope)
    if kv is not None:
        _check_cache(kv, tokens, rope, q_nope)
    if out is None:
        out = torch.empty((tokens, heads, nope + rope), dtype=out_dtype, device=q_nope.device)
    check_tensor("out", out, 3, CACHE_TYPES, like=q_nope)
    check_shape("out", out, (tokens, heads, nope + rope))
    check(out.stride(2) == 1, f"out's last dimension has stride {out.stride(2)}, expected 1")
    if k_rope_out is not None:
        check_tensor("k_rope_out", k_rope_out, 2, HALF_TYPES, like=q_nope)
        check_shape("k_rope_out", k_rope_out, (tokens, rope))
        check(k_rope_out.is_contiguous(), f"k_rope_out has strides {k_rope_out.stride()}: not contiguous")
    if not launches(q_nope, out.dtype, *(() if kv is None else (kv.cache.dtype,))):
        return oracle.rope_quantize(q_nope, q_rope, k_rope, rotary, kv, out, q_multiplier, k_rope_out)
    if tokens:
        _launch(q_nope, q_rope, k_rope, rotary, kv, out, q_multiplier, k_rope_out)
    return out


def _launch(
    q_nope: Tensor,
    q_rope: Tensor,
    k_rope: Tensor,
    rotary: Rotary,
    kv: LatentCache | None,
    out: Tensor,
    q_multiplier: float,
    k_rope_out: Tensor | None,
) -> None:
    tokens, heads, nope = q_nope.shape
    rope = q_rope.shape[2]
    q_nope = q_nope if q_nope.stride(2) == 1 else q_nope.contiguous()
    q_rope, k_rope = paired(q_rope), paired(k_rope)
    latent = kv.kv_c if kv is not None else q_nope
    latent = latent if latent.stride(-1) == 1 else latent.contiguous()
    tuned = config("rope_quantize", out.device, tokens=tokens, nope=nope)
    programs = tokens * (triton.cdiv(heads, tuned["HEADS"]) + int(kv is not None or k_rope_out is not None))
    if not programs:
        return
    _kernel[(programs,)](
        q_nope,
        q_rope,
        latent,
        k_rope,
        rotary.cos_sin.contiguous(),
        rotary.positions.contiguous(),
        kv.slots.contiguous() if kv is not None else rotary.positions,
        out,
        kv.cache if kv is not None else out,
        k_rope_out if k_rope_out is not None else k_rope,
        q_multiplier,
        kv.multiplier if kv is not None else 1.0,
        heads,
        q_nope.stride(0),
        q_nope.stride(1),
        q_rope.stride(0),
        q_rope.stride(1),
        latent.stride(0),
        k_rope.stride(0),
        out.stride(0),
        out.stride(1),
        kv.cache.stride(0) if kv is not None else 0,
        NOPE=nope,
        ROPE=rope,
        LATENT=kv.kv_c.shape[1] if kv is not None else 1,
        INTERLEAVED=rotary.interleaved,
        BF16=q_nope.dtype == torch.bfloat16,
        CACHE=kv is not None,
        KEY_OUT=k_rope_out is not None,
        **early(out.device, programs),
        **tuned,
    )
