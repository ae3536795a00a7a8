"""Tiny models with random weights, the same everywhere for a seed: real architectures in a few megabytes.

They stand in for large ones in tests and examples; their words mean nothing. The tokenizer is a byte-level
BPE whose merges are enumerated, not trained, so that it does not depend on any text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broadbeam_runtime.checkpoint import CheckpointError
from broadbeam_runtime.safetensors_file import Entry, write
from broadbeam_runtime.tokenizer_files import Vocabulary, write_tokenizer

VOCAB = 2048
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
Config = dict[str, Any]

COMMON: Config = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
LATENT: Config = {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
}
CONFIGS: dict[str, Config] = {
    "llama": {**COMMON, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "qwen3-moe": {
        **COMMON,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "moe_intermediate_size": 128,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "deepseek-v2": {
        **COMMON,
        **LATENT,
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "num_hidden_layers": 3,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "deepseek-v3": {
        **COMMON,
        **LATENT,
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "q_lora_rank": 128,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
    },
}


def build(name: str, seed: int, directory: Path, changes: Config | None = None) -> None:
    """Write the tiny model `name` (see CONFIGS) to `directory`; `changes` replace fields of its config."""
    if name not in CONFIGS:
        raise CheckpointError(f"tiny://{name}: no such model; there are {', '.join(CONFIGS)}")
    config = CONFIGS[name] | (changes or {})
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (directory / "generation_config.json").write_text(json.dumps(ends))
    entries = [Entry(tensor, shape, _values(tensor, shape, seed)) for tensor, shape in tensors(config)]
    write(directory / "model.safetensors", entries)
    write_tokenizer(directory, vocabulary(config))


def tensors(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of such a model under its Hugging Face name."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        attention = _latent_attention if "kv_lora_rank" in config else _attention
        yield from attention(f"{layer}.self_attn", config)
        yield from _feed_forward(f"{layer}.mlp", config, index)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def _attention(prefix: str, config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
        yield f"{prefix}.{name}.weight", (count * dim, hidden)
        if config.get("attention_bias"):
            yield f"{prefix}.{name}.bias", (count * dim,)
    yield f"{prefix}.o_proj.weight", (hidden, heads * dim)
    if config.get("attention_bias"):
        yield f"{prefix}.o_proj.bias", (hidden,)
    if config["model_type"] == "qwen3_moe":
        yield f"{prefix}.q_norm.weight", (dim,)
        yield f"{prefix}.k_norm.weight", (dim,)


def _latent_attention(prefix: str, config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query_rank = config["q_lora_rank"]
    if query_rank:
        yield f"{prefix}.q_a_proj.weight", (query_rank, hidden)
        yield f"{prefix}.q_a_layernorm.weight", (query_rank,)
        yield f"{prefix}.q_b_proj.weight", (heads * (nope + rope), query_rank)
    else:
        yield f"{prefix}.q_proj.weight", (heads * (nope + rope), hidden)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (rank + rope, hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (rank,)
    yield f"{prefix}.kv_b_proj.weight", (heads * (nope + value), rank)
    yield f"{prefix}.o_proj.weight", (hidden, heads * value)


def _feed_forward(prefix: str, config: Config, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = config["hidden_size"]
    count = config.get("n_routed_experts") or config.get("num_experts") or 0
    step, only_dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
    first = config.get("first_k_dense_replace", 0)
    if not count or layer < first or layer in only_dense or (layer + 1) % step:
        yield from _swiglu(prefix, hidden, config["intermediate_size"])
        return
    width = config["moe_intermediate_size"]
    yield f"{prefix}.gate.weight", (count, hidden)
    if config["model_type"] == "deepseek_v3":
        yield f"{prefix}.gate.e_score_correction_bias", (count,)
    for expert in range(count):
        yield from _swiglu(f"{prefix}.experts.{expert}", hidden, width)
    if shared := config.get("n_shared_experts"):
        yield from _swiglu(f"{prefix}.shared_experts", hidden, width * shared)


def _swiglu(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def _values(name: str, shape: tuple[int, ...], seed: int) -> Callable[[], NDArray[np.float32]]:
    """Gaussian, from a generator of the tensor's own name; scaled so that activations stay near 1."""

    def draw() -> NDArray[np.float32]:
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        # MT19937 as RandomState runs it is frozen; numpy's newer generators may change their streams.
        normal = np.random.RandomState(int.from_bytes(digest[:4], "little")).standard_normal(shape)
        return np.asarray(_scaled(name, normal), dtype=np.float32)

    return draw


def _scaled(name: str, normal: NDArray[np.float64]) -> NDArray[np.float64]:
    if "norm" in name:
        return 1.0 + 0.1 * normal
    if "e_score_correction_bias" in name:
        return 0.01 * normal
    if name.endswith("bias"):
        return 0.1 * normal
    if "embed" in name:
        return normal
    # The head is four times wider, so that the best token is not decided by rounding.
    spread: float = (4.0 if "lm_head" in name else 1.0) / normal.shape[-1] ** 0.5
    return normal * spread


def vocabulary(config: Config) -> Vocabulary:
    """Special tokens, the 256 bytes, and as many enumerated merges as the embedding has room for."""
    alphabet = byte_alphabet()
    room = config["vocab_size"] - len(SPECIAL) - len(alphabet)
    merges = list(itertools.islice(_merges(alphabet[ord(" ")]), room))
    return Vocabulary(
        tokens=[*SPECIAL, *alphabet, *(left + right for left, right in merges)],
        merges=merges,
        splitting="gpt-2",
        special=dict.fromkeys(range(len(SPECIAL)), True),
        bos=1,
        eos=2,
        pad=0,
        chat_template=CHAT,
        max_len=config["max_position_embeddings"],
    )


def _merges(space: str) -> Iterator[tuple[str, str]]:
    """Pairs of lower-case letters, the same after a space, pairs of digits, then triples of letters."""
    letters = string.ascii_lowercase
    pairs = [(a, b) for a in letters for b in letters]
    yield from pairs
    yield from ((space, a) for a in letters)
    yield from ((space, a + b) for a, b in pairs)
    yield from itertools.product(string.digits, repeat=2)
    yield from ((a + b, c) for a, b in pairs for c in letters)


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
