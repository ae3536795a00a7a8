"""The decoder that all our families share: embed, layers with pre-norm residuals, norm, logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from broadbeam_runtime.attention import Plan
from broadbeam_runtime.checkpoint import CheckpointError
from broadbeam_runtime.experts.mixture import Mixture
from broadbeam_runtime.layers.attention import GroupedQueryAttention
from broadbeam_runtime.layers.latent_attention import LatentAttention
from broadbeam_runtime.layers.linear import Linear
from broadbeam_runtime.layers.mlp import GatedMLP
from broadbeam_runtime.layers.norm import RMSNorm
from broadbeam_runtime.layers.rope import RotaryTable
from broadbeam_runtime.models.architecture import Architecture
from broadbeam_runtime.parallel import Group
from broadbeam_runtime.weights import Weights


class Attention(Protocol):
    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Tensor, plan: Plan) -> Tensor: ...


class DecoderLayer:
    def __init__(self, weights: Weights, shape: Architecture, index: int, group: Group):
        attention = weights.at("self_attn")
        self.attention: Attention = (
            LatentAttention(attention, shape) if shape.latent else GroupedQueryAttention(attention, shape)
        )
        has_experts = shape.experts is not None and index in shape.experts.layers
        mlp = weights.at("mlp")
        self.mlp: Callable[[Tensor], Tensor] = (
            Mixture(mlp, shape, group) if has_experts else GatedMLP.load(mlp)
        )
        self.attention_norm = RMSNorm.load(weights, "input_layernorm", shape.norm_eps)
        self.mlp_norm = RMSNorm.load(weights, "post_attention_layernorm", shape.norm_eps)

    def __call__(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Tensor, plan: Plan, rows: Tensor | None = None
    ) -> Tensor:
        """x (tokens, hidden) through the layer; of its output only `rows`, if given."""
        x = x + self.attention(self.attention_norm(x), rotary, cache, plan)
        if rows is not None:
            x = x[rows]
        return x + self.mlp(self.mlp_norm(x))


class Decoder:
    """A whole model on one rank: everything but the experts, of which it has its share."""

    def __init__(
        self,
        shape: Architecture,
        weights: Weights,
        group: Group,
        max_len: int,
        on_layer: Callable[[int], None] = lambda _: None,
    ):
        model = weights.at("model")
        self.embedding = model.tensor("embed_tokens.weight")
        if len(self.embedding) != shape.vocab:
            raise CheckpointError(
                f"{weights.files.model_dir}: the embedding has {len(self.embedding)} rows, "
                f"vocab_size is {shape.vocab}"
            )
        dim = shape.latent.rope_dim if shape.latent else shape.head_dim
        self.rotary = RotaryTable(shape.rope, dim, max_len, weights.device, weights.dtype)
        self.layers = []
        for index in range(shape.layers):
            self.layers.append(DecoderLayer(model.at(f"layers.{index}"), shape, index, group))
            on_layer(index)
        self.norm = RMSNorm.load(model, "norm", shape.norm_eps)
        tied = shape.tied or "lm_head.weight" not in weights
        self.head = Linear(self.embedding if tied else weights.tensor("lm_head.weight"))
        if tied and self.head.packed:  # packing makes a second copy
            weights.files.loaded_bytes += self.embedding.nbytes

    def __call__(self, plan: Plan, cache: Tensor) -> Tensor:
        """Run `plan` over cache (blocks, layers, block_size, width): float32 logits (sampled, vocab)."""
        x = F.embedding(plan.tokens, self.embedding)
        rotary = self.rotary.at(plan.positions)
        *layers, last = self.layers
        for index, layer in enumerate(layers):
            x = layer(x, rotary, cache[:, index], plan)
        # What comes after the last layer's keys and values matters only where a token is sampled.
        x = last(x, rotary, cache[:, len(layers)], plan, plan.sample_rows)
        return self.head(self.norm(x)).float()


def compute_dtype(shape: Architecture, wanted: str, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's dtype on an accelerator and float32 on a CPU, where bfloat16
    multiplications of more than one row are 1.5 to 6 times slower (AVX2 EPYC)."""
    name = wanted
    if wanted == "auto":
        name = "float32" if device.type == "cpu" else shape.dtype
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(f"dtype {name!r} is not served; known: float32, bfloat16, float16")
    assert isinstance(dtype, torch.dtype)
    return dtype
