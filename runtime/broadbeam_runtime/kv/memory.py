"""How much memory the KV cache takes, and the tensor that is it."""

from __future__ import annotations

import mmap
from contextlib import suppress
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from broadbeam_crds.engine_config import ConfigError, EngineConfig
from broadbeam_runtime.models.architecture import Architecture

CPU_SHARE = 0.25  # of the memory that is free when the engine starts, over the pod's ranks
CUDA_SHARE = 0.85  # of what the weights left free; the rest is for activations
MIB = 1 << 20


def make_cache(
    config: EngineConfig, shape: Architecture, max_len: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The cache (blocks, layers, block_size, width): a block is one run of bytes. ConfigError if it cannot
    hold one sequence of `max_len` tokens, or is more than there is."""
    size = config.cache.block_size
    block_bytes = shape.layers * size * shape.kv_width * dtype.itemsize
    per_sequence = -(-max_len // size)
    free = free_bytes(device)
    given = config.cache.memory_bytes
    if given is None:
        share = CUDA_SHARE if device.type == "cuda" else CPU_SHARE / config.parallel.ranks_per_node
        useful = (config.scheduling.max_sequences + 1) * per_sequence * block_bytes
        budget = min(int(free * share), useful)
    elif given * (sharing := 1 if device.type == "cuda" else config.parallel.ranks_per_node) > free:
        each = f", for each of {sharing} ranks" if sharing > 1 else ""
        raise ConfigError(
            f"cache.memory_bytes is {_mib(given)}{each}, but only {_mib(free)} are free on {device.type}"
        )
    else:
        budget = given
    blocks = budget // block_bytes
    if blocks < per_sequence:
        name = "the share of free memory" if given is None else "cache.memory_bytes"
        raise ConfigError(
            f"{name} is {_mib(budget)}, but one sequence of model.max_model_len = {max_len} tokens needs "
            f"{_mib(per_sequence * block_bytes)}; give more memory or a smaller max_model_len"
        )
    dimensions = (blocks, shape.layers, size, shape.kv_width)
    if device.type == "cpu":
        return host_memory(prod(dimensions) * dtype.itemsize).view(dtype).view(dimensions)
    return torch.zeros(dimensions, dtype=dtype, device=device)


def host_memory(size: int) -> Tensor:
    """(size,) zero bytes that take memory as they are first written, in huge pages where the kernel gives
    them: it reads another process's memory page by page, so KV transfer on one machine is up to 1.7x as fast
    with pages of 2 MiB (AMD EPYC, process_vm_readv)."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without transparent huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def cache_dtype(config: EngineConfig, compute: torch.dtype) -> torch.dtype:
    match config.cache.dtype:
        case "auto":
            return compute
        case "fp8":
            raise ConfigError(
                "cache.dtype fp8 is not supported yet by engine broadbeam; use auto or bfloat16"
            )
        case name:
            dtype = getattr(torch, name)
            assert isinstance(dtype, torch.dtype)
            return dtype


def free_bytes(device: torch.device) -> int:
    """Free device memory; on a CPU what the kernel calls available, within the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    in_container = container_bytes(Path("/sys/fs/cgroup"))
    return available if in_container is None else min(available, in_container)


def container_bytes(group: Path) -> int | None:
    """What a container may still take; None without a limit. The kernel counts the pages of files too, the
    weights just read among them, but gives those up when memory runs short."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    files = sum(int(pages.get(name, 0)) for name in ("active_file", "inactive_file"))
    return int(limit) - (int(used) - files) if limit.isdecimal() else None


def _mib(count: int) -> str:
    return f"{count / MIB:,.1f} MiB" if count >= MIB // 10 else f"{count:,} bytes"
