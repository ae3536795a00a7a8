"""The two legs, told by what reaches the engines; and every way in which a leg can fail."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Callable

import pytest

from broadbeam_crds.gateway_config import TimeoutsConfig
from broadbeam_router.fake_engine import FakeEngine, Script, Seen

COMPLETIONS = "/v1/completions"
QUICK = TimeoutsConfig(prefill_s=0.5, first_byte_s=0.5, idle_s=0.5)
PREFILL_PARAMS = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
TWO_PAIRS = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}


def once(script: Script) -> Callable[[Seen], Script]:
    """`script` for the first request, an ordinary answer for the others."""
    left = [script]
    return lambda seen: left.pop() if left else Script()


def both(rig, names: tuple[str, ...], script: Callable[[], Callable[[Seen], Script]]) -> None:
    """Give several engines one script together: whichever is asked first plays it."""
    shared = script()
    for name in names:
        rig[name].script = shared


def seen_by(rig, *names: str) -> list[Seen]:
    return [seen for name in names for seen in rig[name].seen]


async def test_the_legs_are_vllms_two_steps(rig_of) -> None:
    rig = await rig_of({"p": "prefill", "d": "decode"})
    answer = await rig.chat(
        {"X-Request-Id": "abc-1"},
        max_tokens=7,
        max_completion_tokens=8,
        min_tokens=3,
        temperature=0.25,
        stop=["x"],
        custom={"a": [1, 2]},
    )
    assert answer.status == 200
    prefill, decode = rig["p"].seen[0], rig["d"].seen[0]
    assert prefill.json == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 1,
        "max_completion_tokens": 1,
        "stream": False,
        "temperature": 0.25,
        "stop": ["x"],
        "custom": {"a": [1, 2]},
        "kv_transfer_params": PREFILL_PARAMS,
    }
    sent = json.loads(decode.body)
    assert sent.pop("kv_transfer_params") == {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": "p",
        "remote_block_ids": [[1, 2, 3]],
        "remote_host": "10.0.0.1",
        "remote_port": 5600,
    }
    assert sent["max_tokens"] == 7
    assert sent["min_tokens"] == 3
    assert sent["custom"] == {"a": [1, 2]}
    assert prefill.headers["x-request-id"] == decode.headers["x-request-id"] == "abc-1"
    assert answer.headers["x-request-id"] == "abc-1"
    assert answer.headers["x-broadbeam-route"] == "disaggregated"
    assert (answer.headers["x-broadbeam-prefill"], answer.headers["x-broadbeam-decode"]) == ("p", "d")


@pytest.mark.parametrize(
    "fields",
    [
        b"",
        b',"stream":false',
        b',"stream":null',
        b',"stream":true',
        b',"n":1,"best_of":null',
        b',"max_tokens":null',
        b',"max_tokens":9',
        b',"max_completion_tokens":9',
        b',"max_completion_tokens":null',
        b',"min_tokens":0',
        b',"stream_options":null',
        b',"kv_transfer_params":{"remote_host":"evil"}',
    ],
)
@pytest.mark.parametrize("end", [b"}", b" }\n"], ids=["}", "blanks"])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        pytest.param("/v1/chat/completions", b'"messages":[{"role":"user","content":"}"}]', id="chat"),
        pytest.param(COMPLETIONS, b'"prompt":"}"', id="completions"),
    ],
)
async def test_the_prefill_leg_makes_one_token_and_names_nothing_twice(
    rig_of, path, asked, fields, end
) -> None:
    rig = await rig_of({"p": "prefill", "d": "decode"})
    body = b'{"model":"m",%b%b%b' % (asked, fields, end)
    assert (await rig.post(path, body)).status == 200
    members: list[tuple[str, object]] = json.loads(rig["p"].seen[0].body, object_pairs_hook=list)
    assert len(members) == len(dict(members))
    prefill = dict(members)
    assert prefill["max_tokens"] == 1
    assert not prefill.get("stream")
    assert prefill.get("max_completion_tokens", 1) == 1
    assert not prefill.keys() & {"min_tokens", "stream_options"}
    assert dict(prefill["kv_transfer_params"]) == PREFILL_PARAMS


async def test_streaming_keeps_its_options_for_the_decode_leg_only(rig_of) -> None:
    rig = await rig_of({"p": "prefill", "d": "decode"})
    answer = await rig.chat(stream=True, stream_options={"include_usage": True})
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert "stream_options" not in rig["p"].seen[0].json
    assert rig["p"].seen[0].json["stream"] is False
    assert rig["d"].seen[0].json["stream_options"] == {"include_usage": True}


async def test_the_prefill_answer_goes_on_byte_for_byte(rig_of) -> None:
    rig = await rig_of({"p": "prefill", "d": "decode"})
    params = b'{"z": 1e2,  "a":[ 1.50 ],"first_token":{"token_id":3,"logprob":-0.1}}'
    rig["p"].script = lambda seen: Script(body=b'{"choices":[],"kv_transfer_params": ' + params + b"}")
    assert (await rig.completion()).status == 200
    assert b'"kv_transfer_params":' + params + b"}" in rig["d"].seen[0].body


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"n": 2}, id="n"),
        pytest.param({"best_of": 2}, id="best_of"),
        pytest.param({"prompt": ["a", "b"]}, id="several prompts"),
        pytest.param({"prompt": [[1], [2]]}, id="several token prompts"),
        pytest.param({"echo": True}, id="echo"),
        pytest.param({"prompt_logprobs": 0}, id="prompt logprobs"),
    ],
)
async def test_what_one_rank_must_do_alone_is_not_split(rig_of, fields) -> None:
    rig = await rig_of({"p": "prefill", "d": "decode"})
    answer = await rig.completion(**fields)
    assert answer.headers["x-broadbeam-route"] == "decode-only"
    assert not rig["p"].seen


async def test_one_token_prompt_is_split(rig_of) -> None:
    rig = await rig_of({"p": "prefill", "d": "decode"})
    assert (await rig.completion(prompt=[1, 2, 3])).headers["x-broadbeam-route"] == "disaggregated"


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(Script(cut="nothing"), id="dies before a byte"),
        pytest.param(Script(cut="half"), id="dies within its answer"),
        pytest.param(Script(status=500), id="answers 500"),
        pytest.param(Script(status=503), id="answers 503"),
        pytest.param(Script(status=429), id="has no room"),
        pytest.param(Script(delay_s=5), id="stays silent"),
        pytest.param(Script(raw=b"SSH-2.0-OpenSSH_9.6\r\n"), id="is no HTTP server"),
    ],
)
@pytest.mark.parametrize("leg", [("p0", "p1"), ("d0", "d1")], ids=["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_leg_that_fails_once_is_tried_on_another_endpoint(rig_of, failure, leg, stream) -> None:
    rig = await rig_of(TWO_PAIRS, timeouts=QUICK if failure.delay_s else TimeoutsConfig())
    both(rig, leg, lambda: once(failure))
    answer = await rig.chat(stream=stream)
    assert answer.status == 200
    assert answer.headers["x-broadbeam-route"] == "disaggregated"
    assert b"Hel" in answer.body
    assert len(seen_by(rig, *leg)) == 2
    assert all(len(rig[name].seen) == 1 for name in leg), "not the same endpoint twice"


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(Script(cut="half"), id="dies within its answer"),
        pytest.param(Script(status=500), id="answers 500"),
        pytest.param(Script(status=429), id="has no room"),
        pytest.param(Script(delay_s=5), id="stays silent"),
        pytest.param(Script(raw=b"SSH-2.0-OpenSSH_9.6\r\n"), id="is no HTTP server"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_failure_on_a_kept_connection_is_tried_on_another_endpoint(rig_of, failure, stream) -> None:
    timeouts = QUICK if failure.delay_s else TimeoutsConfig()
    rig = await rig_of({"d0": "decode", "d1": "decode"}, timeouts=timeouts, policy="round-robin")
    for _ in range(4):
        assert (await rig.chat()).status == 200
    assert (rig["d0"].accepted, rig["d1"].accepted) == (1, 1)
    both(rig, ("d0", "d1"), lambda: once(failure))
    answer = await rig.chat(stream=stream)
    assert answer.status == 200
    assert b"Hel" in answer.body
    assert (len(rig["d0"].seen), len(rig["d1"].seen)) == (3, 3)


async def test_a_refused_connection_is_tried_elsewhere_and_left_out(rig_of) -> None:
    rig = await rig_of(TWO_PAIRS)
    await rig["p0"].stop()
    await rig["d0"].stop()
    for _ in range(12):
        answer = await rig.chat()
        assert (answer.status, answer.headers["x-broadbeam-route"]) == (200, "disaggregated")
    assert await rig.metric("ejections_total", reason="connect") == 2
    assert await rig.metric("legs_total", leg="prefill", outcome="failed") <= 1
    assert await rig.metric("legs_total", leg="decode", outcome="failed") <= 1


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(lambda seen: Script(status=500), id="answering 500"),
        pytest.param(lambda seen: Script(cut="nothing"), id="dying"),
        pytest.param(lambda seen: Script(body=b"no json"), id="answering nonsense"),
        pytest.param(lambda seen: Script(body=b'{"choices":[]}'), id="without kv_transfer_params"),
        pytest.param(lambda seen: Script(body=b'{"kv_transfer_params":null}'), id="with null params"),
    ],
)
async def test_without_prefill_the_decode_engine_does_it_all(rig_of, script) -> None:
    rig = await rig_of(TWO_PAIRS)
    rig["p0"].script = rig["p1"].script = script
    answer = await rig.chat()
    assert answer.status == 200
    assert answer.headers["x-broadbeam-route"] == "fallback"
    assert "x-broadbeam-prefill" not in answer.headers
    assert "kv_transfer_params" not in seen_by(rig, "d0", "d1")[0].json
    assert await rig.metric("paths_total", path="fallback") == 1
    assert await rig.metric("legs_total", leg="prefill", outcome="fallback") == 1


async def test_all_prefill_engines_gone_means_decode_only(rig_of) -> None:
    rig = await rig_of(TWO_PAIRS)
    await rig["p0"].stop()
    await rig["p1"].stop()
    for _ in range(3):
        answer = await rig.chat(stream=True)
        assert (answer.status, answer.headers["x-broadbeam-route"]) == (200, "fallback")
    assert await rig.metric("legs_total", leg="prefill", outcome="failed") == 2, (
        "and they are then left alone"
    )


async def test_a_prefill_refusal_is_the_clients_answer(rig_of) -> None:
    rig = await rig_of(TWO_PAIRS)
    rig["p0"].script = rig["p1"].script = lambda seen: Script(status=400)
    answer = await rig.chat()
    assert answer.status == 400
    assert "says 400" in answer.error["message"]
    assert not seen_by(rig, "d0", "d1")
    assert await rig.metric("ejections_total") == 0


async def test_prefill_without_room_everywhere_is_told_to_the_client(rig_of) -> None:
    rig = await rig_of(TWO_PAIRS)
    rig["p0"].script = rig["p1"].script = lambda seen: Script(status=429, headers=b"Retry-After: 7\r\n")
    answer = await rig.chat()
    assert (answer.status, answer.headers["retry-after"]) == (429, "7")


async def test_a_failed_decode_reuses_the_blocks_once_and_then_prefills_again(rig_of) -> None:
    rig = await rig_of({"p": "prefill", "d0": "decode", "d1": "decode", "d2": "decode"})
    left = [Script(cut="nothing"), Script(status=500)]
    script = lambda seen: left.pop() if left else Script()  # noqa: E731
    for name in ("d0", "d1", "d2"):
        rig[name].script = script
    assert (await rig.chat()).status == 200
    assert len(rig["p"].seen) == 2
    assert [len(rig[name].seen) for name in ("d0", "d1", "d2")] == [1, 1, 1]


async def test_the_only_decode_engine_gets_fresh_blocks_when_the_first_are_gone(rig_of) -> None:
    rig = await rig_of({"p": "prefill", "d": "decode"})
    rig["d"].script = once(Script(status=500))
    answer = await rig.chat()
    assert (answer.status, answer.headers["x-broadbeam-route"]) == (200, "disaggregated")
    assert (len(rig["p"].seen), len(rig["d"].seen)) == (2, 2)


@pytest.mark.parametrize("decoders", [1, 2], ids=["one decode engine", "two"])
async def test_a_prefill_engine_gone_between_the_legs_costs_no_answer(rig_of, decoders) -> None:
    rig = await rig_of({"p": "prefill"} | {f"d{i}": "decode" for i in range(decoders)})

    def needs_blocks(seen: Seen) -> Script:
        if "kv_transfer_params" not in seen.json:
            return Script()
        rig["p"].script = lambda seen: Script(cut="nothing")
        return Script(status=500)

    for i in range(decoders):
        rig[f"d{i}"].script = needs_blocks
    answer = await rig.chat()
    assert (answer.status, answer.headers["x-broadbeam-route"]) == (200, "fallback")


async def test_a_dead_decode_engine_costs_neither_an_answer_nor_its_neighbours_standing(rig_of) -> None:
    rig = await rig_of({"p": "prefill", "dead": "decode", "alive": "decode"}, policy="round-robin")
    fresh: set[str] = set()

    def blocks_are_gone(seen: Seen) -> Script:
        """As when the dead engine had fetched them: only a second prefill leg's blocks are still there."""
        request = seen.headers["x-request-id"]
        again = request in fresh
        fresh.add(request)
        return Script() if again else Script(status=500)

    rig["dead"].script = lambda seen: Script(cut="nothing")
    rig["alive"].script = blocks_are_gone
    answers = await asyncio.gather(*(rig.chat() for _ in range(8)))
    assert {answer.status for answer in answers} == {200}
    assert rig.member("alive").ejected_until == 0


