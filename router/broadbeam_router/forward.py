"""Carrying a call to engines and its answer back: the legs, their retries and the streaming.

A call runs the decode leg alone, or first the prefill leg and then the decode leg with what the prefill rank
said about its KV blocks. Each leg is tried on up to 1 + retries endpoints, as long as the client has seen
nothing of the answer:

- prefill fails everywhere: decode computes the prompt itself (way "fallback");
- decode fails: the lease on the blocks still holds, so another decode endpoint gets the same params, once;
  after that the blocks may be gone, and the prefill leg runs again.
"""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec

from broadbeam_crds.gateway_config import TimeoutsConfig
from broadbeam_router import legs
from broadbeam_router.attempts import BUSY, Attempts, Blocks
from broadbeam_router.call import Call
from broadbeam_router.errors import StreamBroken
from broadbeam_router.events import EventRelay
from broadbeam_router.fleet import Fleet, Leg, Member
from broadbeam_router.metrics import Metrics
from broadbeam_router.running import Ended, Run, Signal
from broadbeam_router.upstream import Answer, UpstreamConnection, UpstreamFailed

log = logging.getLogger(__name__)

HEAD = b"POST %b HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b%b\r\n"
Begun = tuple[UpstreamConnection, Signal]  # an exchange


class Forwarder:
    def __init__(
        self, fleet: Fleet, metrics: Metrics, timeouts: TimeoutsConfig, retries: int, route_headers: bool
    ) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self.timeouts = timeouts
        self._retries = retries
        self._route_headers = route_headers

    def carry(self, call: Call, ended: Ended) -> Run | Direct:
        """What answers `call`'s client, to be started."""
        member = None if call.wants_prefill else self._fleet.pick_decode([])
        connection = member.pool.take() if member is not None else None
        if member is None or connection is None:
            return Run(self.answer(call, member), ended)
        return Direct(self, call, ended, member, connection)

    async def answer(self, call: Call, member: Member | None = None, begun: Begun | None = None) -> None:
        """Answer `call`'s client; `member` has been picked already and `begun` is an exchange with it.

        Raises RequestError when no engine could."""
        blocks: Blocks | None = None
        attempts = Attempts(1 + self._retries)
        while attempts.left > 0:
            if call.wants_prefill and (blocks is None or blocks.gone):
                result = await self._prefill(call)
                if isinstance(result, Answer):
                    self._respond(call, result)
                    return
                blocks = result
            if member is None:
                family = blocks.family if blocks is not None else None
                member = self._fleet.pick_decode(attempts.tried, family)
            if member is None:
                if not attempts.forgive():
                    break
                if blocks is not None and blocks.uses:
                    blocks = None
            elif await self._decode(call, member, blocks, attempts, begun):
                return
            member = begun = None
        if attempts.busy is None:
            raise attempts.failure()
        self._respond(call, attempts.busy)

    # -- the prefill leg ------------------------------------------------------------------------------

    async def _prefill(self, call: Call) -> Blocks | Answer | None:
        """Blocks, the engine's refusal, or None when the decode leg must do without."""
        body = legs.prefill_body(call.body, call.bare)
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
        if attempts.busy is not None:
            return attempts.busy
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
            connection = attempts.kept(member) or await member.pool.connect(self.timeouts.connect_s)
            await self.ask(call, member, connection, body, self.timeouts.prefill_s)
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

    async def _decode(
        self, call: Call, member: Member, blocks: Blocks | None, attempts: Attempts, begun: Begun | None
    ) -> bool:
        """Whether the client has its answer; False if another endpoint should be tried."""
        attempts.begin(member)
        call.decode_name = member.name
        connection: UpstreamConnection | None = None
        member.in_flight += 1
        try:
            if begun is not None:
                connection, signal = begun
            else:
                connection = attempts.kept(member) or await member.pool.connect(self.timeouts.connect_s)
                body = call.body if blocks is None else legs.decode_body(call.body, blocks.params)
                signal = self.ask(call, member, connection, body, self.timeouts.first_byte_s)
            await signal
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
        self.succeed(call, member, answer)
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

    def ask(
        self, call: Call, member: Member, connection: UpstreamConnection, body: bytes, first_byte_s: float
    ) -> Signal:
        head = HEAD % (call.path, member.host_header, len(body), call.id_line, call.trace_lines)
        return connection.send(head, body, first_byte_s, self.timeouts.idle_s)

    def succeed(self, call: Call, member: Member, answer: Answer) -> None:
        """A decode endpoint's whole answer is the client's."""
        self._fleet.succeeded(member)
        self._metrics.legs["decode", "ok" if answer.status < 400 else "refused"] += 1
        self._respond(call, answer)

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

    def _respond(self, call: Call, answer: Answer) -> None:
        headers = self._headers(call)
        if answer.retry_after is not None:
            headers += b"Retry-After: %b\r\n" % answer.retry_after
        call.status = answer.status
        call.client.respond(answer.status, answer.body, answer.content_type, headers)

    def _headers(self, call: Call) -> bytes:
        return call.route_lines() if self._route_headers else call.id_line


class Direct(msgspec.Struct, eq=False):
    """The first attempt of a call with one leg, on a kept connection: nearly every call, and so by callback,
    where a coroutine costs a tenth more. All but a good whole answer goes on in one."""

    forwarder: Forwarder
    call: Call
    ended: Ended
    member: Member
    connection: UpstreamConnection
    signal: Signal | None = None
    rest: Run | None = None  # of the call, once it goes on in a coroutine

    def start(self) -> None:
        call, member, forwarder = self.call, self.member, self.forwarder
        call.decode_name = member.name
        member.in_flight += 1
        first_byte_s = forwarder.timeouts.first_byte_s
        signal = self.signal = forwarder.ask(call, member, self.connection, call.body, first_byte_s)
        if signal.is_set:
            self._go_on()
        else:
            signal.resume = self._go_on

    def cancel(self) -> None:
        """Tell `ended` of it; nothing if that has been told already."""
        if self.rest is not None:
            self.rest.cancel()
        elif self.signal is not None and not self.signal.is_set:
            self.signal.resume = None
            self.member.in_flight -= 1
            self.connection.release()
            self.ended(asyncio.CancelledError())

    def _go_on(self) -> None:
        """The answer has come or has begun, or the attempt has failed."""
        member, signal, answer = self.member, self.signal, self.connection.answer
        assert signal is not None
        member.in_flight -= 1
        if signal.error is not None or answer.streaming or answer.status >= 400:
            self.rest = Run(self.forwarder.answer(self.call, member, (self.connection, signal)), self.ended)
            self.rest.start()
            return
        self.connection.release()
        try:
            self.forwarder.succeed(self.call, member, answer)
        except Exception as error:  # the outermost frame of a request
            self.ended(error)
        else:
            self.ended(None)


def _params(answer: Answer, member: Member) -> bytes | None:
    try:
        params = legs.transfer_params(answer.body)
    except msgspec.MsgspecError as error:
        log.warning("prefill answer of %s is not understood: %s", member.name, error)
        return None
    if params is None:
        log.warning("prefill answer of %s has no kv_transfer_params", member.name)
    return params
