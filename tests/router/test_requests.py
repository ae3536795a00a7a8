"""What the gateway checks before an engine sees a request, and what it leaves alone."""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broadbeam_crds.engine_config import ConfigError
from broadbeam_crds.gateway_config import AuthConfig, LimitsConfig
from broadbeam_router.auth import ApiKeys
from broadbeam_router.call import Call
from broadbeam_router.errors import SHAPES, InvalidRequest, RequestError, Unauthorized, error_body
from broadbeam_router.fake_engine import Script
from broadbeam_router.heads import Head
from broadbeam_router.legs import stripped
from broadbeam_router.openai import chat_fields, completion_fields

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@pytest.fixture
async def rig(rig_of):
    return await rig_of({"d": "decode"})


async def test_the_body_reaches_the_engine_byte_for_byte(rig) -> None:
    body = b' {"model" : "m",\n "messages":[{"role":"user","content":"\\u00e9 \xc3\xa9"}], "x": 1.0e0 } '
    assert (await rig.post(CHAT, body)).status == 200
    assert rig["d"].seen[0].body == body


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        pytest.param(CHAT, b"", None, "the body is empty, expected JSON", id="empty"),
        pytest.param(CHAT, b"{", None, "the body is not JSON: Input data was truncated", id="truncated"),
        pytest.param(
            CHAT,
            b"{'model': 1}",
            None,
            "the body is not JSON: JSON is malformed: object keys must be strings (byte 1)",
            id="python",
        ),
        pytest.param(
            CHAT,
            b"[]",
            None,
            "the body must be a JSON object: Expected `object`, got `array`",
            id="an array",
        ),
        pytest.param(
            CHAT,
            b'{"x":"\xff"}',
            None,
            "the body is not JSON: 'utf-8' codec can't decode byte 0xff in position 6: invalid start byte",
            id="no UTF-8",
        ),
        pytest.param(CHAT, b"{}", "model", "model is required", id="no model"),
        pytest.param(CHAT, b'{"model":"m"}', "messages", "messages is required", id="no messages"),
        pytest.param(COMPLETIONS, b'{"model":"m"}', "prompt", "prompt is required", id="no prompt"),
        pytest.param(CHAT, b'{"model":1,"messages":[{}]}', "model", "model must be str, got 1", id="model"),
        pytest.param(
            CHAT,
            b'{"model":"m","messages":[]}',
            "messages",
            "messages must be array of length >= 1, got []",
            id="empty messages",
        ),
        pytest.param(
            CHAT,
            b'{"model":"m","messages":"hi"}',
            "messages",
            'messages must be array, got "hi"',
            id="text as messages",
        ),
        pytest.param(
            CHAT,
            b'{"model":"m","messages":[{},"hi"]}',
            "messages",
            'messages[1] must be object, got [{},"hi"]',
            id="text as message",
        ),
        pytest.param(
            CHAT,
            b'{"model":"m","messages":[{}],"stream":"yes"}',
            "stream",
            'stream must be bool | null, got "yes"',
            id="stream",
        ),
        pytest.param(
            CHAT, b'{"model":"m","messages":[{}],"n":0}', "n", "n must be int >= 1, got 0", id="n = 0"
        ),
        pytest.param(
            CHAT, b'{"model":"m","messages":[{}],"n":129}', "n", "n must be int <= 128, got 129", id="n = 129"
        ),
        pytest.param(
            CHAT,
            b'{"model":"m","messages":[{}],"max_tokens":0}',
            "max_tokens",
            "max_tokens must be int >= 1, got 0",
            id="max_tokens",
        ),
        pytest.param(
            CHAT,
            b'{"model":"m","messages":[{}],"max_completion_tokens":1.5}',
            "max_completion_tokens",
            "max_completion_tokens must be int | null, got 1.5",
            id="max_completion_tokens",
        ),
        pytest.param(
            COMPLETIONS,
            b'{"model":"m","prompt":{"a":1}}',
            "prompt",
            'prompt must be a string, or a non-empty array of strings or of token ids, got {"a":1}',
            id="an object as prompt",
        ),
        pytest.param(
            COMPLETIONS,
            b'{"model":"m","prompt":[ ]}',
            "prompt",
            "prompt must be a string, or a non-empty array of strings or of token ids, got [ ]",
            id="empty prompt array",
        ),
        pytest.param(
            COMPLETIONS,
            b'{"model":"m","prompt":' + b"[" * 100_000,
            None,
            "the body is not JSON: maximum recursion depth exceeded while deserializing an object",
            id="nested too deep",
        ),
        pytest.param(
            CHAT,
            b'{"model":1,',
            None,
            "the body is not JSON: Input data was truncated",
            id="truncated after a wrong field",
        ),
        pytest.param(
            CHAT,
            b'{"model":"m","messages":[' + b"[" * 100_000,
            None,
            "the body is not JSON: maximum recursion depth exceeded while deserializing an object",
            id="nested too deep after a wrong field",
        ),
        pytest.param(
            CHAT,
            b"\xef\xbb\xbf{}",
            None,
            "the body is not JSON: JSON is malformed: invalid character (byte 0)",
            id="a byte order mark",
        ),
        pytest.param(
            CHAT,
            b'{"model":"m","messages":[{}],"temperature":NaN}',
            None,
            "the body is not JSON: JSON is malformed: invalid character (byte 43)",
            id="NaN",
        ),
        pytest.param(
            CHAT,
            b'{"model":"m","messages":[{}],"n":18446744073709551617}',
            "n",
            "n must be int <= 128, got 18446744073709551617",
            id="a big integer",
        ),
    ],
)
async def test_a_wrong_body_is_refused_by_field_value_and_limit(rig, path, body, param, message) -> None:
    answer = await rig.post(path, body)
    assert answer.status == 400
    assert answer.error == {
        "message": message,
        "type": "invalid_request_error",
        "param": param,
        "code": None,
    }
    assert not rig["d"].seen


