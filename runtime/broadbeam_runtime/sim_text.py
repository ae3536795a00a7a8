"""The simulator's answers: deterministic words, the same whichever rank prefilled."""

from __future__ import annotations

import hashlib

from broadbeam_runtime.core import Request, TokenLogprob
from broadbeam_runtime.sim_tokenizer import END, FIRST_WORD, SPECIAL, VOCABULARY, WORDS

MEAN_LENGTH = 64  # tokens after which an answer ends on average, unless told to ignore it


def seed_of(request: Request, engine_seed: int) -> bytes:
    """What an answer depends on: the prompt, and with temperature > 0 the request's seed, or else chance."""
    sampling = request.sampling
    chance = 0 if sampling.temperature == 0 else request.id if sampling.seed is None else sampling.seed
    text = f"{engine_seed}:{chance}:{request.prompt_token_ids}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def next_token(seed: bytes, made: int, request: Request) -> int:
    """The token after `made` tokens of the answer: a word, or the end."""
    sampling = request.sampling
    digest = hashlib.blake2b(made.to_bytes(8, "little"), key=seed, digest_size=8).digest()
    may_end = 0 < made >= sampling.min_tokens and not sampling.ignore_eos
    if may_end and int.from_bytes(digest[:4], "little") % MEAN_LENGTH == 0:
        return END
    word = int.from_bytes(digest[4:], "little") % len(WORDS)
    return FIRST_WORD + word + (len(WORDS) if made else 0)


def logprob(token: int, wanted: int | None) -> TokenLogprob:
    """Made-up log probabilities with `wanted` best tokens, the chosen one first."""
    plain = VOCABULARY - len(SPECIAL)
    others = [len(SPECIAL) + (token + step - len(SPECIAL)) % plain for step in range(1, wanted or 0)]
    top = [(token, -0.5), *((other, -1.5 - rank) for rank, other in enumerate(others))]
    return TokenLogprob(token, -0.5, tuple(top) if wanted else ())
