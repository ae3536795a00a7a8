"""What a prefill rank has promised: which requests' blocks it keeps, for whom, and until when. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

REMEMBERED = 4096  # ended leases that a late heartbeat of the same reader may still name


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """One attempt of one decode rank to read one request's blocks; `reader` is unique to the attempt."""

    request_id: str
    reader: str


@dataclass(slots=True)
class Lease:
    block_ids: tuple[int, ...]
    expires_s: float
    reader: str | None = None


class Leases:
    """Leases by request id. The first reader that asks owns the lease: were there two, the first one's end
    would free the blocks under the second. Every lease ends exactly once: pulled, released or expired."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._held: dict[str, Lease] = {}
        self._pulled: OrderedDict[Ticket, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def being_read(self) -> bool:
        return any(lease.reader is not None for lease in self._held.values())

    def hold(self, request_id: str, block_ids: Sequence[int], now: float) -> None:
        assert request_id not in self._held, f"{request_id} is held already"
        self._held[request_id] = Lease(tuple(block_ids), now + self._lease_s)

    def blocks(self, ticket: Ticket) -> tuple[int, ...] | None:
        """The blocks under the lease that this reader owns from now on; None when it cannot."""
        lease = self._owned(ticket)
        return lease.block_ids if lease else None

    def _owned(self, ticket: Ticket) -> Lease | None:
        lease = self._held.get(ticket.request_id)
        if lease is None or lease.reader not in (None, ticket.reader):
            return None
        lease.reader = ticket.reader
        return lease

    def renew(self, tickets: Iterable[Ticket], now: float) -> list[Ticket]:
        """Extend the leases; the tickets that are worth nothing any more (not those just pulled)."""
        gone: list[Ticket] = []
        for ticket in tickets:
            if (lease := self._owned(ticket)) is not None:
                lease.expires_s = now + self._lease_s
            elif ticket not in self._pulled:
                gone.append(ticket)
        return gone

    def pulled(self, ticket: Ticket) -> bool:
        """The reader has all blocks; False if the lease had ended before, or is another's."""
        if self._owned(ticket) is None:
            return False
        del self._held[ticket.request_id]
        self._pulled[ticket] = None
        while len(self._pulled) > REMEMBERED:
            self._pulled.popitem(last=False)
        return True

    def released(self, ticket: Ticket) -> bool:
        """The reader gave up; False if the lease had ended before, or is another's."""
        return self._owned(ticket) is not None and self.revoke(ticket.request_id)

    def revoke(self, request_id: str) -> bool:
        """The prefill rank itself takes the promise back; False if it had ended before."""
        return self._held.pop(request_id, None) is not None

    def expire(self, now: float) -> list[str]:
        """End and name the leases that nobody renewed in time."""
        late = [request_id for request_id, lease in self._held.items() if lease.expires_s <= now]
        for request_id in late:
            del self._held[request_id]
        return late

    def next_expiry(self) -> float | None:
        return min((lease.expires_s for lease in self._held.values()), default=None)