@given(st.data())
def test_any_bytes_are_a_request_or_refused_as_one(data) -> None:
    good = b'{"model":"m","prompt":["a"],"messages":[{"a":[1.5e3]}],"n":1,"kv_transfer_params":{"b":null}}'
    start = data.draw(st.integers(0, len(good)))
    stop = data.draw(st.integers(start, len(good)))
    body = good[:start] + data.draw(
        st.binary(max_size=6) | st.text('{}[]",:0a\\', max_size=6).map(str.encode)
    )
    body += good[stop:]
    for fields_of in (chat_fields, completion_fields):
        try:
            if fields_of(body).steers:
                assert b"kv_transfer_params" not in stripped(body)
        except InvalidRequest as error:
            error_body(error)


async def test_a_long_wrong_value_is_shown_in_part(rig) -> None:
    answer = await rig.completion(stream="y" * 10_000)
    assert len(answer.error["message"]) < 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "roles", [{"d": "decode"}, {"p": "prefill", "d": "decode"}], ids=["one leg", "two legs"]
)
async def test_an_answered_request_holds_no_memory_until_the_collector_comes(rig_of, roles, stream) -> None:
    rig = await rig_of(roles)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            assert (await rig.chat(stream=stream)).status == 200
        await rig.settled()
        assert not [
            thing for thing in gc.get_objects() if type(thing) is Call
        ]  # isinstance would ask torch's objects, which warn
    finally:
        gc.enable()


async def test_null_means_absent(rig) -> None:
    assert (await rig.chat(stream=None, n=None, max_tokens=None)).status == 200


