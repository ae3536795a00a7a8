"""The sizes of well-known models, and how many parameters they come to.

Numbers are from each model's public config.json. A model that is not here gives its own in
`spec.model.architecture`.
"""

from __future__ import annotations

from dataclasses import dataclass

from broadbeam_crds.v1alpha1 import Architecture, Experts, LatentAttention, Model

_DEEPSEEK_V3 = Architecture(
    layers=61,
    hidden_size=7168,
    vocabulary_size=129280,
    intermediate_size=18432,
    attention_heads=128,
    latent_attention=LatentAttention(
        kv_rank=512, query_rank=1536, nope_head_size=128, rope_head_size=64, value_head_size=128
    ),
    experts=Experts(count=256, per_token=8, intermediate_size=2048, shared=1, dense_layers=3, groups=8),
    weights="fp8",
    max_model_len=163840,
)
_DEEPSEEK_V2_LITE = Architecture(
    layers=27,
    hidden_size=2048,
    vocabulary_size=102400,
    intermediate_size=10944,
    attention_heads=16,
    latent_attention=LatentAttention(kv_rank=512, nope_head_size=128, rope_head_size=64, value_head_size=128),
    experts=Experts(count=64, per_token=6, intermediate_size=1408, shared=2, dense_layers=1),
    max_model_len=163840,
)
_KIMI_K2 = Architecture(
    layers=61,
    hidden_size=7168,
    vocabulary_size=163840,
    intermediate_size=18432,
    attention_heads=64,
    latent_attention=LatentAttention(
        kv_rank=512, query_rank=1536, nope_head_size=128, rope_head_size=64, value_head_size=128
    ),
    experts=Experts(count=384, per_token=8, intermediate_size=2048, shared=1, dense_layers=1),
    weights="fp8",
    max_model_len=131072,
)


def _gpt_oss(layers: int, experts: int) -> Architecture:
    return Architecture(
        layers=layers,
        hidden_size=2880,
        vocabulary_size=201088,
        attention_heads=64,
        key_value_heads=8,
        head_size=64,
        experts=Experts(count=experts, per_token=4, intermediate_size=2880),
        weights="mxfp4",
        max_model_len=131072,
    )


def _qwen3_moe(layers: int, hidden: int, heads: int, kv_heads: int, experts: Experts) -> Architecture:
    return Architecture(
        layers=layers,
        hidden_size=hidden,
        vocabulary_size=151936,
        attention_heads=heads,
        key_value_heads=kv_heads,
        head_size=128,
        experts=experts,
        max_model_len=40960,
    )


_QWEN3_235B = _qwen3_moe(94, 4096, 64, 4, Experts(count=128, per_token=8, intermediate_size=1536))
_QWEN3_30B = _qwen3_moe(48, 2048, 32, 4, Experts(count=128, per_token=8, intermediate_size=768))
_SMOLLM2_135M = Architecture(
    layers=30,
    hidden_size=576,
    vocabulary_size=49152,
    intermediate_size=1536,
    attention_heads=9,
    key_value_heads=3,
    head_size=64,
    tied_embeddings=True,
    max_model_len=8192,
)
_TINY_DEEPSEEK_V3 = Architecture(
    layers=4,
    hidden_size=256,
    vocabulary_size=2048,
    intermediate_size=512,
    attention_heads=8,
    latent_attention=LatentAttention(
        kv_rank=512, query_rank=128, nope_head_size=32, rope_head_size=64, value_head_size=32
    ),
    experts=Experts(count=16, per_token=4, intermediate_size=128, shared=1, dense_layers=1, groups=4),
    max_model_len=4096,
)
_TINY_QWEN3_MOE = Architecture(
    layers=4,
    hidden_size=256,
    vocabulary_size=2048,
    attention_heads=8,
    key_value_heads=2,
    head_size=32,
    experts=Experts(count=16, per_token=4, intermediate_size=128),
    max_model_len=4096,
)
_TINY_LLAMA = Architecture(
    layers=4,
    hidden_size=256,
    vocabulary_size=2048,
    intermediate_size=512,
    attention_heads=8,
    key_value_heads=2,
    head_size=32,
    max_model_len=4096,
)

