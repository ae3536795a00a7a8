"""Text to token ids and back, as the server needs it; `tokenizers` does the work for real models."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from broadbeam_runtime.chat_template import ChatTemplate


class TokenizerError(ValueError):
    """A tokenizer that cannot be read or does not fit the model; names the file and what is wrong."""


class Tokenizer(Protocol):
    """`chat` is None for a model without a chat template."""

    @property
    def chat(self) -> ChatTemplate | None: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def longest_token(self) -> int:
        """The most characters of a text that become one token."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that this token adds to a text; None where they depend on its neighbours."""

    def is_special(self, token_id: int) -> bool: ...


@lru_cache(maxsize=1)
def _unicode_to_byte() -> dict[str, int]:
    """The inverse of GPT-2's printable alphabet of bytes, which every byte-level BPE uses."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


class HuggingFaceTokenizer:
    """The tokenizer.json and tokenizer_config.json of a model directory."""

    def __init__(self, directory: str) -> None:
        from tokenizers import Tokenizer as Fast

        path = Path(directory) / "tokenizer.json"
        try:
            raw = json.loads(path.read_bytes())
            self._fast = Fast.from_file(str(path))
        except Exception as error:  # tokenizers raises no narrower class for a file that it cannot use
            raise TokenizerError(f"{path}: {error}") from error
        self._byte_level = "ByteLevel" in json.dumps(raw.get("decoder"))
        added = raw.get("added_tokens", [])
        self._special = frozenset(token["id"] for token in added if token.get("special"))
        self._added = {token["id"]: token["content"] for token in added}
        # A vocabulary of bytes spells each byte as a character. Normalising may shorten a text: an accent
        # joins its letter, and Hangul of three letters becomes one.
        normalizer = raw.get("normalizer")
        plain = normalizer is None or normalizer.get("normalizers") == []
        self._longest = max(map(len, self._fast.get_vocab()), default=1) * (1 if plain else 4)
        self._config = _optional_json(Path(directory) / "tokenizer_config.json")
        self._chat = self._chat_template(Path(directory))

    def _chat_template(self, directory: Path) -> ChatTemplate | None:
        source = self._config.get("chat_template")
        if (file := directory / "chat_template.jinja").exists():
            source = file.read_text(encoding="utf-8")
        if isinstance(source, list):  # named templates: [{"name": "default", "template": …}]
            source = next((item["template"] for item in source if item.get("name") == "default"), None)
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return (
            ChatTemplate(source, {name: _content(self._config.get(name)) for name in names})
            if source
            else None
        )

    @property
    def chat(self) -> ChatTemplate | None:
        return self._chat

    @property
    def vocab_size(self) -> int:
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    @property
    def longest_token(self) -> int:
        return self._longest

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._fast.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return str(self._fast.decode(ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes | None:
        added: str | None = self._added.get(token_id)
        if added is not None:
            return added.encode()
        if not self._byte_level:
            return None
        token: str | None = self._fast.id_to_token(token_id)
        if token is None:  # the model's vocabulary may be padded past the tokenizer's
            return b""
        table = _unicode_to_byte()
        return (
            bytes(table[char] for char in token) if all(char in table for char in token) else token.encode()
        )

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special


def _optional_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TokenizerError(f"{path}: {error}") from error


def _content(token: Any) -> str:
    """A special token of tokenizer_config.json: a string, an object with `content`, or null."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
