"""What the engine's answers must equal: those of transformers, greedy and in float32."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

NEW_TOKENS = 12
Tokens = tuple[int, ...]


class Model:
    """A model directory, and what transformers answers with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def expected(
        self, prompts: Iterable[Tokens], answers: Iterable[list[int]], count: int = NEW_TOKENS
    ) -> list[list[int]]:
        """Equal to `answers` if and only if each is the greedy answer, of `count` tokens, to its prompt."""
        return [self._choices(prompt, answer, count) for prompt, answer in zip(prompts, answers, strict=True)]

    def _choices(self, prompt: Tokens, answer: list[int], count: int) -> list[int]:
        """The best token after the prompt, and after each token of `answer` but the last: in one pass, which
        takes a quarter of the time that generating them takes."""
        assert len(answer) == count, f"{len(answer)} tokens instead of {count}: {answer}"
        with torch.inference_mode():
            logits = self._reference(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
        return [int(token) for token in logits.argmax(-1)]

    @cached_property
    def _reference(self) -> Any:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        return AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32)