async def test_a_decode_refusal_is_the_clients_answer(rig_of) -> None:
    rig = await rig_of(TWO_PAIRS)
    rig["d0"].script = rig["d1"].script = lambda seen: Script(status=422)
    answer = await rig.chat()
    assert answer.status == 422
    assert len(seen_by(rig, "d0", "d1")) == 1


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        pytest.param(Script(status=500), 502, "engine_failed", id="500 everywhere"),
        pytest.param(Script(cut="nothing"), 502, "engine_failed", id="dying everywhere"),
        pytest.param(Script(cut="half"), 502, "engine_failed", id="dying within the answer everywhere"),
        pytest.param(Script(delay_s=5), 504, "engine_timeout", id="silent everywhere"),
        pytest.param(Script(status=429, headers=b"Retry-After: 3\r\n"), 429, None, id="full everywhere"),
    ],
)
async def test_decode_failing_everywhere_is_one_clear_error(rig_of, script, status, code) -> None:
    timeouts = QUICK if script.delay_s else TimeoutsConfig()
    rig = await rig_of({"d0": "decode", "d1": "decode"}, timeouts=timeouts)
    rig["d0"].script = rig["d1"].script = lambda seen: script
    answer = await rig.chat()
    assert answer.status == status
    if code is not None:
        assert answer.error["code"] == code
        assert "d0" in answer.error["message"]
        assert "127.0.0.1" not in answer.error["message"]
    assert len(seen_by(rig, "d0", "d1")) == 2


