"""Multi-head latent attention (DeepSeek-V2, section 2.1): the cache keeps one latent row per token.

Decode multiplies the query by the key up-projection once ("absorbed"), so that every head reads the
latents themselves. Prompt chunks expand the latents to keys and values, which is fewer operations when
many queries share them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from broadbeam_runtime.attention import DecodeGroup, Plan, PromptChunk, gather_cache, write_cache
from broadbeam_runtime.layers.linear import Linear
from broadbeam_runtime.layers.norm import RMSNorm
from broadbeam_runtime.layers.rope import rotate, rotate_interleaved, yarn_mscale
from broadbeam_runtime.models.architecture import Architecture
from broadbeam_runtime.weights import Weights


class LatentAttention:
    """MLA. Cache row of a token: normalised latent (rank), rotated key (rope_dim)."""

    def __init__(self, weights: Weights, shape: Architecture):
        assert shape.latent
        self.latent, self.heads = shape.latent, shape.heads
        self.scale = _scale(shape)
        self.query_down: Linear | None = None
        if self.latent.query_rank is None:
            self.query = Linear.load(weights, "q_proj")
        else:
            self.query_down = Linear.load(weights, "q_a_proj")
            self.query_norm = RMSNorm.load(weights, "q_a_layernorm", 1e-6)
            self.query = Linear.load(weights, "q_b_proj")
        self.key_down = Linear.load(weights, "kv_a_proj_with_mqa")
        self.key_norm = RMSNorm.load(weights, "kv_a_layernorm", 1e-6)
        up = weights.tensor("kv_b_proj.weight")
        per_head = up.view(shape.heads, self.latent.nope_dim + self.latent.value_dim, self.latent.rank)
        # (heads, nope_dim, rank) and (heads, rank, value_dim)
        self.key_up = per_head[:, : self.latent.nope_dim].contiguous()
        self.value_up = per_head[:, self.latent.nope_dim :].transpose(1, 2).contiguous()
        self.expand = Linear(up)
        self.out = Linear.load(weights, "o_proj")
        self.rotate = rotate_interleaved if self.latent.interleaved else rotate

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Tensor, plan: Plan) -> Tensor:
        latent = self.latent
        query = self.query(x) if self.query_down is None else self.query(self.query_norm(self.query_down(x)))
        q_nope, q_rope = query.unflatten(1, (self.heads, -1)).split([latent.nope_dim, latent.rope_dim], 2)
        q_rope = self.rotate(q_rope, *rotary)
        down, k_rope = self.key_down(x).split([latent.rank, latent.rope_dim], 1)
        k_rope = self.rotate(k_rope.unsqueeze(1), *rotary).squeeze(1)
        rows = torch.cat([self.key_norm(down), k_rope], 1)
        write_cache(cache, rows, plan)
        parts = [self._decode(q_nope[g.rows], q_rope[g.rows], cache, g) for g in plan.decodes]
        for chunk in plan.prompts:
            context = rows[chunk.rows] if chunk.mask is None else self._context(cache, chunk, x.dtype)
            parts.append(self._prompt(q_nope[chunk.rows], q_rope[chunk.rows], context, chunk.mask))
        if not parts:
            return self.out(x.new_empty(0, self.heads * latent.value_dim))
        return self.out(torch.cat(parts))

    def _context(self, cache: Tensor, chunk: PromptChunk, dtype: torch.dtype) -> Tensor:
        return gather_cache(cache, chunk.blocks, 1, chunk.length, dtype).squeeze(0)

    def _decode(self, q_nope: Tensor, q_rope: Tensor, cache: Tensor, group: DecodeGroup) -> Tensor:
        context = gather_cache(cache, group.blocks, group.count, group.length, q_nope.dtype)
        absorbed = torch.bmm(q_nope.transpose(0, 1), self.key_up).transpose(0, 1)  # (rows, heads, rank)
        scores = torch.bmm(torch.cat([absorbed, q_rope], 2), context.transpose(1, 2)) * self.scale
        if group.mask is not None:
            scores = scores + group.mask.squeeze(1)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(q_nope.dtype)
        values = torch.bmm(weights, context[..., : self.latent.rank])  # (rows, heads, rank)
        return torch.bmm(values.transpose(0, 1), self.value_up).transpose(0, 1).flatten(1)

    def _prompt(self, q_nope: Tensor, q_rope: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        latent = self.latent
        down, k_rope = context.split([latent.rank, latent.rope_dim], 1)
        expanded = self.expand(down.contiguous()).unflatten(1, (self.heads, -1))
        k_nope, v = expanded.split([latent.nope_dim, latent.value_dim], 2)
        k = torch.cat([k_nope, k_rope.unsqueeze(1).expand(-1, self.heads, -1)], 2)
        q = torch.cat([q_nope, q_rope], 2)
        # Attention kernels want one head size: values are padded to the keys' and cut again.
        v = F.pad(v, (0, k.shape[2] - latent.value_dim))
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale
        )
        return out.squeeze(0).transpose(0, 1)[..., : latent.value_dim].flatten(1)


def _scale(shape: Architecture) -> float:
    assert shape.latent
    scale = (shape.latent.nope_dim + shape.latent.rope_dim) ** -0.5
    if shape.rope.kind != "default" and shape.rope.mscale_all_dim:
        scale *= yarn_mscale(shape.rope.factor, shape.rope.mscale_all_dim) ** 2
    return float(scale)
