"""What one process of a pod was told: flags and environment, read once in `__main__` and passed down."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from broadbeam_crds.conventions import KV_SIDE_CHANNEL_PORT, RANK_HTTP_PORT
from broadbeam_crds.engine_config import ConfigError, EngineConfig

EXIT_INTERRUPTED = 130  # by Ctrl-C, as a shell says it: 128 + SIGINT
# What a rank tells OpenMP (libgomp, under torch on a CPU) unless told otherwise: a worker waits awake for a
# few tens of microseconds, which bridges the gap between two operations of a layer. Once asleep it takes
# longer to wake than a multiplication at batch 1 (decode: 1.3x the time); awake for libgomp's own 300,000
# turns it takes the core from whoever else needs it.
OPENMP = {"GOMP_SPINCOUNT": "5000"}


@dataclass(frozen=True, slots=True)
class PodSettings:
    """One pod of a group. `hosts_file` is read before DNS (`conventions.ENV_HOSTS_FILE`)."""

    config: EngineConfig
    config_path: str
    host: str
    node_index: int
    cache_dir: str
    hosts_file: str | None = None

    def global_rank(self, local_rank: int) -> int:
        return self.node_index * self.config.parallel.ranks_per_node + local_rank


@dataclass(frozen=True, slots=True)
class RankSettings:
    """One engine process. `status_fd` is the supervisor's pipe, `model_dir` what it prepared."""

    pod: PodSettings
    local_rank: int
    model_dir: str | None = None
    status_fd: int | None = None

    @property
    def config(self) -> EngineConfig:
        return self.pod.config

    @property
    def global_rank(self) -> int:
        return self.pod.global_rank(self.local_rank)

    @property
    def http_port(self) -> int:
        return RANK_HTTP_PORT + self.local_rank

    @property
    def side_channel_port(self) -> int:
        return KV_SIDE_CHANNEL_PORT + self.local_rank


def family(host: str) -> socket.AddressFamily:
    """Of an address that a server listens on."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def check_config(config: EngineConfig, path: str, node_index: int) -> None:
    """Refuse what no engine of this package can run; ConfigError names field, value and limit."""
    parallel = config.parallel
    for field in ("data", "tensor", "nodes", "ranks_per_node"):
        if (value := getattr(parallel, field)) < 1:
            raise ConfigError(f"{path}: parallel.{field} is {value}, it must be at least 1")
    if parallel.tensor > 1:
        raise ConfigError(
            f"{path}: parallel.tensor is {parallel.tensor}: tensor parallelism is not supported yet "
            f"by engine {config.engine}, it must be 1"
        )
    ranks = parallel.nodes * parallel.ranks_per_node
    if parallel.world_size != ranks:
        raise ConfigError(
            f"{path}: parallel.data * tensor is {parallel.world_size}, but nodes * ranks_per_node is "
            f"{parallel.nodes} * {parallel.ranks_per_node} = {ranks}; they must be equal"
        )
    if not 0 <= node_index < parallel.nodes:
        raise ConfigError(
            f"{path}: node index {node_index} is outside 0..{parallel.nodes - 1} (parallel.nodes)"
        )
    if config.role != "both" and config.kv_transfer is None:
        raise ConfigError(
            f"{path}: role is {config.role}, so kv_transfer.connector must be set (nixl or tcp)"
        )
    _check_sizes(config, path)


def _check_sizes(config: EngineConfig, path: str) -> None:
    sizes = {
        "cache.block_size": config.cache.block_size,
        "scheduling.max_batched_tokens": config.scheduling.max_batched_tokens,
        "scheduling.max_sequences": config.scheduling.max_sequences,
        "scheduling.stream_interval": config.scheduling.stream_interval,
        "sim.kv_bytes_per_token": config.sim.kv_bytes_per_token,
    }
    for field, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{path}: {field} is {value}, it must be at least 1")
    if (memory := config.cache.memory_bytes) is not None and memory < 1:
        raise ConfigError(f"{path}: cache.memory_bytes is {memory}, it must be at least 1 or null")
    if (length := config.model.max_model_len) is not None and length < 2:
        raise ConfigError(f"{path}: model.max_model_len is {length}, it must be at least 2")
