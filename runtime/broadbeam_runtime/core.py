"""The nouns of the runtime: what the HTTP server hands an engine, and what an engine hands back.

Two engines stand behind `Engine`: the torch engine (`engine.py`) and the simulator (`sim.py`). Text never
reaches them: the server tokenises, detokenises and looks for stop strings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from broadbeam_runtime.distribution import Distribution

STOP_TIMEOUT_S = 5.0
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the chosen token's and the k best


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RemotePrefill:
    """Where a decode rank finds the KV blocks of a prompt, as the prefill rank's answer said it.

    `params` is the whole `kv_transfer_params` object (vLLM's field names); `first_token` is the token
    that the prefill rank sampled, so that the decode rank computes no prompt token.
    """

    params: dict[str, Any]
    num_tokens: int
    first_token: TokenLogprob | None = None
    cached_tokens: int = 0  # prompt tokens that the prefill rank found in its prefix cache


@dataclass(frozen=True, slots=True)
class Request:
    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival_s: float  # time.monotonic()
    hold_blocks: bool = False  # prefill leg: keep the prompt's blocks under a lease
    remote_prefill: RemotePrefill | None = None  # decode leg: pull them


@dataclass(frozen=True, slots=True)
class Output:
    """What one step made for one request; `finish` is set on the last."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    cached_tokens: int = 0  # prompt tokens found in this rank's prefix cache
    transferred_tokens: int = 0  # prompt tokens whose KV came from a prefill rank
    kv_transfer_params: dict[str, Any] | None = None
    queue_s: float = 0.0  # on the first output: from arrival until the request first ran


# No KV reads yet; the bounds are vLLM's.
TRANSFER_BYTES = Distribution(tuple(2.0**power for power in range(11, 35, 2)))
TRANSFER_S = Distribution((0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0))


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for /metrics; counters count from the start of the process."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0  # 0..1
    kv_blocks: int = 0
    block_size: int = 0
    prefix_queries: int = 0  # tokens
    prefix_hits: int = 0
    external_queries: int = 0
    external_hits: int = 0
    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    prompt_tokens_transferred: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    dummy_steps: int = 0
    held_blocks: int = 0  # under a lease for a decode rank
    transfer_bytes: Distribution = TRANSFER_BYTES  # of reads that succeeded
    transfer_s: Distribution = TRANSFER_S
    transfer_failures: int = 0
    leases_expired: int = 0
    weight_bytes: int = 0
    kv_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RankIdentity:
    """Which rank of its group a process is. `coordinator` is the resolved address of the group's node 0."""

    global_rank: int = 0
    local_rank: int = 0
    world: int = 1
    host: str = "127.0.0.1"  # this pod's address, for the group's own connections
    coordinator: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the server must know about a loaded model."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    tokenizer_dir: str | None  # holds tokenizer.json and tokenizer_config.json; None: the simulator's own


OnOutputs = Callable[[Sequence[Output]], None]


class Engine(Protocol):
    """Runs requests of one rank. Methods may be called from any thread; outputs come from its own."""

    @property
    def model(self) -> ModelInfo: ...

    def start(self, on_outputs: OnOutputs) -> None:
        """Load, join the group, pass one canary token through it; returns when this rank can serve."""

    def submit(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> None:
        """Free what the request holds; a last Output with finish="abort" follows unless it had ended."""

    def stats(self) -> EngineStats: ...

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Leave; a rank of a group within `timeout_s` with the others, or else without them."""


@dataclass(slots=True)
class LoadProgress:
    """Where a starting rank is; the supervisor shows it in /readyz."""

    stage: str = "starting"
    done: float | None = None  # 0..1 where known
    detail: str = field(default="")
