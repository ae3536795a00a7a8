"""Token ids to text as they come: complete characters only, stop strings found and never shown."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from broadbeam_runtime.core import FinishReason, Output, TokenLogprob
from broadbeam_runtime.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class ByteDetokenizer:
    """For tokenizers whose tokens are runs of bytes: constant work per token, exact at every split."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id) or b"")

    def flush(self) -> str:
        """What an unfinished character leaves behind."""
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For other tokenizers (spaces depend on neighbours): decode a short window twice, show the difference.

    The window starts at a token that is already shown, so that its own leading space cancels out.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._window: list[int] = []
        self._shown = 0  # leading tokens of the window whose text was given out

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        before, after = self._texts()
        if len(after) <= len(before) or after.endswith(REPLACEMENT):
            return ""
        del self._window[: self._shown]
        self._shown = len(self._window)
        return after[len(before) :]

    def flush(self) -> str:
        before, after = self._texts()
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        return decode(self._window[: self._shown], self._skip_special), decode(
            self._window, self._skip_special
        )


def detokenizer(tokenizer: Tokenizer, skip_special_tokens: bool) -> ByteDetokenizer | WindowDetokenizer:
    """The detokenizer that fits: a tokenizer that knows the bytes of token 0 knows those of all."""
    fits = any(
        tokenizer.token_bytes(token) is not None for token in range(256) if not tokenizer.is_special(token)
    )
    return (ByteDetokenizer if fits else WindowDetokenizer)(tokenizer, skip_special_tokens)


@dataclass(frozen=True, slots=True)
class TextRules:
    """Where a text ends and what it shows."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Delta:
    """What one message adds to a choice; `stop_reason` is the stop string or stop token id that ended it."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: FinishReason | None
    stop_reason: str | int | None


class TextStream:
    """The text of one sequence. `push` every output of the engine in order; after a delta with `finish`
    the sequence is over, even where the engine does not know it yet (a stop string)."""

    def __init__(self, tokenizer: Tokenizer, rules: TextRules) -> None:
        self._detokenizer = detokenizer(tokenizer, rules.skip_special_tokens)
        self._rules = rules
        self._longest = max((len(stop) for stop in rules.stop), default=0)
        self._held = ""  # made but not shown: it may be the beginning of a stop string
        self._count = 0

    def push(self, output: Output) -> Delta:
        shown: list[str] = []
        for index, token in enumerate(output.token_ids):
            self._count += 1
            is_last = output.finish is not None and index == len(output.token_ids) - 1
            if is_last and output.stop_token_id == token and not self._rules.include_stop:
                continue  # the token that ended the text is not part of it
            text, stop = self._push_text(self._detokenizer.push(token))
            shown.append(text)
            if stop is not None:
                used = index + 1
                return Delta("".join(shown), output.token_ids[:used], output.logprobs[:used], "stop", stop)
        if output.finish is None:
            return Delta("".join(shown), output.token_ids, output.logprobs, None, None)
        text, stop = self._push_text(self._detokenizer.flush())
        shown += [text, self._held]
        self._held = ""
        finish: FinishReason = "stop" if stop is not None else output.finish
        reason = output.stop_token_id if stop is None else stop
        return Delta("".join(shown), output.token_ids, output.logprobs, finish, reason)

    def _push_text(self, new: str) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string that was met."""
        if not new or not self._rules.stop:
            return new, None
        text = self._held + new
        if self._count > self._rules.min_tokens and (hit := self._first_stop(text)) is not None:
            at, stop = hit
            self._held = ""
            return text[: at + len(stop)] if self._rules.include_stop else text[:at], stop
        keep = self._partial(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        hits = [(text.find(stop), stop) for stop in self._rules.stop]
        return min(((at, stop) for at, stop in hits if at >= 0), default=None, key=lambda hit: hit[0])

    def _partial(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._rules.stop):
                return length
        return 0


class DeltaBuffer:
    """Joins deltas of one choice until `interval` tokens wait; the first and the last go at once."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._waiting: list[Delta] = []
        self.sent_messages = 0

    def add(self, delta: Delta) -> Delta | None:
        self._waiting.append(delta)
        tokens = sum(len(item.token_ids) for item in self._waiting)
        if delta.finish is None and self.sent_messages and tokens < self._interval:
            return None
        joined = Delta(
            "".join(item.text for item in self._waiting),
            tuple(token for item in self._waiting for token in item.token_ids),
            tuple(item for waiting in self._waiting for item in waiting.logprobs),
            delta.finish,
            delta.stop_reason,
        )
        self._waiting = []
        self.sent_messages += 1
        return joined


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """One token as text, for logprobs; part of a character shows as U+FFFD."""
    raw = tokenizer.token_bytes(token_id)
    return tokenizer.decode([token_id], False) if raw is None else raw.decode("utf-8", "replace")
