"""Carrying a call to engines and its answer back: the legs, their retries and the streaming.

A call runs the decode leg alone, or first the prefill leg and then the decode leg with what the prefill rank
said about its KV blocks. Each leg is tried on up to 1 + retries endpoints, as long as the client has seen
nothing of the answer:

- prefill fails everywhere: decode computes the prompt itself (way "fallback");
- decode fails: the lease on the blocks still holds, so another decode endpoint gets the same params, once;
  after that the blocks may be gone, and the prefill leg runs again.
"""

from __future__ import annotations

import logging
import time

import msgspec

from broadbeam_crds.gateway_config import TimeoutsConfig
from broadbeam_router import legs
from broadbeam_router.call import Call
from broadbeam_router.errors import EngineFailed, EngineTimeout, NoEndpoint, StreamBroken
from broadbeam_router.events import EventRelay
from broadbeam_router.fleet import Fleet, Leg, Member
from broadbeam_router.metrics import Metrics
from broadbeam_router.upstream import Answer, UpstreamConnection, UpstreamFailed

log = logging.getLogger(__name__)

BUSY = (408, 429)  # another endpoint may have room
HEAD = b"POST %b HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b%b\r\n"
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
    tried: list[Member] = []  # not to be picked again
    excused: list[Member] = []  # of these, the ones that may only have found the blocks gone
    forgiven: list[Member] = []  # were tried and may be again
    error: UpstreamFailed | None = None
    answer: Answer | None = None  # the last one that another endpoint might not have given

    def begin(self, member: Member) -> None:
        self.left -= 1
        self.tried.append(member)

    def take_back(self) -> None:
        """The last one begun does not count."""
        self.left += 1
        self.tried.pop()

    def forgive(self) -> bool:
        """Excused engines are alive, and may use fresh blocks or none. False if there are none of them."""
        self.tried = [member for member in self.tried if member not in self.excused]
        self.forgiven += self.excused
        anew = bool(self.excused)
        self.excused.clear()
        return anew

    def names(self) -> str:
        return ", ".join(member.name for member in (*self.forgiven, *self.tried))