# By the last part of the model's name, in lower case: deepseek-ai/DeepSeek-R1 is "deepseek-r1".
SHAPES: dict[str, Architecture] = {
    "deepseek-v3": _DEEPSEEK_V3,
    "deepseek-v3-0324": _DEEPSEEK_V3,
    "deepseek-v3.1": _DEEPSEEK_V3,
    "deepseek-r1": _DEEPSEEK_V3,
    "deepseek-r1-0528": _DEEPSEEK_V3,
    "deepseek-r1-fp4": _DEEPSEEK_V3.model_copy(update={"weights": "nvfp4"}),
    "deepseek-r1-0528-fp4": _DEEPSEEK_V3.model_copy(update={"weights": "nvfp4"}),
    "deepseek-v2-lite": _DEEPSEEK_V2_LITE,
    "deepseek-v2-lite-chat": _DEEPSEEK_V2_LITE,
    "kimi-k2-instruct": _KIMI_K2,
    "gpt-oss-120b": _gpt_oss(layers=36, experts=128),
    "gpt-oss-20b": _gpt_oss(layers=24, experts=32),
    "qwen3-235b-a22b": _QWEN3_235B,
    "qwen3-30b-a3b": _QWEN3_30B,
    "smollm2-135m": _SMOLLM2_135M,
    "smollm2-135m-instruct": _SMOLLM2_135M,
    "tiny-deepseek-v3": _TINY_DEEPSEEK_V3,
    "tiny-qwen3-moe": _TINY_QWEN3_MOE,
    "tiny-llama": _TINY_LLAMA,
}


def shape_key(name: str) -> str:
    """The key in SHAPES under which a model of this name would be."""
    return name.rpartition("/")[2].lower()


def shape_of(model: Model) -> Architecture | None:
    """What the manifest says, or what is known by the model's name or source; None for an unknown model."""
    if model.architecture is not None:
        return model.architecture
    scheme, _, rest = model.source.partition("://")
    place = shape_key(rest).partition("?")[0]
    keys = {"tiny": (f"tiny-{place}",), "hf": (shape_key(model.name), place)}
    return next((SHAPES[key] for key in keys.get(scheme, (shape_key(model.name),)) if key in SHAPES), None)


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameter counts of a whole model. Norms and routers are in `embeddings`: they are never quantised."""

    embeddings: int
    attention: int
    dense: int  # feed-forward layers without experts
    shared_experts: int
    one_expert: int  # of one layer
    expert_layers: int
    experts: int  # routed experts of one layer
    experts_per_token: int
    unread_embeddings: int  # the input embedding, of which a token reads one row

    @property
    def routed_experts(self) -> int:
        return self.one_expert * self.expert_layers * self.experts

    @property
    def total(self) -> int:
        return self.embeddings + self.attention + self.dense + self.shared_experts + self.routed_experts

    @property
    def active(self) -> int:
        """Parameters that take part in computing one token."""
        chosen = self.one_expert * self.expert_layers * self.experts_per_token
        return self.total - self.routed_experts + chosen - self.unread_embeddings


def parameters(shape: Architecture) -> Parameters:
    """Counted from the sizes alone; within 1 % of the published totals (biases are left out)."""
    moe, hidden, embedding = shape.experts, shape.hidden_size, shape.vocabulary_size * shape.hidden_size
    expert_layers = shape.layers - moe.dense_layers if moe else 0
    one_expert = 3 * hidden * moe.intermediate_size if moe else 0
    norms_and_routers = (2 * shape.layers + 1) * hidden + expert_layers * hidden * (moe.count if moe else 0)
    return Parameters(
        embeddings=embedding * (1 if shape.tied_embeddings else 2) + norms_and_routers,
        attention=shape.layers * attention_parameters(shape),
        dense=(shape.layers - expert_layers) * 3 * hidden * shape.intermediate_size,
        shared_experts=expert_layers * one_expert * (moe.shared if moe else 0),
        one_expert=one_expert,
        expert_layers=expert_layers,
        experts=moe.count if moe else 0,
        experts_per_token=moe.per_token if moe else 0,
        unread_embeddings=0 if shape.tied_embeddings else embedding,
    )


def attention_parameters(shape: Architecture) -> int:
    """Of one layer."""
    heads, hidden, mla = shape.attention_heads, shape.hidden_size, shape.latent_attention
    if mla is None:
        return hidden * shape.head_size * 2 * (heads + shape.key_value_heads)
    query_out = heads * (mla.nope_head_size + mla.rope_head_size)
    query = hidden * mla.query_rank + mla.query_rank * query_out if mla.query_rank else hidden * query_out
    key_value = hidden * (mla.kv_rank + mla.rope_head_size)
    key_value += mla.kv_rank * heads * (mla.nope_head_size + mla.value_head_size)
    return query + key_value + heads * mla.value_head_size * hidden


def kv_width(shape: Architecture) -> int:
    """Elements that the cache keeps for one token, all layers together."""
    mla = shape.latent_attention
    if mla is not None:
        return shape.layers * (mla.kv_rank + mla.rope_head_size)
    return shape.layers * 2 * shape.key_value_heads * shape.head_size
