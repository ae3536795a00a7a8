"""API keys: read from files, compared without telling by timing how much of a guess was right."""

from __future__ import annotations

import logging
import os
import secrets
from hashlib import blake2b
from pathlib import Path

from broadbeam_crds.engine_config import ConfigError
from broadbeam_router.errors import Unauthorized
from broadbeam_router.heads import Head

log = logging.getLogger(__name__)

Signature = tuple[tuple[str, int, int, int], ...]
_SECRET = secrets.token_bytes(32)


class ApiKeys:
    """The keys in a directory, one a line in any of its files; blank lines and lines from # on are skipped.

    No key is kept: only its hash under a secret of this process, so a lookup's time depends on nothing a
    client can steer. A directory that becomes unreadable lets nobody in."""

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)
        self._digests: frozenset[bytes] = frozenset()
        self._signature: Signature | None = None
        if not self._directory.is_dir():
            raise ConfigError(f"auth.keys_dir: {directory} is not a directory")
        self.refresh()

    def refresh(self) -> None:
        """Read the files again if one of them changed."""
        try:
            files = self._files()
            signature = tuple(_signature(file) for file in files)
            if signature == self._signature:
                return
            lines = [line for file in files for line in file.read_bytes().split(b"\n")]
        except OSError as error:
            log.error("API keys cannot be read, nobody is let in: %s", error)
            self._digests, self._signature = frozenset(), None
            return
        keys = {line.strip() for line in lines}
        self._digests = frozenset(_digest(key) for key in keys if key and not key.startswith(b"#"))
        self._signature = signature
        log.log(logging.INFO if self._digests else logging.WARNING, "%d API keys", len(self._digests))

    def _files(self) -> list[Path]:
        # A mounted Secret holds links to ..data/NAME; its own bookkeeping starts with two dots.
        return sorted(f for f in self._directory.iterdir() if not f.name.startswith(".") and f.is_file())

    def check(self, head: Head) -> None:
        """Raises Unauthorized unless `head` carries a known key."""
        if head.key_digest is None:
            head.key_digest = _bearer_digest(head.headers)
        if head.key_digest not in self._digests:
            raise Unauthorized("the API key is not known", "authorization")

    def check_headers(self, headers: dict[bytes, bytes]) -> None:
        """As `check`, of a head that is not whole yet."""
        if _bearer_digest(headers) not in self._digests:
            raise Unauthorized("the API key is not known", "authorization")


def _bearer_digest(headers: dict[bytes, bytes]) -> bytes:
    authorization = headers.get(b"authorization")
    if authorization is None:
        raise Unauthorized("an API key is needed: Authorization: Bearer KEY", "authorization")
    scheme, _, key = authorization.partition(b" ")
    return _digest(key.strip()) if scheme.lower() == b"bearer" else b""


def _digest(key: bytes) -> bytes:
    return blake2b(key, digest_size=32, key=_SECRET).digest()


def _signature(file: Path) -> tuple[str, int, int, int]:
    stat = os.stat(file)
    return file.name, stat.st_mtime_ns, stat.st_ino, stat.st_size
