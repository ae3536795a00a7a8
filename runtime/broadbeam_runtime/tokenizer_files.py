"""Writes tokenizer.json and tokenizer_config.json for a byte-level BPE vocabulary."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id, merges in order of rank ("a b"), and what is special about some of them."""

    tokens: list[str]
    merges: list[tuple[str, str]]
    splitting: str  # llama.cpp's name of the pre-tokenizer
    special: dict[int, bool] = field(default_factory=dict)  # id -> True control, False user-defined
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    add_bos: bool = False
    chat_template: str | None = None
    max_len: int | None = None


def write_tokenizer(directory: Path, vocabulary: Vocabulary) -> None:
    """Both files; ValueError if the pre-tokenizer is unknown."""
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=vocabulary.merges, fuse_unk=False))
    split(tokenizer, vocabulary.splitting)
    tokenizer.decoder = decoders.ByteLevel()
    for index, control in vocabulary.special.items():
        added = AddedToken(vocabulary.tokens[index], normalized=False, special=control)
        (tokenizer.add_special_tokens if control else tokenizer.add_tokens)([added])
    if vocabulary.add_bos and vocabulary.bos is not None:
        bos = vocabulary.tokens[vocabulary.bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary.bos)]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(_config(vocabulary), indent=1), encoding="utf-8"
    )


def split(tokenizer: Tokenizer, name: str) -> None:
    """Set how text is cut before merging, as the model was trained (llama.cpp's `tokenizer.ggml.pre`)."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    match name:
        case "gpt-2" | "default":
            tokenizer.pre_tokenizer = byte_level
        case "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        case "llama-bpe":
            cut = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, plain])
        case "qwen2":
            cut = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
            tokenizer.normalizer = normalizers.NFC()
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, plain])
        case _:
            raise ValueError(f"pre-tokenizer {name!r} is not known; known: gpt-2, smollm, llama-bpe, qwen2")


def _config(vocabulary: Vocabulary) -> dict[str, Any]:
    named = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos, "pad_token": vocabulary.pad}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    config |= {name: vocabulary.tokens[index] for name, index in named.items() if index is not None}
    if vocabulary.max_len:
        config["model_max_length"] = vocabulary.max_len
    if vocabulary.chat_template:
        config["chat_template"] = vocabulary.chat_template
    return config
