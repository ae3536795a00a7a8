"""A manifest that is edited while its cluster runs here: looked at now and then, and applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from broadbeam_crds.v1alpha1 import ServingCluster
from broadbeam_operator.images import Images
from broadbeam_operator.local.session import Session
from broadbeam_operator.local.view import View
from broadbeam_operator.manifests.gateway import gateway

Stamp = tuple[int, int, int]  # time, size and number of the file


class RefusedError(Exception):
    """A manifest that cannot run here: a line for each reason; `malformed` if it is no manifest at all."""

    def __init__(self, lines: list[str], malformed: bool) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines
        self.malformed = malformed


@dataclass(slots=True)
class ManifestFile:
    """`read` gives what the file says now, checked for this machine beside the cluster that runs already."""

    path: Path
    read: Callable[[ServingCluster], ServingCluster]
    _seen: Stamp | None = field(init=False)
    _done: Stamp | None = field(init=False)

    def __post_init__(self) -> None:
        self._seen = self._done = stamp(self.path)

    async def look(self, session: Session, view: View) -> None:
        """Apply what has changed; where it cannot be, say why, once, and leave what runs as it is."""
        if not self._changed():
            return
        try:
            wanted = self.read(session.cluster)
        except RefusedError as error:
            for line in error.lines:
                view.say(f"not applied: {line}")
            return
        if wanted == session.cluster:
            return
        if why := obstacle(session.cluster, wanted):
            view.say(f"not applied: {self.path}: {why}")
            return
        view.say(f"{self.path} has changed: applying it")
        await session.change(wanted)

    def _changed(self) -> bool:
        """Whether there is something new, and it was the same at the last look: editors write in steps."""
        now = stamp(self.path)
        settled, self._seen = now == self._seen, now
        if now is None or not settled or now == self._done:
            return False
        self._done = now
        return True


def stamp(path: Path) -> Stamp | None:
    """None while there is no file: some editors rename."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def obstacle(running: ServingCluster, wanted: ServingCluster) -> str | None:
    """Why one cannot become the other without a new start; None if it can."""
    for name in ("name", "namespace"):
        old, new = getattr(running.metadata, name), getattr(wanted.metadata, name)
        if old != new:
            return f'metadata.{name}: "{new}" is not "{old}", which runs here; start another `broadbeam up`'
    if gateway(running, Images()) != gateway(wanted, Images()):
        return (
            "spec.gateway, spec.model.name and whether prefill is apart change the gateway, which keeps its "
            "address here; stop and start again"
        )
    return None
