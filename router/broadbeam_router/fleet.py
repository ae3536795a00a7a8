"""The live endpoints: who is ready, how much each has in flight, who failed lately and is left out.

An endpoint's counters belong to its address and outlive changes of the set: nothing resets them, they only
go down when the request that raised them ends.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from operator import attrgetter
from typing import Literal

from broadbeam_crds.gateway_config import Endpoint
from broadbeam_router.deadlines import Deadlines
from broadbeam_router.policy import Policy
from broadbeam_router.upstream import Failure, Pool

log = logging.getLogger(__name__)

Leg = Literal["prefill", "decode"]
Address = tuple[str, str, int]  # name, host, port: a replaced pod keeps its name
MAX_EJECTION_S = 60.0
# An engine that answers 5xx is alive, and one poisonous request must not empty the set.
SERVER_ERRORS_TO_EJECT = 3
_in_flight = attrgetter("in_flight")


class Member:
    """One endpoint and its moving state."""

    __slots__ = (
        "ejected_until", "endpoint", "family", "host_header", "in_flight", "name", "pool",
        "prefill_in_flight", "server_errors", "strikes",
    )  # fmt: skip

    def __init__(self, endpoint: Endpoint, pool: Pool) -> None:
        self.endpoint = endpoint
        self.pool = pool
        self.family = revision_family(endpoint.revision)
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        self.host_header = f"{host}:{endpoint.port}".encode()
        self.name = endpoint.name
        self.in_flight = 0  # of both legs; each leg that adds one takes it back in a `finally`
        self.prefill_in_flight = 0
        self.ejected_until = 0.0
        self.strikes = 0  # ejections since the last success
        self.server_errors = 0  # 5xx answers in a row

    @property
    def decode_in_flight(self) -> int:
        return self.in_flight - self.prefill_in_flight


def revision_family(revision: str) -> str:
    """What a prefill and a decode revision have in common when they were made for each other.

    A label FAMILY-HASH names its family; a label without a dash is a family of its own."""
    return revision.partition("-")[0]


class Fleet:
    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        deadlines: Deadlines,
        policy: Policy,
        ejection_s: float,
        on_ejection: Callable[[str], None] = lambda reason: None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._loop = loop
        self._deadlines = deadlines
        self._policy = policy
        self._ejection_s = ejection_s
        self._on_ejection = on_ejection
        self._chance = chance
        self._turns = {"prefill": count(), "decode": count()}
        self._members: dict[Address, Member] = {}
        self.prefill: tuple[Member, ...] = ()
        self.decode: tuple[Member, ...] = ()
        self._paired_prefill: Sequence[Member] = ()
        self._last_ejection_ends = 0.0

    def update(self, endpoints: Iterable[Endpoint]) -> None:
        """Take over a new set; only ready endpoints get requests."""
        before = set(self._ready())
        seen: set[Address] = set()
        for endpoint in endpoints:
            address = (endpoint.name, endpoint.host, endpoint.port)
            seen.add(address)
            member = self._members.get(address)
            if member is None:
                pool = Pool(self._loop, self._deadlines, endpoint.host, endpoint.port)
                self._members[address] = Member(endpoint, pool)
            else:
                self._change(member, endpoint)
        self._drop(self._members.keys() - seen)
        ready = [m for address, m in self._members.items() if address in seen and m.endpoint.ready]
        self.prefill = tuple(m for m in ready if m.endpoint.role == "prefill")
        self.decode = tuple(m for m in ready if m.endpoint.role != "prefill")
        self._paired_prefill = _paired(self.prefill, self.decode)
        after = set(self._ready())
        if before != after:
            log.info("endpoints ready: %d prefill, %d decode", len(self.prefill), len(self.decode))

    def _change(self, member: Member, endpoint: Endpoint) -> None:
        if endpoint.ready and not member.endpoint.ready:  # it has passed its probes since it failed
            member.ejected_until = 0.0
            member.strikes = member.server_errors = 0
        member.pool.open()
        member.endpoint = endpoint
        member.family = revision_family(endpoint.revision)

    def _drop(self, gone: set[Address]) -> None:
        for address in gone:
            member = self._members[address]
            member.pool.close()
            if member.in_flight == 0:
                del self._members[address]

    def _ready(self) -> Iterator[str]:
        return (m.name for m in (*self.prefill, *self.decode))

    def members(self) -> tuple[Member, ...]:
        return tuple(self._members.values())

    # -- picking --------------------------------------------------------------------------------------

    def pick_prefill(self, tried: list[Member]) -> Member | None:
        """A prefill endpoint for the first leg; None when none is ready, untried and in good standing.

        Where a decode endpoint of the same revision family is ready, that pairing is preferred."""
        able: Sequence[Member] = self._paired_prefill
        if tried or self._some_left_out():
            now = self._loop.time()
            able = _paired(
                [m for m in self.prefill if m.ejected_until <= now and m not in tried], self.decode
            )
        return self._pick("prefill", able)

    def pick_decode(self, tried: list[Member], family: str | None = None) -> Member | None:
        """A decode-capable endpoint not in `tried`, of `family` if there is one.

        When every one of them is left out for failing, they are tried all the same: an error from an
        engine that may be back tells more than a refusal."""
        able: Sequence[Member] = self.decode
        if tried:
            able = [m for m in able if m not in tried]
        if self._some_left_out():
            now = self._loop.time()
            able = [m for m in able if m.ejected_until <= now] or able
        if family is not None:
            able = [m for m in able if m.family == family] or able
        return self._pick("decode", able)

    def _some_left_out(self) -> bool:
        return self._last_ejection_ends > 0.0 and self._loop.time() < self._last_ejection_ends

    def _pick(self, leg: Leg, candidates: Sequence[Member]) -> Member | None:
        if not candidates:
            return None
        loads = [*map(_in_flight, candidates)]
        return candidates[self._policy(loads, next(self._turns[leg]), self._chance())]

    # -- learning -------------------------------------------------------------------------------------

    def succeeded(self, member: Member) -> None:
        if member.strikes or member.server_errors:
            member.strikes = member.server_errors = 0
            member.ejected_until = 0.0

    def failed(self, member: Member, kind: Failure) -> None:
        """The endpoint could not be reached, broke off or stayed silent: leave it out for a while."""
        self._eject(member, kind)

    def answered_5xx(self, member: Member) -> None:
        member.server_errors += 1
        if member.server_errors >= SERVER_ERRORS_TO_EJECT:
            member.server_errors = 0
            self._eject(member, "status")

    def _eject(self, member: Member, reason: str) -> None:
        now = self._loop.time()
        if member.ejected_until > now:
            return
        pause_s = min(self._ejection_s * 2**member.strikes, MAX_EJECTION_S)
        member.strikes += 1
        member.ejected_until = now + pause_s
        self._last_ejection_ends = max(self._last_ejection_ends, member.ejected_until)
        self._on_ejection(reason)
        log.warning("%s left out for %g s after: %s", member.name, pause_s, reason)

    def close(self) -> None:
        for member in self._members.values():
            member.pool.close()


def _paired(prefill: Sequence[Member], decode: Sequence[Member]) -> Sequence[Member]:
    """Those of `prefill` that have a decode endpoint of their revision family; all if none has."""
    families = {m.family for m in decode}
    return [m for m in prefill if m.family in families] or prefill
