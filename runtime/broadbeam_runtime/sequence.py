"""A request in progress: its tokens, how many of them are computed, the blocks that hold them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from broadbeam_runtime.core import FinishReason, Request, TokenLogprob
from broadbeam_runtime.kv.prefix import ROOT, block_hash
from broadbeam_runtime.sampling import Draw


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and output together in `tokens`; `computed` of them have keys and values in `blocks`."""

    request: Request
    seed: int
    tokens: list[int]
    eos: tuple[int, ...]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of full blocks, as far as anyone asked
    pull: bool = False  # its prompt lies on a prefill rank
    admitted_s: float | None = None  # time.monotonic() when it first ran
    cached_tokens: int = 0
    transferred_tokens: int = 0

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are not there yet; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def output_count(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def queue_s(self) -> float:
        return max(0.0, (self.admitted_s or 0.0) - self.request.arrival_s)

    def admitted(self) -> None:
        if self.admitted_s is None:
            self.admitted_s = time.monotonic()

    def full_hashes(self, count: int, block_size: int) -> list[bytes]:
        """The chained hashes of the first `count` blocks."""
        while len(self.hashes) < count:
            start = len(self.hashes) * block_size
            parent = self.hashes[-1] if self.hashes else ROOT
            self.hashes.append(block_hash(parent, self.tokens[start : start + block_size]))
        return self.hashes[:count]

    def draw(self) -> Draw:
        """How to choose its next token."""
        sampling = self.request.sampling
        early = self.output_count < sampling.min_tokens
        return Draw(sampling, self.seed, self.output_count, self.stop_tokens if early else ())

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        sampling = self.request.sampling
        return sampling.stop_token_ids + (() if sampling.ignore_eos else self.eos)

    def append(self, token: TokenLogprob, max_len: int) -> tuple[FinishReason | None, int | None]:
        """Add a sampled token; how and with which stop token the sequence ends, if it does."""
        self.tokens.append(token.token_id)
        sampling = self.request.sampling
        if token.token_id in self.stop_tokens and self.output_count > sampling.min_tokens:
            return "stop", token.token_id
        if self.output_count >= sampling.max_tokens or len(self.tokens) >= max_len:
            return "length", None
        return None, None
