"""Which container images the operator's pods run where the spec names none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Images:
    runtime: str = "broadbeam/runtime:0.1.0"  # engines broadbeam and sim
    router: str = "broadbeam/router:0.1.0"  # the gateway
    vllm: str = "vllm/vllm-openai:v0.32.0"  # the first whose flags were checked; see manifests/vllm.py
