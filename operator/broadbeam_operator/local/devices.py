"""Accelerators of this machine, and which of them are ours to give to pods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

VISIBLE_DEVICES = {"nvidia.com/gpu": "CUDA_VISIBLE_DEVICES", "amd.com/gpu": "HIP_VISIBLE_DEVICES"}


def count(dev: Path = Path("/dev")) -> int:
    """How many there are by their device files: nvidia0, nvidia1 …; for AMD dri/renderD128 … beside kfd."""
    names = [path.name for path in dev.iterdir()] if dev.exists() else []
    nvidia = sum(name.startswith("nvidia") and name[6:].isdigit() for name in names)
    if nvidia or not (dev / "kfd").exists():
        return nvidia
    return sum(path.name.startswith("renderD") for path in (dev / "dri").glob("*"))


def ours(environ: Mapping[str, str], there: int) -> tuple[str, ...]:
    """Names of the devices that we may use: those that this process was told of, else all of them.

    As CUDA reads it, what comes after a number that no device has counts for nothing ("0,-1,1" is device 0).
    """
    told = next((environ[name] for name in VISIBLE_DEVICES.values() if name in environ), None)
    if told is None:
        return tuple(map(str, range(there)))
    names: list[str] = []
    for name in (part.strip() for part in told.split(",")):
        if not name or name.startswith("-") or (name.isdigit() and int(name) >= there):
            break
        names.append(name)
    return tuple(names)
