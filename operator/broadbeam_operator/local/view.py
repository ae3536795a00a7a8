"""What `up` and `demo` show while a cluster runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from broadbeam_operator.local.progress import PodProgress, Progress, RankProgress, Throughput

MIB = 2**20


class View(Protocol):
    def show(self, now: Progress) -> None:
        """Bring the display up to date."""

    def say(self, text: str) -> None:
        """One thing that happened, with the time since the start."""

    def plain(self, text: str) -> None:
        """A line as it is, for pasting."""

    def close(self) -> None: ...


def can_redraw(console: Console) -> bool:
    """Whether what it shows can be drawn over: not a pipe, nor a terminal without such means."""
    return console.is_terminal and not console.is_dumb_terminal


@dataclass(slots=True)
class Clock:
    begun_s: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"[{time.monotonic() - self.begun_s:6.1f} s]"


class LineView:
    """One line for each thing that changed; for pipes, logs and `demo`."""

    def __init__(self, console: Console, clock: Clock) -> None:
        self._console = console
        self._clock = clock
        self._shown: dict[str, str] = {}  # who (a pod, or "POD rank N") -> what was said of it last
        self._pods: set[str] = set()

    def show(self, now: Progress) -> None:
        for name in sorted(self._pods.difference(pod.name for pod in now.pods)):
            self.say(f"{name}: gone")
            self._shown = {who: text for who, text in self._shown.items() if who.split(" ")[0] != name}
        self._pods = {pod.name for pod in now.pods}
        for name, text in lines(now):
            if self._shown.get(name) != text:
                self._shown[name] = text
                self.say(f"{name}: {text}")

    def say(self, text: str) -> None:
        self.plain(f"{self._clock} {text}")

    def plain(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


class LiveView:
    """A table that is drawn again and again below what was said."""

    def __init__(self, console: Console, clock: Clock, title: str, url: str) -> None:
        self._clock = clock
        self._title = title
        self._url = url
        self._before: Progress | None = None
        self._rate = 0.0
        self._live = Live(console=console, refresh_per_second=4, transient=False)
        self._live.start()

    def show(self, now: Progress) -> None:
        if self._before is not None:
            self._rate = tokens_per_s(self._before, now)
        self._before = now
        self._live.update(self._render(now))

    def say(self, text: str) -> None:
        self.plain(f"{self._clock} {text}")

    def plain(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._live.stop()

    def _render(self, now: Progress) -> RenderableType:
        head = Text.assemble(
            (self._title, "bold"),
            f"  {self._url}  ",
            (now.state or "Starting", _state_style(now)),
            f"  {self._clock}",
        )
        foot = Text(traffic(now.throughput, self._rate), style="dim")
        return Group(head, table(now, self._live.console.width), foot)


def tokens_per_s(before: Progress, now: Progress) -> float:
    """Generated tokens between two looks; counters start again with their process."""
    grown = now.throughput.generated_tokens - before.throughput.generated_tokens
    return max(0.0, grown) / (now.at_s - before.at_s)


def traffic(found: Throughput, rate: float) -> str:
    return (
        f"{found.running:.0f} requests running, {rate:.1f} tokens/s, {found.generated_tokens:.0f} generated, "
        f"{found.transferred_tokens:.0f} prompt tokens moved by KV transfer "
        f"({found.transferred_bytes / MIB:.1f} MiB)"
    )


COLUMNS = ("POOL", "GROUP", "POD", "RANK", "ADDRESS", "PHASE", "RESTARTS")
NARROW_COLUMNS = ("POD", "RANK", "PHASE", "RESTARTS")  # a pod's name holds its pool and group
WIDE = 100  # characters; the seven columns take 90


def table(now: Progress, width: int) -> Table:
    """What every pod and rank does, in `width` characters."""
    shown = COLUMNS if width >= WIDE else NARROW_COLUMNS
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for name in shown:
        grid.add_column(
            name, justify="right" if name in ("RANK", "RESTARTS") else "left", no_wrap=name != "PHASE"
        )
    for pod in now.pods:
        for rank in pod.ranks or (None,):
            first = rank is None or rank is pod.ranks[0]
            row = dict(zip(COLUMNS, _row(pod, rank, first), strict=True))
            grid.add_row(*(row[name] for name in shown))
    return grid


def _row(pod: PodProgress, rank: RankProgress | None, first: bool) -> Iterator[str]:
    """One rank of a pod; what the ranks share is in the first row only."""
    yield (pod.pool or pod.component) if first else ""
    yield pod.group if first else ""
    yield pod.name if first else ""
    yield str(rank.rank) if rank else ""
    yield pod.address if first else ""
    yield _phase(pod, rank)
    yield str(pod.restarts) if first else ""


def _phase(pod: PodProgress, rank: RankProgress | None) -> str:
    if pod.trouble:
        return f"[red]{escape(pod.trouble)}[/]"
    if pod.ready:
        return "[green]ready[/]"
    part = pod if rank is None else rank
    stage = pod.stage if part.stage == "ready" else part.stage
    text = escape(f"{stage} {_share(part.done)} {part.detail}".strip())
    return f"[yellow]{text}[/]"


def _share(done: float | None) -> str:
    return "" if done is None else f"{done:.0%}"


def _state_style(now: Progress) -> str:
    return "green" if now.available else "red" if now.state in ("Degraded", "Refused") else "yellow"


def lines(now: Progress) -> Iterator[tuple[str, str]]:
    """(who, what) for everything worth a line when it changes; a share counts in steps of a quarter."""
    for pod in now.pods:
        yield pod.name, _line(pod)
        if not pod.ready:
            for rank in pod.ranks:
                if rank.stage not in ("starting", "ready"):
                    yield f"{pod.name} rank {rank.rank}", f"{rank.stage}{_quarter(rank.done)}"


def _line(pod: PodProgress) -> str:
    restarts = f" (restarts: {pod.restarts})" if pod.restarts else ""
    if pod.trouble:
        return f"{pod.trouble}{restarts}"
    return f"{pod.stage}{_quarter(pod.done)}{restarts}"


def _quarter(done: float | None) -> str:
    return "" if done is None else f" {int(done * 4) * 25}%"