async def test_an_unknown_model_is_not_found(rig) -> None:
    answer = await rig.chat(model="gpt-5")
    assert answer.status == 404
    assert answer.error == {
        "message": "The model `gpt-5` does not exist.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


async def test_the_last_of_two_equal_fields_counts_as_for_the_engine(rig) -> None:
    answer = await rig.post(CHAT, b'{"model":"m","messages":[{}],"model":"other"}')
    assert answer.error["message"] == "The model `other` does not exist."


@pytest.mark.parametrize(
    "steering",
    [
        pytest.param(b'"kv_transfer_params":{"do_remote_prefill":true,"remote_host":"evil"}', id="params"),
        pytest.param(b'"kv\\u005ftransfer_params":{"remote_host":"evil"}', id="escaped"),
        pytest.param(b'"kv_transfer_params":null', id="null"),
        pytest.param(b'"bootstrap_host":"evil","bootstrap_port":1,"bootstrap_room":2', id="sglang"),
        pytest.param(b'"ec_transfer_params":{"peer_host":"evil"}', id="encoder"),
        pytest.param(b'"data_parallel_rank":3', id="rank"),
        pytest.param(b'"kv_transfer_params":{"a":1},"kv_transfer_params":{"a":"evil"}', id="twice"),
        pytest.param(
            b'"vllm_xargs":{"kv\\u005ftransfer_params":"evil","bootstrap_host":"evil"}', id="inside"
        ),
        pytest.param(b'"vllm_xargs":{"kv_transfer_params":"evil"},"vllm_xargs":{}', id="inside the first"),
    ],
)
@pytest.mark.parametrize(
    "roles", [{"d": "decode"}, {"p": "prefill", "d": "decode"}], ids=["one leg", "two legs"]
)
async def test_a_client_cannot_steer_the_transfer(rig_of, roles, steering) -> None:
    rig = await rig_of(roles)
    body = b'{"messages":[{"role":"user","content":"x"}],%b,"model":"m","keep":[1]}' % steering
    assert (await rig.post(CHAT, body)).status == 200
    for engine in rig.engines.values():
        fields = engine.seen[0].json
        assert b"evil" not in engine.seen[0].body
        assert fields.keys() <= {
            "messages",
            "model",
            "keep",
            "stream",
            "max_tokens",
            "n",
            "kv_transfer_params",
            "vllm_xargs",
        }
        assert fields["keep"] == [1]
        assert not fields.get("vllm_xargs")


@pytest.mark.parametrize("extra", [{"mine": 1}, [1], None, "x"], ids=str)
async def test_other_extra_arguments_reach_the_engine(rig, extra) -> None:
    assert (await rig.chat(vllm_xargs=extra)).status == 200
    assert rig["d"].seen[0].json["vllm_xargs"] == extra


async def test_engines_get_no_header_that_names_a_host_or_holds_a_key(rig) -> None:
    sent = {
        "Authorization": "Bearer secret",
        "Cookie": "a=b",
        "x-prefiller-host-port": "evil:80",
        "x-data-parallel-host-port": "evil:80",
        "x-gateway-destination-endpoint": "evil:80",
        "X-Forwarded-Host": "evil",
        "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "tracestate": "a=1",
        "X-Request-Id": "id-1",
    }
    assert (await rig.chat(sent)).status == 200
    assert rig["d"].seen[0].headers == {
        "host": f"127.0.0.1:{rig['d'].port}",
        "content-type": "application/json",
        "content-length": str(len(rig["d"].seen[0].body)),
        "x-request-id": "id-1",
        "traceparent": sent["traceparent"],
        "tracestate": "a=1",
    }


async def test_a_request_without_an_id_gets_one(rig) -> None:
    first, second = (await rig.chat()).headers["x-request-id"], (await rig.chat()).headers["x-request-id"]
    assert first != second
    assert [seen.headers["x-request-id"] for seen in rig["d"].seen] == [first, second]


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\xe9", 'a"b'])
async def test_a_request_id_that_could_not_stand_in_a_log_is_refused(rig, given) -> None:
    body = b'{"model":"m","messages":[{}]}'
    head = b"POST %b HTTP/1.1\r\nHost: a\r\nX-Request-Id: %b\r\nContent-Length: %d\r\n"
    head %= CHAT.encode(), given.encode("latin-1"), len(body)
    answer = await rig.raw(head + b"Connection: close\r\n\r\n" + body)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"param":"x-request-id"' in answer


async def test_errors_carry_the_request_id_too(rig) -> None:
    assert (await rig.chat({"X-Request-Id": "a-7"}, model="x")).headers["x-request-id"] == "a-7"
    rig["d"].script = lambda seen: Script(status=500)
    assert (await rig.chat({"X-Request-Id": "a-8"})).headers["x-request-id"] == "a-8"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "/metrics", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/chat/completions/", 404),
        ("GET", CHAT, 405),
        ("DELETE", COMPLETIONS, 405),
        ("POST", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/health", 200),
        ("GET", "/health?verbose=1", 200),
        ("HEAD", "/health", 200),
        ("GET", "/readyz", 200),
        ("GET", "/v1/models", 200),
    ],
)
async def test_routes(rig, method, path, status) -> None:
    async with rig.http.request(method, rig.url + path) as answer:
        assert answer.status == status
        if status >= 400:
            assert (await answer.json())["error"]["type"] == "invalid_request_error"


async def test_models_come_from_the_config(rig_of) -> None:
    rig = await rig_of({"d": "decode"}, models=["a/b", "c"])
    listed = (await rig.get("/v1/models")).json
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["a/b", "c"]


async def test_without_a_decode_engine_nothing_is_ready(rig_of) -> None:
    rig = await rig_of({"p": "prefill"})
    assert (await rig.get("/readyz")).status == 503
    assert (await rig.get("/health")).status == 200
    answer = await rig.chat()
    assert (answer.status, answer.error["code"]) == (503, "no_engine_ready")
    assert "retry-after" in answer.headers


async def test_the_metrics_port_answers_probes_and_scrapes_only(rig) -> None:
    await rig.chat()
    url = f"http://127.0.0.1:{rig.metrics_port}"
    for path, status in (("/metrics", 200), ("/health", 200), ("/readyz", 200), ("/v1/models", 404)):
        async with rig.http.get(url + path) as answer:
            assert answer.status == status
    assert await rig.metric("requests_total", route="chat", status="200") == 1
    assert await rig.metric("request_duration_seconds_count", route="chat") == 1
    assert await rig.metric("endpoints_ready", role="decode") == 1


