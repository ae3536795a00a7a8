"""What a model's config.json says, read once into frozen objects; anything we do not compute is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from broadbeam_runtime.checkpoint import CheckpointError

FP8_BLOCK = 128  # one scale per 128 x 128 block
RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding; the fields after `kind` mean what they mean in Hugging Face's `rope_parameters`."""

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture-of-experts feed-forward: how many, how wide, how tokens find theirs."""

    count: int
    top_k: int
    intermediate: int
    normalize: bool
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["top2", "max"] = "top2"
    scale: float = 1.0
    shared: int = 0  # shared experts, always on
    layers: frozenset[int] = frozenset()  # the layers that have experts; the others are dense


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek): the cache holds `rank` + `rope_dim` elements a token."""

    rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    query_rank: int | None
    interleaved: bool


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder-only transformer. `latent` chooses MLA, otherwise attention is grouped-query."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_len: int
    norm_eps: float
    rope: Rope
    tied: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    query_key_norm: bool = False
    experts: Experts | None = None
    latent: Latent | None = None

    @property
    def kv_width(self) -> int:
        """Elements of KV cache per token and layer."""
        if self.latent:
            return self.latent.rank + self.latent.rope_dim
        return 2 * self.kv_heads * self.head_dim


def read_architecture(model_dir: Path) -> Architecture:
    """The model in `model_dir`; CheckpointError says which field cannot be served."""
    config = _json(model_dir / "config.json")
    family = config.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(
            f"{model_dir}: model_type {family!r} is not served; known: {', '.join(FAMILIES)}"
        )
    generation = model_dir / "generation_config.json"
    eos = (_json(generation).get("eos_token_id") if generation.exists() else None) or config.get(
        "eos_token_id"
    )
    try:
        return FAMILIES[family](_Fields(config, model_dir), _as_ids(eos))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{model_dir / 'config.json'}: {error}") from error


class _Fields:
    """config.json with required fields named in the error when they are absent."""

    def __init__(self, config: dict[str, Any], model_dir: Path):
        self.config, self.model_dir = config, model_dir

    def need(self, name: str) -> Any:
        if (value := self.config.get(name)) is None:
            raise ValueError(f"{name} is missing")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        value = self.config.get(name)
        return default if value is None else value

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse a field whose value changes the computation in a way we do not have."""
        if (value := self.config.get(name)) not in (None, *allowed):
            raise ValueError(f"{name} is {value!r}; served: {' or '.join(map(repr, allowed or (None,)))}")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _rope(fields: _Fields) -> Rope:
    given = dict(fields.get("rope_scaling") or {}) | dict(fields.get("rope_parameters") or {})
    if nested := [name for name, value in given.items() if isinstance(value, dict)]:
        raise ValueError(
            f"rope_parameters differ by kind of layer ({', '.join(nested)}); served: one for all"
        )
    kind: Any = given.get("rope_type") or given.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(f"rope type {kind!r} is not served; known: default, linear, llama3, yarn")
    if (partial := given.get("partial_rotary_factor") or fields.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"partial_rotary_factor is {partial}; served: 1.0")
    if kind != "default" and not given.get("factor"):
        raise ValueError(f"rope type {kind} needs a factor")
    return Rope(
        theta=float(given.get("rope_theta") or fields.get("rope_theta", 10_000.0)),
        kind=kind,
        factor=float(given.get("factor") or 1.0),
        original_max_len=int(
            given.get("original_max_position_embeddings") or fields.get("max_position_embeddings", 0)
        ),
        low_freq_factor=float(given.get("low_freq_factor") or 1.0),
        high_freq_factor=float(given.get("high_freq_factor") or 4.0),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        mscale=float(given.get("mscale") or 0.0),
        mscale_all_dim=float(given.get("mscale_all_dim") or 0.0),
        attention_factor=given.get("attention_factor"),
        truncate=given.get("truncate", True),
    )


def _check_quantization(fields: _Fields) -> None:
    """Of quantised checkpoints, those in DeepSeek-V3's format are dequantised as they are read."""
    given = fields.get("quantization_config", {})
    method, block = given.get("quant_method"), given.get("weight_block_size")
    if given and (method != "fp8" or list(block or ()) != [FP8_BLOCK, FP8_BLOCK]):
        raise ValueError(
            f"quantization_config is {method} with weight_block_size {block}; "
            f"served: fp8 with [{FP8_BLOCK}, {FP8_BLOCK}]"
        )


