"""Which connector a rank uses, as its config says."""

from __future__ import annotations

from broadbeam_runtime.kv.connector import KVConnector
from broadbeam_runtime.settings import RankSettings


def simulated(settings: RankSettings) -> KVConnector | None:
    return None