async def test_retries_are_limited(rig_of) -> None:
    rig = await rig_of({f"d{i}": "decode" for i in range(5)}, retries=1)
    for engine in rig.engines.values():
        engine.script = lambda seen: Script(status=500)
    assert (await rig.chat()).status == 502
    assert len(seen_by(rig, *rig.engines)) == 2


async def test_no_prefill_leg_for_an_engine_that_does_both(rig_of) -> None:
    rig = await rig_of({"b": "both"}, disaggregated=True)
    answer = await rig.chat()
    assert answer.headers["x-broadbeam-route"] == "decode-only"


async def test_pairs_of_one_revision_family_are_preferred(rig_of) -> None:
    rig = await rig_of(
        {"p1": "prefill", "p2": "prefill", "d1": "decode", "d2": "decode", "px": "prefill"},
        revisions={"p1": "1-aa", "d1": "1-bb", "p2": "2-cc", "d2": "2-dd", "px": "3-ee"},
    )
    for _ in range(12):
        headers = (await rig.chat()).headers
        assert headers["x-broadbeam-prefill"][1] == headers["x-broadbeam-decode"][1]
    assert not rig["px"].seen


async def test_a_kept_connection_that_went_stale_costs_nothing(rig_of) -> None:
    rig = await rig_of({"d": "decode"}, retries=0)
    rig["d"].script = lambda seen: Script(close=True)  # promises keep-alive, then closes
    for _ in range(20):
        assert (await rig.chat()).status == 200
    assert await rig.metric("ejections_total") == 0


