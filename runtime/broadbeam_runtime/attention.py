"""Which tokens a step computes, where their keys and values lie, and attention over the paged cache.

One plan serves all layers of a step. Rows are ordered decodes first (one token each, longest context
first), then prompt chunks, so that each part is a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# A decode group gathers rows * longest tokens of cache at once; beyond this the groups are split.
GROUP_TOKENS = 65_536


@dataclass(frozen=True, slots=True)
class Chunk:
    """`tokens` of one sequence at positions start..., and the cache blocks that hold its whole context."""

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    sample: bool  # the last token's logits are wanted

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows of one token each, whose contexts have similar lengths."""

    rows: slice
    blocks: Tensor  # (rows * blocks of the longest)
    length: int  # keys per row after the gather
    mask: Tensor | None  # (rows, 1, 1, length) added to the scores; None: every row uses all keys

    @property
    def count(self) -> int:
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Consecutive tokens of one sequence."""

    rows: slice
    blocks: Tensor  # (blocks of the context)
    length: int  # keys, the chunk's own included
    mask: Tensor | None  # (tokens, length) True where a token may look; None: causal from position 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a forward pass needs beside weights and cache."""

    tokens: Tensor  # (tokens)
    positions: Tensor  # (tokens)
    write_blocks: Tensor  # (tokens) where each token's keys and values go
    write_offsets: Tensor  # (tokens)
    decodes: tuple[DecodeGroup, ...]
    prompts: tuple[PromptChunk, ...]
    sample_rows: Tensor  # rows whose logits are wanted, in the order of `sampled`
    sampled: tuple[int, ...]  # indices into the chunks given to `make_plan`


def make_plan(chunks: Sequence[Chunk], block_size: int, device: torch.device, dtype: torch.dtype) -> Plan:
    """Lay out `chunks`; none gives an empty plan, which a rank without work runs beside its peers."""
    order = sorted(range(len(chunks)), key=lambda i: (len(chunks[i].tokens) > 1, -chunks[i].end))
    ordered = [chunks[i] for i in order]
    positions = [position for chunk in ordered for position in range(chunk.start, chunk.end)]
    blocks = [chunk.blocks[p // block_size] for chunk in ordered for p in range(chunk.start, chunk.end)]
    ends, row = [], 0
    for chunk in ordered:
        row += len(chunk.tokens)
        ends.append(row)
    sampled = [i for i, chunk in enumerate(ordered) if chunk.sample]

    def ids(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

    decode_count = sum(len(chunk.tokens) == 1 for chunk in ordered)
    return Plan(
        tokens=ids([token for chunk in ordered for token in chunk.tokens]),
        positions=ids(positions),
        write_blocks=ids(blocks),
        write_offsets=ids([p % block_size for p in positions]),
        decodes=tuple(_decode_groups(ordered[:decode_count], block_size, device, dtype)),
        prompts=tuple(
            _prompt_chunk(chunk, end, block_size, device)
            for chunk, end in zip(ordered[decode_count:], ends[decode_count:], strict=True)
        ),
        sample_rows=ids([ends[i] - 1 for i in sampled]),
        sampled=tuple(order[i] for i in sampled),
    )


def _decode_groups(
    chunks: list[Chunk], block_size: int, device: torch.device, dtype: torch.dtype
) -> list[DecodeGroup]:
    groups, start = [], 0
    for stop in range(1, len(chunks) + 1):
        longest = chunks[start].end
        if (
            stop < len(chunks)
            and chunks[stop].end * 2 >= longest
            and (stop + 1 - start) * longest <= GROUP_TOKENS
        ):
            continue
        groups.append(_decode_group(chunks[start:stop], start, block_size, device, dtype))
        start = stop
    return groups


def _decode_group(
    chunks: list[Chunk], first_row: int, block_size: int, device: torch.device, dtype: torch.dtype
) -> DecodeGroup:
    longest = chunks[0].end
    width = -(-longest // block_size)
    # Shorter rows repeat block 0; the mask hides it.
    blocks = [b for chunk in chunks for b in [*chunk.blocks[:width], *[0] * (width - len(chunk.blocks))]]
    mask = None
    if chunks[-1].end < longest:
        ends = torch.tensor([chunk.end for chunk in chunks]).view(-1, 1, 1, 1)
        visible = torch.arange(longest).view(1, 1, 1, -1) < ends
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf")).to(device)
    rows = slice(first_row, first_row + len(chunks))
    return DecodeGroup(rows, torch.tensor(blocks, dtype=torch.int64).to(device), longest, mask)


def _prompt_chunk(chunk: Chunk, end_row: int, block_size: int, device: torch.device) -> PromptChunk:
    blocks = torch.tensor(chunk.blocks[: -(-chunk.end // block_size)], dtype=torch.int64).to(device)
    mask = None
    if chunk.start:
        rows = torch.arange(chunk.start, chunk.end, device=device).unsqueeze(1)
        mask = torch.arange(chunk.end, device=device) <= rows
    return PromptChunk(slice(end_row - len(chunk.tokens), end_row), blocks, chunk.end, mask)


def write_cache(cache: Tensor, rows: Tensor, plan: Plan) -> None:
    """Store rows (tokens, width) of this step into one layer of the cache (blocks, block_size, width)."""
    cache.index_put_((plan.write_blocks, plan.write_offsets), rows.to(cache.dtype))


def gather_cache(cache: Tensor, blocks: Tensor, count: int, length: int, dtype: torch.dtype) -> Tensor:
    """The contexts of `count` rows of equally many blocks, (count, length, width)."""
    return cache.index_select(0, blocks).view(count, -1, cache.shape[-1])[:, :length].to(dtype)


def grouped_query_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, plan: Plan, scale: float
) -> Tensor:
    """Attention of q (tokens, heads, dim) over k, v (tokens, kv_heads, dim) and what the cache holds.

    The cache row of a token is its keys, then its values. Returns (tokens, heads * dim).
    """
    kv_heads, dim = k.shape[1:]
    write_cache(cache, torch.cat([k, v], 1).flatten(1), plan)
    parts = [_decode(q[group.rows], cache, group, kv_heads, dim, scale) for group in plan.decodes]
    for chunk in plan.prompts:
        if chunk.mask is None:
            keys, values = k[chunk.rows], v[chunk.rows]
        else:
            context = gather_cache(cache, chunk.blocks, 1, chunk.length, q.dtype)
            keys, values = context.view(chunk.length, 2, kv_heads, dim).unbind(1)
        parts.append(_prompt(q[chunk.rows], keys, values, chunk.mask, scale))
    if not parts:
        return q.flatten(1)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _decode(q: Tensor, cache: Tensor, group: DecodeGroup, kv_heads: int, dim: int, scale: float) -> Tensor:
    context = gather_cache(cache, group.blocks, group.count, group.length, q.dtype)
    # (rows, length, kv_heads, dim) -> (rows, kv_heads, length, dim), a view
    k, v = (part.transpose(1, 2) for part in context.unflatten(2, (2, kv_heads, dim)).unbind(2))
    out = F.scaled_dot_product_attention(
        q.unsqueeze(2), k, v, attn_mask=group.mask, scale=scale, enable_gqa=True
    )
    return out.flatten(1)


def _prompt(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return out.squeeze(0).transpose(0, 1).flatten(1)