class Forwarder:
    def __init__(
        self, fleet: Fleet, metrics: Metrics, timeouts: TimeoutsConfig, retries: int, route_headers: bool
    ) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._timeouts = timeouts
        self._retries = retries
        self._route_headers = route_headers

    async def answer(self, call: Call) -> None:
        """Answer `call`'s client; raises RequestError when no engine could."""
        blocks: Blocks | None = None
        attempts = Attempts(1 + self._retries)
        while attempts.left > 0:
            if call.wants_prefill and (blocks is None or blocks.gone):
                result = await self._prefill(call)
                if isinstance(result, Answer):
                    self._respond(call, result)
                    return
                blocks = result
            member = self._fleet.pick_decode(attempts.tried, blocks.family if blocks is not None else None)
            if member is None:
                if not attempts.forgive():
                    break
                if blocks is not None and blocks.uses:
                    blocks = None
            elif await self._decode(call, member, blocks, attempts):
                return
        self._give_up(call, attempts)

    # -- the prefill leg ------------------------------------------------------------------------------

    async def _prefill(self, call: Call) -> Blocks | Answer | None:
        """Blocks, the engine's refusal, or None when the decode leg must do without."""
        body = legs.prefill_body(call.body)
        attempts = Attempts(1 + self._retries)
        while attempts.left > 0 and (member := self._fleet.pick_prefill(attempts.tried)) is not None:
            answer = await self._prefill_on(call, member, body, attempts)
            if answer is None:
                continue
            if answer.status != 200:
                return answer
            params = _params(answer, member)
            if params is None:
                break
            call.way, call.prefill_name = "disaggregated", member.name
            return Blocks(params, member.family)
        if attempts.answer is not None and attempts.answer.status in BUSY:
            return attempts.answer
        self._metrics.legs["prefill", "fallback"] += 1
        log.warning("request %s: no prefill, the decode engine computes the prompt", call.request_id)
        call.way, call.prefill_name, call.wants_prefill = "fallback", None, False
        return None

    async def _prefill_on(self, call: Call, member: Member, body: bytes, attempts: Attempts) -> Answer | None:
        """The leg on one endpoint; None if another should be tried."""
        attempts.begin(member)
        connection: UpstreamConnection | None = None
        member.in_flight += 1
        member.prefill_in_flight += 1
        try:
            connection = member.pool.take() or await member.pool.connect(self._timeouts.connect_s)
            head = _head(call, member, body)
            await connection.send(head, body, self._timeouts.prefill_s, self._timeouts.idle_s)
            answer = connection.answer
        except UpstreamFailed as error:
            self._failed(call, member, "prefill", error, attempts)
            return None
        finally:
            member.in_flight -= 1
            member.prefill_in_flight -= 1
            if connection is not None:
                connection.release()
        if answer.status >= 400 and not self._stands(call, member, "prefill", answer, attempts):
            if answer.status >= 500:
                self._fleet.answered_5xx(member)
            return None
        self._fleet.succeeded(member)
        self._metrics.legs["prefill", "ok" if answer.status < 400 else "refused"] += 1
        return answer

    # -- the decode leg -------------------------------------------------------------------------------

    async def _decode(self, call: Call, member: Member, blocks: Blocks | None, attempts: Attempts) -> bool:
        """Whether the client has its answer; False if another endpoint should be tried."""
        attempts.begin(member)
        call.decode_name = member.name
        body = call.body if blocks is None else legs.decode_body(call.body, blocks.params)
        connection: UpstreamConnection | None = None
        member.in_flight += 1
        try:
            connection = member.pool.take() or await member.pool.connect(self._timeouts.connect_s)
            head = _head(call, member, body)
            await connection.send(head, body, self._timeouts.first_byte_s, self._timeouts.idle_s)
            answer = connection.answer
            if answer.streaming:
                return await self._stream(call, member, connection, attempts)
        except UpstreamFailed as error:
            self._failed(call, member, "decode", error, attempts)
            if blocks is not None and not error.stale:
                blocks.uses += 1
            return False
        finally:
            member.in_flight -= 1
            if connection is not None:  # cut if it is not done: the client left, and the engine may stop
                connection.release()
        status = answer.status
        if status >= 400 and not self._stands(call, member, "decode", answer, attempts):
            if status >= 500 and (blocks is None or not blocks.uses):  # a second taker may find them gone
                self._fleet.answered_5xx(member)
            if blocks is not None:
                attempts.excused.append(member)
                blocks.uses += 1
            return False
        self._fleet.succeeded(member)
        self._metrics.legs["decode", "ok" if status < 400 else "refused"] += 1
        self._respond(call, answer)
        return True

    async def _stream(
        self, call: Call, member: Member, connection: UpstreamConnection, attempts: Attempts
    ) -> bool:
        """As `_decode`: a stream that breaks before its first whole event can be begun anew elsewhere."""
        client = call.client
        call.status = 200
        call.first_byte_s = time.perf_counter()
        client.start_stream(200, connection.answer.content_type, self._headers(call), connection)
        relay = EventRelay(client)
        try:
            await connection.relay(relay)
        except UpstreamFailed as error:
            if client.take_back_stream():
                call.first_byte_s = None
                raise
            self._failed(call, member, "decode", error, attempts)
            self._metrics.broken_streams += 1
            raise StreamBroken(f"the stream of engine {member.name} ended early ({error})") from error
        self._fleet.succeeded(member)
        self._metrics.legs["decode", "ok"] += 1
        relay.finish()
        return True

    # -- both -----------------------------------------------------------------------------------------

    def _failed(
        self, call: Call, member: Member, leg: Leg, error: UpstreamFailed, attempts: Attempts
    ) -> None:
        if error.stale:
            member.pool.cut_idle()  # as old as the one that was found closed
            attempts.take_back()
            return
        attempts.error, attempts.answer = error, None
        self._fleet.failed(member, error.kind)
        self._metrics.legs[leg, "failed"] += 1
        log.warning("request %s: %s leg on %s: %s", call.request_id, leg, member.name, error)

    def _stands(self, call: Call, member: Member, leg: Leg, answer: Answer, attempts: Attempts) -> bool:
        """Whether an error answer stands; False if another endpoint may do better."""
        if answer.status < 500 and answer.status not in BUSY:
            return True
        attempts.answer, attempts.error = answer, None
        self._metrics.legs[leg, "failed"] += 1
        log.warning("request %s: %s leg on %s: status %d", call.request_id, leg, member.name, answer.status)
        return False

    def _give_up(self, call: Call, attempts: Attempts) -> None:
        answer, error = attempts.answer, attempts.error
        if answer is not None and answer.status in BUSY:
            self._respond(call, answer)
            return
        names = attempts.names()
        if answer is not None:
            raise EngineFailed(f"no engine could answer (tried {names}; the last said {answer.status})")
        if error is not None:
            kind = EngineTimeout if error.kind == "timeout" else EngineFailed
            raise kind(f"no engine could answer (tried {names}; the last: {error})")
        raise NoEndpoint("no decode engine is ready")

    def _respond(self, call: Call, answer: Answer) -> None:
        headers = self._headers(call) if self._route_headers else call.id_line
        if answer.retry_after is not None:
            headers += b"Retry-After: %b\r\n" % answer.retry_after
        call.status = answer.status
        call.client.respond(answer.status, answer.body, answer.content_type, headers)

    def _headers(self, call: Call) -> bytes:
        if not self._route_headers:
            return call.id_line
        lines = call.id_line + b"x-broadbeam-route: %b\r\n" % call.way.encode()
        if call.prefill_name is not None:
            lines += b"x-broadbeam-prefill: %b\r\n" % call.prefill_name.encode()
        if call.decode_name is not None:
            lines += b"x-broadbeam-decode: %b\r\n" % call.decode_name.encode()
        return lines


def _head(call: Call, member: Member, body: bytes) -> bytes:
    return HEAD % (call.path, member.host_header, len(body), call.id_line, call.trace_lines)


def _params(answer: Answer, member: Member) -> bytes | None:
    try:
        params = legs.transfer_params(answer.body)
    except msgspec.MsgspecError as error:
        log.warning("prefill answer of %s is not understood: %s", member.name, error)
        return None
    if params is None:
        log.warning("prefill answer of %s has no kv_transfer_params", member.name)
    return params
