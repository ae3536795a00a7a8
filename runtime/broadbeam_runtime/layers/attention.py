"""Grouped-query attention of a decoder layer (Llama, Qwen)."""

from __future__ import annotations

from torch import Tensor

from broadbeam_runtime.attention import Plan, grouped_query_attention
from broadbeam_runtime.layers.linear import Linear
from broadbeam_runtime.layers.norm import RMSNorm
from broadbeam_runtime.layers.rope import rotate
from broadbeam_runtime.models.architecture import Architecture
from broadbeam_runtime.weights import Weights


class GroupedQueryAttention:
    """q, k, v as one multiplication; optional norms of queries and keys per head (Qwen3)."""

    def __init__(self, weights: Weights, shape: Architecture):
        self.heads, self.kv_heads, self.dim = shape.heads, shape.kv_heads, shape.head_dim
        self.scale = shape.head_dim**-0.5
        self.qkv = Linear.load(weights, "q_proj", "k_proj", "v_proj")
        self.out = Linear.load(weights, "o_proj")
        self.q_norm = RMSNorm.load(weights, "q_norm", shape.norm_eps) if shape.query_key_norm else None
        self.k_norm = RMSNorm.load(weights, "k_norm", shape.norm_eps) if shape.query_key_norm else None

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Tensor, plan: Plan) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (-1, self.dim))  # (tokens, heads + 2 * kv_heads, dim)
        if self.q_norm and self.k_norm:
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
            q, k = rotate(self.q_norm(q), *rotary), rotate(self.k_norm(k), *rotary)
        else:
            qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], 1)
            q, k = rotate(qk, *rotary).split([self.heads, self.kv_heads], 1)
        return self.out(grouped_query_attention(q, k, v, cache, plan, self.scale))