def _shape(fields: _Fields, eos: tuple[int, ...], **extra: Any) -> Architecture:
    fields.only("hidden_act", "silu")
    _check_quantization(fields)
    heads, hidden = fields.need("num_attention_heads"), fields.need("hidden_size")
    return Architecture(
        family=fields.need("model_type"),
        hidden=hidden,
        layers=fields.need("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.get("num_key_value_heads", heads),
        head_dim=fields.get("head_dim", hidden // heads),
        intermediate=fields.need("intermediate_size"),
        vocab=fields.need("vocab_size"),
        max_len=fields.get("max_position_embeddings", 2048),
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope=_rope(fields),
        tied=fields.get("tie_word_embeddings", False),
        dtype=fields.get("dtype") or fields.get("torch_dtype") or "bfloat16",
        # An end beyond the embedding can never be sampled.
        eos_token_ids=tuple(token for token in eos if 0 <= token < fields.need("vocab_size")),
        **extra,
    )


def _llama(fields: _Fields, eos: tuple[int, ...]) -> Architecture:
    if fields.get("use_sliding_window", fields.need("model_type") == "mistral"):
        fields.only("sliding_window")
    return _shape(fields, eos, query_key_norm=fields.need("model_type") == "qwen3")


def _qwen3_moe(fields: _Fields, eos: tuple[int, ...]) -> Architecture:
    if fields.get("use_sliding_window", False):
        fields.only("sliding_window")
    step, dense = fields.get("decoder_sparse_step", 1), set(fields.get("mlp_only_layers", []))
    layers = range(fields.need("num_hidden_layers"))
    experts = Experts(
        count=fields.get("num_local_experts") or fields.need("num_experts"),
        top_k=fields.need("num_experts_per_tok"),
        intermediate=fields.need("moe_intermediate_size"),
        normalize=fields.get("norm_topk_prob", False),
        layers=frozenset(i for i in layers if i not in dense and (i + 1) % step == 0),
    )
    return _shape(fields, eos, query_key_norm=True, experts=experts)


def _deepseek(fields: _Fields, eos: tuple[int, ...]) -> Architecture:
    v3 = fields.need("model_type") == "deepseek_v3"
    fields.only("moe_layer_freq", 1)
    fields.only("scoring_func", "sigmoid" if v3 else "softmax")
    fields.only("topk_method", *(["noaux_tc"] if v3 else ["greedy", "group_limited_greedy"]))
    grouped = v3 or fields.get("topk_method") == "group_limited_greedy"
    experts = Experts(
        count=fields.get("num_local_experts") or fields.need("n_routed_experts"),
        top_k=fields.need("num_experts_per_tok"),
        intermediate=fields.need("moe_intermediate_size"),
        # transformers' DeepSeek-V2 ignores norm_topk_prob; the published V2 models set it to false.
        normalize=v3 and fields.get("norm_topk_prob", True),
        scoring="sigmoid" if v3 else "softmax",
        groups=fields.get("n_group", 1) if grouped else 1,
        top_groups=fields.get("topk_group", 1) if grouped else 1,
        group_score="top2" if v3 else "max",
        scale=fields.get("routed_scaling_factor", 1.0),
        shared=fields.get("n_shared_experts", 0),
        layers=frozenset(range(fields.get("first_k_dense_replace", 0), fields.need("num_hidden_layers"))),
    )
    latent = Latent(
        rank=fields.need("kv_lora_rank"),
        rope_dim=fields.need("qk_rope_head_dim"),
        nope_dim=fields.need("qk_nope_head_dim"),
        value_dim=fields.need("v_head_dim"),
        query_rank=fields.get("q_lora_rank"),
        interleaved=fields.get("rope_interleave", True),
    )
    return _shape(fields, eos, experts=experts, latent=latent)


FAMILIES = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
}
