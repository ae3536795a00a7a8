"""Writes a safetensors file tensor by tensor, so that converting a model needs memory for one at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ITEM_BYTES = {"BF16": 2, "F32": 4}
HEADER_LIMIT = 100_000_000  # the format's own


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to write; `values` gives its float32 elements when their turn comes."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], NDArray[np.float32]]


def write(
    path: Path,
    entries: Sequence[Entry],
    dtype: str = "BF16",
    on_entry: Callable[[int], None] = lambda _: None,
) -> None:
    """Write `entries` as `dtype` (BF16 or F32); `on_entry` hears how many are done."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + int(np.prod(entry.shape)) * ITEM_BYTES[dtype]
        header[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for index, entry in enumerate(entries):
            values = np.ascontiguousarray(entry.values(), dtype=np.float32)
            assert values.size == int(np.prod(entry.shape)), entry.name
            file.write((to_bfloat16(values) if dtype == "BF16" else values).tobytes())
            on_entry(index + 1)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16 (ties to even) of finite float32 values."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def read_header(path: Path) -> dict[str, Any]:
    """Names, dtypes, shapes and offsets; ValueError if the file is not whole."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else HEADER_LIMIT + 1
        if length > min(size, HEADER_LIMIT):
            raise ValueError("not a safetensors file, or its beginning is cut off")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != expected:
        raise ValueError(f"{size:,} bytes long instead of {expected:,}: it was cut off or changed")
    return header
