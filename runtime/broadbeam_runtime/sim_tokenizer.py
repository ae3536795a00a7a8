"""The simulator's own vocabulary: special tokens, every byte, and a few hundred short words.

Any text survives a round trip, a word is about one token, and nothing has to be fetched.
"""

from __future__ import annotations

import re

from broadbeam_runtime.chat_template import ChatTemplate

SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
END = SPECIAL.index("<|end|>")
FIRST_BYTE = len(SPECIAL)
FIRST_WORD = FIRST_BYTE + 256
_WORDS = """
a about above after again all along always an and any are as at back bay beam bearing before below between
boat bow bright broad but by calm can captain cargo chart clear coast cold come course crew current day
deck deep down each east ebb engine even every far fast few find first fleet flow fog for from full gale
give good great green grey hand harbour has have he heading high hold home horizon hour hull in into is
island it its keel keep knot land lantern large last later lead leave left less light like line little
long low made main many mast mate may mile mist moon more morning most moves much narrow near never new
night no north not now of off old on one open or other our out over own passage past pilot place point
port quiet rail rain reach rest rise river roll rope round rudder run sail same sea second see set shallow
she ship shore short side signal sky slow small so some sound south spray stand star stay steady steam
steer stern still storm strong sun swell tack that the their them then there these they this three through
tide time to toward turn two under until up us very voyage wait warm watch water wave way we west wheel
when where which while white wide will wind wing with without work world yard year you
"""
WORDS = tuple(_WORDS.split())
VOCABULARY = FIRST_WORD + 2 * len(WORDS)  # each word with and without a leading space
CHAT = (
    "{% for message in messages %}<|{{ message['role'] if message['role'] in ['system', 'user']"
    " else 'assistant' }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_PIECES = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + r")|( ?[A-Za-z]+)|(.)", re.DOTALL)


class SimTokenizer:
    """Deterministic and lossless; ids below `FIRST_BYTE` are special."""

    def __init__(self) -> None:
        words = [*WORDS, *(" " + word for word in WORDS)]
        self._bytes = [token.encode() for token in SPECIAL]
        self._bytes += [bytes([byte]) for byte in range(256)]
        self._bytes += [word.encode() for word in words]
        self._word_ids = {word: FIRST_WORD + index for index, word in enumerate(words)}
        self._chat = ChatTemplate(CHAT, {"bos_token": "<|begin|>", "eos_token": "<|end|>"})

    @property
    def chat(self) -> ChatTemplate | None:
        return self._chat

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @property
    def longest_token(self) -> int:
        return max(map(len, self._bytes))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        for special, word, other in _PIECES.findall(text):
            if special:
                ids.append(SPECIAL.index(special))
            elif (word_id := self._word_ids.get(word)) is not None:
                ids.append(word_id)
            else:
                ids += [FIRST_BYTE + byte for byte in (word + other).encode("utf-8", "replace")]
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        kept = (token for token in ids if not (skip_special_tokens and self.is_special(token)))
        return b"".join(self.token_bytes(token) for token in kept).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def is_special(self, token_id: int) -> bool:
        return token_id < FIRST_BYTE
