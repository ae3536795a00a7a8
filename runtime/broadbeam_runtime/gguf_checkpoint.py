"""Turns a GGUF file (llama.cpp) into a model directory in Hugging Face's layout, in bfloat16.

Quantised tensors are dequantised; the names, the order of rotary dimensions and the tokenizer become what
transformers would have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from broadbeam_runtime.checkpoint import CheckpointError
from broadbeam_runtime.safetensors_file import Entry, write
from broadbeam_runtime.tokenizer_files import Vocabulary, write_tokenizer

# llama.cpp's architecture -> model_type, class, whether q and k rows are permuted
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM", True),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", False),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", False),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM", False),
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
Matrix = NDArray[np.float32]


def convert(path: Path, directory: Path, on_progress: Callable[[float], None] = lambda _: None) -> None:
    """Write config.json, model.safetensors and the tokenizer of `path` into `directory`; CheckpointError
    names what is missing or not served. `on_progress` hears the share done."""
    try:
        file = GGUFFile(path)
        config = file.config()
        entries = list(file.entries(config))
        write(directory / "model.safetensors", entries, on_entry=lambda n: on_progress(n / len(entries)))
        write_tokenizer(directory, file.vocabulary())
    except (ValueError, IndexError, KeyError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cut off, or not a GGUF file that can be served: {error}") from error
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    generation = {"eos_token_id": file.eos_token_ids(), "bos_token_id": config.get("bos_token_id")}
    (directory / "generation_config.json").write_text(json.dumps(generation))


class GGUFFile:
    """A GGUF file's metadata and tensors."""

    def __init__(self, path: Path):
        self.path = path
        self.reader = gguf.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.architecture = self.need("general.architecture")
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(
                f"{path}: architecture {self.architecture!r} is not served from GGUF; known: {known}"
            )
        self.family, self.class_name, self.permuted = ARCHITECTURES[self.architecture]

    def get(self, key: str, default: Any = None) -> Any:
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise CheckpointError(f"{self.path}: {key} is missing")
        return value

    def own(self, key: str, default: Any = None) -> Any:
        """A field of the architecture's own section."""
        return self.get(f"{self.architecture}.{key}", default)

    def config(self) -> dict[str, Any]:
        """config.json as transformers would write it."""
        hidden, heads = self.need(f"{self.architecture}.embedding_length"), self.own("attention.head_count")
        layers = self.need(f"{self.architecture}.block_count")
        config = {
            "architectures": [self.class_name],
            "model_type": self.family,
            "dtype": "bfloat16",
            "vocab_size": self._shape("token_embd.weight")[0],
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self.own("attention.head_count_kv", heads),
            "head_dim": self.own("attention.key_length", hidden // heads),
            "intermediate_size": self.own("feed_forward_length"),
            "max_position_embeddings": self.own("context_length"),
            "rms_norm_eps": self.own("attention.layer_norm_rms_epsilon"),
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "attention_bias": "blk.0.attn_q.bias" in self.tensors,
            "rope_parameters": self._rope(),
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id"),
        }
        if self.family == "qwen3_moe":
            config |= {
                "num_experts": self.own("expert_count"),
                "num_experts_per_tok": self.own("expert_used_count"),
                "moe_intermediate_size": self.own("expert_feed_forward_length"),
                "norm_topk_prob": True,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        return config

    def entries(self, config: dict[str, Any]) -> Iterator[Entry]:
        """Every tensor under its Hugging Face name."""
        for name in self.tensors:
            if name == "rope_freqs.weight":
                raise CheckpointError(
                    f"{self.path}: its own rotary frequencies (rope_freqs) cannot be served from GGUF"
                )
            stem, _, kind = name.rpartition(".")
            if stem in TOP:
                yield self._entry(f"{TOP[stem]}.{kind}", name)
                continue
            block, index, part = [*stem.split(".", 2), "", ""][:3]
            if block == "blk" and part in BLOCK:
                heads = self._permuted_heads(part, config)
                yield self._entry(f"model.layers.{index}.{BLOCK[part]}.{kind}", name, heads)
            elif block == "blk" and part in EXPERTS:
                for expert in range(self._shape(name)[0]):
                    target = f"model.layers.{index}.mlp.experts.{expert}.{EXPERTS[part]}.{kind}"
                    yield self._expert(target, name, expert)
            else:
                raise CheckpointError(f"{self.path}: tensor {name} is not known")

    def vocabulary(self) -> Vocabulary:
        """The tokenizer, a byte-level BPE."""
        if (kind := self.need("tokenizer.ggml.model")) != "gpt2":
            raise CheckpointError(f"{self.path}: tokenizer {kind!r} is not served from GGUF; known: gpt2")
        types = self.get("tokenizer.ggml.token_type", [])
        left_right = (merge.split(" ", 1) for merge in self.need("tokenizer.ggml.merges"))
        return Vocabulary(
            tokens=self.need("tokenizer.ggml.tokens"),
            merges=[(left, right) for left, right in left_right],
            splitting=self.get("tokenizer.ggml.pre", "default"),
            special={i: kind == CONTROL for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)},
            bos=self.get("tokenizer.ggml.bos_token_id"),
            eos=self.get("tokenizer.ggml.eos_token_id"),
            pad=self.get("tokenizer.ggml.padding_token_id"),
            add_bos=bool(self.get("tokenizer.ggml.add_bos_token", False)),
            chat_template=self.get("tokenizer.chat_template"),
            max_len=self.own("context_length"),
        )

    def eos_token_ids(self) -> list[int]:
        """The end of the text and, where it is another token, of a turn."""
        ids = (self.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
        return sorted({token for token in ids if token is not None})

    def _rope(self) -> dict[str, Any]:
        kind = self.own("rope.scaling.type", "none")
        rope = {"rope_theta": self.own("rope.freq_base", 10_000.0)}
        if kind == "none":
            return rope | {"rope_type": "default"}
        if kind not in ("linear", "yarn"):
            raise CheckpointError(
                f"{self.path}: rope scaling {kind!r} is not served; known: none, linear, yarn"
            )
        scaled = rope | {"rope_type": kind, "factor": self.own("rope.scaling.factor")}
        if original := self.own("rope.scaling.original_context_length"):
            scaled["original_max_position_embeddings"] = original
        return scaled

    def _permuted_heads(self, part: str, config: dict[str, Any]) -> int:
        if not self.permuted or part not in ("attn_q", "attn_k"):
            return 0
        heads: int = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        return heads

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def _values(self, name: str) -> Matrix:
        tensor = self.tensors[name]
        values: Matrix = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return values.reshape(self._shape(name))

    def _entry(self, target: str, name: str, permuted_heads: int = 0) -> Entry:
        def values() -> Matrix:
            read = self._values(name)
            return halves_first(read, permuted_heads) if permuted_heads else read

        return Entry(target, self._shape(name), values)

    def _expert(self, target: str, name: str, expert: int) -> Entry:
        def values() -> Matrix:
            tensor = self.tensors[name]
            one: Matrix = gguf.quants.dequantize(tensor.data[expert], tensor.tensor_type)
            return one

        return Entry(target, self._shape(name)[1:], values)


def halves_first(rows: Matrix, heads: int) -> Matrix:
    """Undo llama.cpp's order of q and k rows: each head's x0, y0, x1, y1 ... become x0, x1 ..., y0, y1 ..."""
    per_head = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return per_head.swapaxes(1, 2).reshape(rows.shape)