async def test_connections_to_engines_are_kept(rig_of) -> None:
    rig = await rig_of({"p": "prefill", "d": "decode"})
    for stream in (False, True) * 5:
        await rig.chat(stream=stream)
    assert (rig["p"].accepted, rig["d"].accepted) == (1, 1)


async def test_two_answers_to_one_request_are_not_trusted(rig_of) -> None:
    rig = await rig_of({"d": "decode"})
    one = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    other = b"HTTP/1.1 500 X\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nno"
    rig["d"].script = lambda seen: Script(raw=one + other)
    for _ in range(2):
        answer = await rig.chat()
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        assert answer.body == b"{}"
    assert rig["d"].accepted == 2


async def test_an_interim_answer_is_passed_over(rig_of) -> None:
    rig = await rig_of({"d": "decode"})
    final = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    rig["d"].script = lambda seen: Script(raw=b"HTTP/1.1 103 Early Hints\r\n\r\n" + final)
    assert (await rig.chat()).body == b"{}"


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_answer_may_end_with_its_connection(rig_of, version, stream) -> None:
    rig = await rig_of({"d": "decode"})
    kind, body = (b"text/event-stream", b"data: [DONE]\n\n") if stream else (b"application/json", b"{}")
    raw = b"HTTP/%b 200 OK\r\nContent-Type: %b\r\n\r\n%b" % (version, kind, body)
    rig["d"].script = lambda seen: Script(raw=raw, close=True)
    for _ in range(2):
        answer = await rig.chat(stream=stream)
        assert (answer.status, answer.body) == (200, body)
        assert "truncated" not in answer.headers
    assert rig.member("d").strikes == 0


