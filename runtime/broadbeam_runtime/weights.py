"""Reads a model's safetensors: by name, in the engine's dtype, on the engine's device."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from broadbeam_runtime.checkpoint import CheckpointError
from broadbeam_runtime.models.architecture import FP8_BLOCK


class Weights:
    """Tensors of one model directory. `at("model.layers.0")` is the same checkpoint seen from a prefix.

    `loaded_bytes` counts what was handed out, which is what the model then holds.
    """

    def __init__(self, files: Files, dtype: torch.dtype, device: torch.device, prefix: str = ""):
        self.files, self.dtype, self.device, self.prefix = files, dtype, device, prefix

    @property
    def loaded_bytes(self) -> int:
        return self.files.loaded_bytes

    def at(self, name: str) -> Weights:
        return Weights(self.files, self.dtype, self.device, f"{self.prefix}{name}.")

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.files

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor; FP8 block-quantised ones come dequantised."""
        full = self.prefix + name
        value = self.files.read(full)
        if not value.is_floating_point():
            raise CheckpointError(
                f"{self.files.model_dir}: tensor {full} is {value.dtype}, only floating point is served"
            )
        if value.dtype == torch.float8_e4m3fn:
            value = _dequantize(value, self.files.read(full + "_scale_inv"))
        loaded = value.to(device=self.device, dtype=dtype or self.dtype)
        self.files.loaded_bytes += loaded.nbytes
        return loaded

    def rows(self, names: Iterable[str], suffix: str = "weight") -> Tensor:
        """Several matrices (or biases) stacked along their rows, for one fused multiplication."""
        parts = [self.tensor(f"{name}.{suffix}") for name in names]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class Files:
    """The open safetensors files of a directory and which tensor lies in which."""

    def __init__(self, model_dir: Path):
        self.model_dir = model_dir
        self.open: dict[str, Any] = {}
        self.loaded_bytes = 0
        self.where = self._index()

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def read(self, name: str) -> Tensor:
        file = self.where.get(name)
        if file is None:
            raise CheckpointError(f"{self.model_dir}: tensor {name} is missing")
        try:
            value: Tensor = self._file(file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.model_dir / file}: {error}") from error
        return value

    def _file(self, name: str) -> Any:
        if name not in self.open:
            try:
                self.open[name] = safe_open(self.model_dir / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.model_dir / name}: {error}") from error
        return self.open[name]

    def _index(self) -> dict[str, str]:
        index = self.model_dir / "model.safetensors.index.json"
        if index.exists():
            where: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return where
        files = sorted(path.name for path in self.model_dir.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.model_dir}: no .safetensors file")
        return {name: file for file in files for name in self._file(file).keys()}  # noqa: SIM118


def _dequantize(value: Tensor, scale: Tensor) -> Tensor:
    """FP8 with a float32 scale per block, as DeepSeek-V3 stores them: NAME and NAME_scale_inv."""
    rows, columns = value.shape
    wide = scale.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return value.float() * wide.float()
