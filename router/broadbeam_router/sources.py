"""Where endpoints come from: a file that is read again when it changes, or Kubernetes' pods."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass

from broadbeam_crds.engine_config import ConfigError, read
from broadbeam_crds.gateway_config import EndpointsFile
from broadbeam_router.fleet import Fleet

log = logging.getLogger(__name__)

SERVICE_ACCOUNT_DIR = "/var/run/secrets/kubernetes.io/serviceaccount"
POLL_S = 0.25
Signature = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class ApiServer:
    """`service_account` is a directory with the files token and ca.crt, as Kubernetes mounts it."""

    url: str
    service_account: str


class FileSource:
    """Follows `path`; while the file is missing or wrong, the last good set stays in use."""

    def __init__(self, path: str, fleet: Fleet) -> None:
        self._path = path
        self._fleet = fleet
        self._seen: Signature | None = None
        self._complaint = ""

    async def run(self) -> None:
        while True:
            self.refresh()
            await asyncio.sleep(POLL_S)

    def refresh(self) -> None:
        try:
            stat = os.stat(self._path)
            signature = stat.st_mtime_ns, stat.st_ino, stat.st_size
            if signature == self._seen:
                return
            self._fleet.update(read(self._path, EndpointsFile).endpoints)
            self._seen, self._complaint = signature, ""
        except (OSError, ConfigError) as error:
            if str(error) != self._complaint:  # once, not four times a second
                self._complaint = str(error)
                log.warning("endpoints stay as they were: %s", error)