@pytest.mark.parametrize("framing", [b"Content-Length: 3", b"Transfer-Encoding: chunked"])
async def test_an_answer_that_says_its_length_must_come_whole(rig_of, framing) -> None:
    rig = await rig_of({"d": "decode"}, retries=0)
    raw = b"HTTP/1.1 200 OK\r\n%b\r\n\r\n2\r" % framing
    rig["d"].script = lambda seen: Script(raw=raw, close=True)
    assert (await rig.chat()).error["code"] == "engine_failed"


async def test_a_request_that_makes_an_engine_hang_up_is_not_repeated_for_ever(rig_of) -> None:
    rig = await rig_of({"d0": "decode", "d1": "decode"}, retries=1)
    poison = lambda seen: Script(cut="nothing") if b"poison" in seen.body else Script()  # noqa: E731
    for engine in rig.engines.values():
        engine.script = poison
    for _ in range(3):  # kept connections to both engines, as other clients leave them
        await asyncio.gather(*(rig.chat() for _ in range(8)))
    assert (await rig.chat(user="poison")).error["code"] == "engine_failed"
    asked = [seen for engine in rig.engines.values() for seen in engine.seen if b"poison" in seen.body]
    assert len(asked) == 3, "one on a kept connection, and one for each try"


async def test_the_gateways_own_want_of_descriptors_is_held_against_no_engine(rig_of) -> None:
    rig = await rig_of({"d": "decode"}, retries=0)
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    await reader.readuntil(b"ok\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    body = b'{"model":"m","prompt":"hi"}'
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # what is open stays so
    try:
        writer.write(b"POST %b HTTP/1.1\r\nHost: a\r\n" % COMPLETIONS.encode())
        writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        head = await reader.readuntil(b"\r\n\r\n")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert head.startswith(b"HTTP/1.1 429 ")
    assert rig.member("d").strikes == 0
    writer.close()


async def test_an_engine_that_recovers_is_used_again(rig_of) -> None:
    rig = await rig_of({"d0": "decode", "d1": "decode"}, ejection_s=0.2)
    port = rig["d0"].port
    await rig["d0"].stop()
    for _ in range(4):
        assert (await rig.chat()).status == 200
    rig.engines["d0"] = await FakeEngine("d0", port=port).start()
    for _ in range(200):
        await rig.chat()
        await asyncio.sleep(0.01)
        if rig["d0"].seen:
            break
    assert rig["d0"].seen
    assert rig.member("d0").strikes == 0


async def test_one_broken_engine_alone_is_still_asked(rig_of) -> None:
    rig = await rig_of({"d": "decode"}, ejection_s=60.0, retries=0)
    rig["d"].script = once(Script(cut="nothing"))
    assert (await rig.chat()).status == 502
    assert (await rig.chat()).status == 200, "an outage of one moment must not last a minute"