async def test_too_many_requests_are_told_to_come_back(rig_of) -> None:
    rig = await rig_of({"d": "decode"}, limits=LimitsConfig(max_in_flight=1))
    rig["d"].script = lambda seen: Script(gap_s=0.1)
    async with rig.http.post(
        rig.url + CHAT, json={"model": "m", "stream": True, "messages": [{"role": "user", "content": ""}]}
    ) as held:
        answer = await rig.chat()
        assert (answer.status, answer.error["code"]) == (429, "too_many_requests")
        assert answer.headers["retry-after"] == "1"
        await held.read()
    await rig.settled()
    assert (await rig.chat()).status == 200


def test_every_error_has_a_shape() -> None:
    def leaves(kind: type[RequestError]) -> list[type[RequestError]]:
        return [leaf for sub in kind.__subclasses__() for leaf in ([sub, *leaves(sub)])]

    assert set(SHAPES) == set(leaves(RequestError))


# -- keys ---------------------------------------------------------------------------------------------


@pytest.fixture
def keys_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "keys"
    directory.mkdir()
    (directory / "team-a").write_text("# team a\nkey-one\n\n  key-two  \n")
    (directory / "team-b").write_bytes(b"key-three")
    (directory / "..data").write_text("not-a-key")
    return directory


async def test_keys_are_asked_for_and_not_passed_on(rig_of, keys_dir, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    rig = await rig_of({"d": "decode"}, auth=AuthConfig(keys_dir=str(keys_dir)))
    for key in ("key-one", "key-two", "key-three"):
        assert (await rig.chat({"Authorization": f"Bearer {key}"})).status == 200
    for header in (
        "Bearer wrong",
        "Bearer",
        "Bearer ",
        "Basic key-one",
        "key-one",
        "Bearer not-a-key",
        "Bearer # team a",
    ):
        answer = await rig.chat({"Authorization": header})
        assert answer.status == 401, header
        assert answer.headers["www-authenticate"] == 'Bearer realm="broadbeam"'
        assert answer.error["code"] == "invalid_api_key"
    assert (await rig.chat()).status == 401
    assert (await rig.get("/v1/models")).status == 401
    assert (await rig.get("/health")).status == (await rig.get("/readyz")).status == 200
    assert "authorization" not in rig["d"].seen[0].headers
    assert "key-one" not in caplog.text


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 10000000\r\nExpect: 100-continue", b"Transfer-Encoding: chunked"]
)
async def test_a_stranger_is_sent_away_before_a_large_body(rig_of, keys_dir, framing) -> None:
    rig = await rig_of({"d": "decode"}, auth=AuthConfig(keys_dir=str(keys_dir)))
    head = b"POST %b HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %%b\r\n%b\r\n\r\n" % (
        CHAT.encode(),
        framing,
    )
    assert (await rig.raw(head % b"wrong")).startswith(b"HTTP/1.1 401 ")
    if b"Expect" in framing:
        assert (await rig.raw(head % b"key-one", until=b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
    body = b'{"model":"m","messages":[{"role":"user","content":"%b"}]}' % (b"x" * 300_000)
    for key, status in (("key-one", 200), ("wrong", 401), ("key-one", 200)):
        assert (await rig.post(CHAT, body, {"Authorization": f"Bearer {key}"})).status == status


def with_key(authorization: bytes) -> Head:
    return Head(b"POST", b"/", {b"authorization": authorization}, keep_alive=True, chunks=True)


def test_keys_are_read_again_when_they_change(keys_dir) -> None:
    keys = ApiKeys(str(keys_dir))
    known = with_key(b"bearer key-one")
    keys.check(known)
    (keys_dir / "new").write_text("key-one-b\n")
    os.replace(keys_dir / "new", keys_dir / "team-a")
    keys.refresh()
    keys.check(with_key(b"Bearer key-one-b"))
    with pytest.raises(Unauthorized):
        keys.check(known)
    for file in keys_dir.iterdir():
        file.unlink()
    keys_dir.rmdir()
    keys.refresh()
    for key in (b"key-one", b"key-one-b", b"key-three"):
        with pytest.raises(Unauthorized):
            keys.check(with_key(b"Bearer " + key))


def test_keys_that_are_not_there_stop_the_start(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"auth\.keys_dir: .*/none is not a directory"):
        ApiKeys(str(tmp_path / "none"))
