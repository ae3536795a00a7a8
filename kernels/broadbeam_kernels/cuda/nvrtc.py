"""CUDA C++ to a loaded kernel: compiled by NVRTC at first use, kept on disk, launched through the driver.

Nothing but torch's own wheels is needed (no nvcc, no CUDA headers). Compiled code lies in
$XDG_CACHE_HOME/broadbeam/kernels, named by a hash of everything it depends on.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc

from ..tuning import multiprocessors

log = logging.getLogger(__name__)


class CudaError(RuntimeError):
    """The driver or the compiler refused; the message says what it said."""


def checked(result: tuple[Any, ...]) -> Any:
    """The value of a `cuda.bindings` call, which answers (status, value)."""
    status, *values = result
    if int(status):
        raise CudaError(f"{type(status).__name__}.{status.name}")
    return values[0] if values else None


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "broadbeam" / "kernels"


def _compile(source: str, headers: Mapping[str, str], options: list[str]) -> bytes:
    names = [name.encode() for name in headers]
    texts = [text.encode() for text in headers.values()]
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", len(names), texts, names))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(status):
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise CudaError(f"{status.name}: {log.decode(errors='replace').strip(chr(0)).strip()}")
    code = b" " * int(checked(nvrtc.nvrtcGetCUBINSize(program)))
    checked(nvrtc.nvrtcGetCUBIN(program, code))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return code


def cubin(source: str, headers: Mapping[str, str], defines: Mapping[str, int], arch: str) -> bytes:
    """Machine code of `source` for `arch` (`sm_90a`), from the disk if it was compiled before."""
    options = [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{k}={v}" for k, v in defines.items())]
    version = nvrtc.nvrtcVersion()[1:]
    facts = repr((source, sorted(headers.items()), options, version))
    path = cache_folder() / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.cubin"
    with suppress(OSError):  # it is not there, or another user's
        return path.read_bytes()
    code = _compile(source, headers, options)
    try:
        _keep(path, code)
    except OSError as error:
        log.warning("compiled kernels cannot be kept in %s: %s", path.parent, error)
    return code


def _keep(path: Path, code: bytes) -> None:
    """Write whole or not at all, whoever else compiles the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / path.name
        written.write_bytes(code)
        written.replace(path)


class Function:
    """A kernel loaded on one device, with the shared memory it asks for."""

    def __init__(self, code: bytes, name: str, device: int, shared_bytes: int) -> None:
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes the device's context current on this thread
            self._module = checked(driver.cuModuleLoadData(code))
            self._function = checked(driver.cuModuleGetFunction(self._module, name.encode()))
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuFuncSetAttribute(self._function, most, shared_bytes))
        self._device = device
        self._shared_bytes = shared_bytes

    @cache  # noqa: B019 (kernels live as long as the process)
    def clusters(self, threads: int, size: int) -> int:
        """Clusters of `size` blocks that run at once on the device."""
        if size == 1:
            return multiprocessors(self._device)
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dimensions = attribute.value.clusterDim
        dimensions.x, dimensions.y, dimensions.z = size, 1, 1
        config = self._config(size, threads, attribute)
        return int(checked(driver.cuOccupancyMaxActiveClusters(self._function, config)))

    def _config(self, blocks: int, threads: int, *attributes: driver.CUlaunchAttribute) -> Any:
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        config.attrs = list(attributes)
        config.numAttrs = len(attributes)
        return config

    @cache  # noqa: B019 (8 us a launch, which would be the host's at every token)
    def _early(self, blocks: int, threads: int, stream: int) -> Any:
        """How to launch on `stream` while what lies ahead there still runs."""
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = self._config(blocks, threads, attribute)
        config.hStream = stream
        return config

    def launch(self, blocks: int, threads: int, arguments: tuple[int, ...], early: bool = False) -> None:
        """Queue on torch's current stream; `arguments` are the addresses of the parameters' values.

        `early`: blocks start while the kernel ahead ends, and wait for it themselves.
        """
        stream = torch.cuda.current_stream(self._device).cuda_stream
        pointers = (ctypes.c_void_p * len(arguments))(*arguments)
        at = ctypes.addressof(pointers)
        if early:
            config = self._early(blocks, threads, stream)
            checked(driver.cuLaunchKernelEx(config, self._function, at, 0))
            return
        shape = (blocks, 1, 1, threads, 1, 1)
        checked(driver.cuLaunchKernel(self._function, *shape, self._shared_bytes, stream, at, 0))


def native(device: int) -> str:
    """The architecture to compile for, with the instructions that only it has: `sm_90a`."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}a"
