"""What a call has tried: endpoints, and the KV blocks that a prefill rank holds for it."""

from __future__ import annotations

import msgspec

from broadbeam_router.errors import EngineFailed, EngineTimeout, NoEndpoint, RequestError
from broadbeam_router.fleet import Member
from broadbeam_router.upstream import Answer, UpstreamConnection, UpstreamFailed

BUSY = (408, 429)  # another endpoint may have room
MAX_PARAMS_USES = 2  # decode endpoints that get the same kv_transfer_params


class Blocks(msgspec.Struct, eq=False):
    """KV blocks that a prefill rank holds for a call."""

    params: bytes
    family: str
    uses: int = 0  # by decode endpoints that failed

    @property
    def gone(self) -> bool:
        """Whether they must be taken as gone."""
        return self.uses >= MAX_PARAMS_USES


class Attempts(msgspec.Struct, eq=False):
    """What one leg has tried so far."""

    left: int
    fresh: bool = False  # a kept connection was found closed: no more of those
    tried: list[Member] = []  # not to be picked again
    excused: list[Member] = []  # of these, the ones that may only have found the blocks gone
    forgiven: list[Member] = []  # were tried and may be again
    error: UpstreamFailed | None = None
    answer: Answer | None = None  # the last one that another endpoint might not have given

    def begin(self, member: Member) -> None:
        self.left -= 1
        self.tried.append(member)

    def take_back(self) -> None:
        """The last one begun does not count: its connection had been kept too long."""
        self.fresh = True
        self.left += 1
        self.tried.pop()

    def kept(self, member: Member) -> UpstreamConnection | None:
        return None if self.fresh else member.pool.take()

    def forgive(self) -> bool:
        """Excused engines are alive, and may use fresh blocks or none. False if there are none of them."""
        self.tried = [member for member in self.tried if member not in self.excused]
        self.forgiven += self.excused
        anew = bool(self.excused)
        self.excused.clear()
        return anew

    @property
    def busy(self) -> Answer | None:
        """The last answer, if it said that there is no room now: that is the client's answer too."""
        return self.answer if self.answer is not None and self.answer.status in BUSY else None

    def failure(self) -> RequestError:
        """Why there is no answer."""
        names = ", ".join(member.name for member in (*self.forgiven, *self.tried))
        if self.answer is not None:
            last = f"the last said {self.answer.status}"
            return EngineFailed(f"no engine could answer (tried {names}; {last})")
        if self.error is not None:
            kind = EngineTimeout if self.error.kind == "timeout" else EngineFailed
            return kind(f"no engine could answer (tried {names}; the last: {self.error})")
        return NoEndpoint("no decode engine is ready")
