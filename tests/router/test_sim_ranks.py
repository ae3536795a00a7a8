"""The real `openai` client, the gateway as a process, and simulated ranks behind it: all on real sockets."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.slow

KEY = "sk-test"
MODEL = "harbour"
ASK: dict[str, Any] = {"model": MODEL, "temperature": 0}
CHAT: dict[str, Any] = {**ASK, "messages": [{"role": "user", "content": "What floats, and why?"}]}
TEXT: dict[str, Any] = {**ASK, "prompt": "What floats, and why?"}
ENDLESS: dict[str, Any] = {"max_tokens": 3000, "extra_body": {"ignore_eos": True}}  # 90 s of a slow site
BODY_LIMIT = 20_000
ROUTE = "x-broadbeam-route"
_addresses = (f"127.{212 + os.getpid() % 40}.7.{number}" for number in itertools.count(1))


def until(condition: Callable[[], Any], what: str, within_s: float = 60.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(0.02)
    return found


def http(url: str, body: bytes | None = None) -> tuple[int, str]:
    """Status and text; (0, reason) while nobody listens."""
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


class Engine:
    """A pod of one simulated rank; `kill` is what a node's power cord does to it."""

    def __init__(self, folder: Path, role: str, decode_ms: float) -> None:
        self.role, self.host = role, next(_addresses)
        self.name = f"{role}-{self.host}/0"
        config = {
            "engine": "sim",
            "role": role,
            "model": {"name": MODEL, "source": "sim://", "max_model_len": 4096},
            "kv_transfer": {"connector": "tcp"},
            "sim": {"prefill_base_ms": 1, "decode_base_ms": decode_ms},
        }
        path = folder / f"{self.host}.json"
        path.write_text(json.dumps(config))
        self.log = (folder / f"{self.host}.log").open("wb")
        command = [sys.executable, "-m", "broadbeam_runtime", "serve"]
        self.process = subprocess.Popen(
            [*command, "--config", str(path), "--host", self.host], stdout=self.log, stderr=self.log
        )

    @property
    def endpoint(self) -> dict[str, object]:
        place = {"host": self.host, "port": 8000, "role": self.role}
        return {"name": self.name, **place, "pool": self.role, "group": "0", "revision": "r"}

    def ready(self) -> bool:
        assert self.process.poll() is None, Path(self.log.name).read_text()
        return http(f"http://{self.host}:9000/readyz")[0] == 200

    def metric(self, name: str, label: str = "") -> float:
        page = http(f"http://{self.host}:9000/metrics")[1].splitlines()
        return sum(
            float(line.rpartition(" ")[2]) for line in page if line.startswith(f"{name}{{") and label in line
        )

    def signal_rank(self, number: int) -> None:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == self.process.pid:
                os.kill(int(stat.parent.name), number)

    def kill(self) -> None:
        """The supervisor's ranks die with it."""
        self.process.kill()
        self.process.wait()
        self.log.close()


class Site:
    """A gateway in front of engines."""

    def __init__(self, stack: ExitStack, folder: Path, roles: list[str], decode_ms: float = 2) -> None:
        self.engines = [Engine(folder, role, decode_ms) for role in roles]
        for engine in self.engines:
            stack.callback(engine.kill)
        for engine in self.engines:
            until(engine.ready, "an engine is ready")
        (folder / "keys").mkdir()
        (folder / "keys" / "test").write_text(KEY + "\n")
        endpoints = folder / "endpoints.json"
        endpoints.write_text(json.dumps({"endpoints": [engine.endpoint for engine in self.engines]}))
        self.port, metrics_port = free_port(), free_port()
        config = {
            "cluster": "c",
            "models": [MODEL],
            "endpoints": {"from": "file", "path": str(endpoints)},
            "disaggregated": "prefill" in roles,
            "port": self.port,
            "metrics_port": metrics_port,
            "auth": {"keys_dir": str(folder / "keys")},
            "limits": {"max_body_bytes": BODY_LIMIT},
            "timeouts": {"connect_s": 1, "drain_s": 1},
            "route_headers": True,
        }
        (folder / "gateway.json").write_text(json.dumps(config))
        command = [sys.executable, "-m", "broadbeam_router", "--config", str(folder / "gateway.json")]
        log = stack.enter_context((folder / "gateway.log").open("wb"))
        gateway = subprocess.Popen([*command, "--host", "127.0.0.1"], stderr=log)
        stack.callback(gateway.wait)
        stack.callback(gateway.terminate)
        self.url = f"http://127.0.0.1:{self.port}"
        until(lambda: http(f"{self.url}/readyz")[0] == 200, "the gateway is ready")
        self.client = stack.enter_context(
            openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)
        )

    def engine(self, role: str) -> Engine:
        return next(engine for engine in self.engines if engine.role == role)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(stack, tmp_path_factory.mktemp("site"), ["prefill", "decode"])


@pytest.fixture
def slow_site(tmp_path: Path) -> Iterator[Site]:
    """At 30 ms a token, so that there is time to do something while an answer is on its way; to be broken."""
    with ExitStack() as stack:
        yield Site(stack, tmp_path, ["prefill", "decode"], decode_ms=30)


class Chat:
    """The chat route as the client offers it, and where its answers hold what."""

    def create(self, client: openai.OpenAI, **fields: Any) -> Any:
        return client.chat.completions.create(**(CHAT | fields))

    def text(self, choice: Any) -> str:
        return (choice.delta if hasattr(choice, "delta") else choice.message).content or ""

    def asked_logprobs(self) -> dict[str, Any]:
        return {"logprobs": True, "top_logprobs": 2}

    def logprobs(self, choice: Any) -> list[tuple[float, int]]:
        """Of each token its log-probability and how many others are listed beside it."""
        return [(token.logprob, len(token.top_logprobs)) for token in choice.logprobs.content]


class Completions:
    def create(self, client: openai.OpenAI, **fields: Any) -> Any:
        return client.completions.create(**(TEXT | fields))

    def text(self, choice: Any) -> str:
        text: str = choice.text
        return text

    def asked_logprobs(self) -> dict[str, Any]:
        return {"logprobs": 2}

    def logprobs(self, choice: Any) -> list[tuple[float, int]]:
        found = choice.logprobs
        return list(zip(found.token_logprobs, map(len, found.top_logprobs), strict=True))


both_routes = pytest.mark.parametrize("route", [Chat(), Completions()], ids=["chat", "completions"])
whole_and_streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def choices_of(answer: Any, stream: bool) -> list[Any]:
    """The choices of a whole answer, or the parts of all choices of a stream in the order they came."""
    return [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices


@both_routes
def test_an_answer_is_the_same_whole_and_streamed(site: Site, route) -> None:
    whole = route.create(site.client, max_tokens=8)
    chunks = list(
        route.create(site.client, max_tokens=8, stream=True, stream_options={"include_usage": True})
    )
    streamed = choices_of(chunks, stream=True)
    assert whole.usage.completion_tokens == 8
    assert "".join(map(route.text, streamed)) == route.text(whole.choices[0])
    assert len(streamed) >= 8
    assert streamed[-1].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 8


@whole_and_streamed
def test_prefill_and_decode_are_apart_and_say_so(site: Site, stream) -> None:
    sources = "vllm:prompt_tokens_by_source_total"
    decode = site.engine("decode")
    before = decode.metric(sources, 'source="local_compute"')
    raw = site.client.completions.with_raw_response.create(**TEXT, max_tokens=4, stream=stream)
    list(raw.parse()) if stream else raw.parse()
    assert raw.headers[ROUTE] == "disaggregated"
    assert raw.headers["x-broadbeam-prefill"] == site.engine("prefill").name
    assert raw.headers["x-broadbeam-decode"] == decode.name
    assert decode.metric(sources, 'source="local_compute"') == before
    assert decode.metric(sources, 'source="external_kv_transfer"') > 0


@both_routes
@whole_and_streamed
def test_the_text_ends_before_the_stop_string(site: Site, route, stream) -> None:
    full = route.text(route.create(site.client, max_tokens=12).choices[0])
    word = full.split()[5]
    answer = route.create(site.client, max_tokens=12, stop=["nowhere", word], stream=stream)
    choices = choices_of(answer, stream)
    assert "".join(map(route.text, choices)) == full[: full.index(word)]
    assert choices[-1].finish_reason == "stop"


def test_several_choices_come_from_one_rank(site: Site) -> None:
    raw = site.client.chat.completions.with_raw_response.create(**CHAT, max_tokens=4, n=3)
    assert [choice.index for choice in raw.parse().choices] == [0, 1, 2]
    assert raw.headers[ROUTE] == "decode-only"


@both_routes
@whole_and_streamed
def test_each_of_several_choices_is_whole(site: Site, route, stream) -> None:
    alone = route.text(route.create(site.client, max_tokens=5).choices[0])
    parts = choices_of(route.create(site.client, max_tokens=5, n=3, stream=stream), stream)
    for index in range(3):
        mine = [part for part in parts if part.index == index]
        assert "".join(map(route.text, mine)) == alone
        assert [part.finish_reason for part in mine if part.finish_reason] == ["length"]


@both_routes
@whole_and_streamed
def test_every_token_has_its_logprobs_the_first_included(site: Site, route, stream) -> None:
    answer = route.create(site.client, max_tokens=6, stream=stream, **route.asked_logprobs())
    found = [choice for choice in choices_of(answer, stream) if choice.logprobs]
    tokens = [token for choice in found for token in route.logprobs(choice)]
    assert len(tokens) == 6
    assert all(logprob <= 0 and others == 2 for logprob, others in tokens)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        pytest.param({"model": "other"}, openai.NotFoundError, "`other` does not exist", id="model"),
        pytest.param({"max_tokens": 0}, openai.BadRequestError, "max_tokens must be", id="the gateway's"),
        pytest.param({"temperature": -1}, openai.BadRequestError, "temperature", id="the engine's"),
        pytest.param(
            {"user": "x" * BODY_LIMIT}, openai.APIStatusError, f"{BODY_LIMIT} bytes", id="oversized"
        ),
    ],
)
@both_routes
@whole_and_streamed
def test_a_wrong_request_is_the_clients_own_exception(
    site: Site, route, stream, fields, error, words
) -> None:
    with pytest.raises(error, match=words):
        route.create(site.client, **({"max_tokens": 4, "stream": stream} | fields))


def test_a_wrong_key_is_the_clients_own_exception(site: Site) -> None:
    with pytest.raises(openai.AuthenticationError, match="the API key is not known"):
        site.client.with_options(api_key="sk-other").models.list()
    assert [model.id for model in site.client.models.list()] == [MODEL]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        pytest.param(b'{"model":', 400, "the body is not JSON", id="bad JSON"),
        pytest.param(b" " * (BODY_LIMIT + 1), 413, f"{BODY_LIMIT}", id="oversized"),
    ],
)
def test_a_useless_body_is_refused_in_one_line(site: Site, body, status, words) -> None:
    found, text = http(f"{site.url}/v1/chat/completions", body)
    message = json.loads(text)["error"]["message"]
    assert found == status
    assert words in message
    assert "\n" not in message


def test_a_cancelled_stream_frees_the_request_on_the_engine(slow_site: Site) -> None:
    decode = slow_site.engine("decode")
    for route in (Chat(), Completions()):
        stream = route.create(slow_site.client, **ENDLESS, stream=True)
        next(iter(stream))
        until(lambda: decode.metric("vllm:num_requests_running") == 1, "the request runs")
        stream.close()
        until(lambda: decode.metric("vllm:num_requests_running") == 0, "it is given up", within_s=10)
    assert decode.metric("vllm:generation_tokens_total") < 3000


def test_a_client_that_will_not_wait_frees_the_request_on_the_engine(slow_site: Site) -> None:
    decode = slow_site.engine("decode")
    with pytest.raises(openai.APITimeoutError):
        slow_site.client.with_options(timeout=1).chat.completions.create(**CHAT, **ENDLESS)
    until(lambda: decode.metric("vllm:num_requests_running") == 0, "the request is given up", within_s=10)
    assert decode.metric("vllm:generation_tokens_total") < 3000


def test_a_prefill_rank_that_dies_between_the_legs_does_not_cost_the_answer(slow_site: Site) -> None:
    wanted = slow_site.client.completions.create(**TEXT, max_tokens=8).choices[0].text
    prefill, decode = slow_site.engine("prefill"), slow_site.engine("decode")
    done = prefill.metric("vllm:request_success_total")
    create = slow_site.client.completions.with_raw_response.create
    with ThreadPoolExecutor(1) as clients:
        decode.signal_rank(signal.SIGSTOP)
        answer = clients.submit(create, **TEXT, max_tokens=8)
        until(lambda: prefill.metric("vllm:request_success_total") > done, "the prefill leg is over")
        prefill.kill()
        decode.signal_rank(signal.SIGCONT)
        raw = answer.result()
    assert raw.headers[ROUTE] == "fallback"
    assert raw.parse().choices[0].text == wanted


def test_a_decode_rank_that_dies_is_a_clear_error_or_an_answer_from_another(tmp_path: Path) -> None:
    with ExitStack() as stack:
        site = Site(stack, tmp_path, ["prefill", "decode", "decode"], decode_ms=30)
        wanted = site.client.completions.create(**TEXT, max_tokens=40).choices[0].text
        victim = site.engine("decode")
        outcomes: list[str | openai.APIError] = []
        threads = [threading.Thread(target=outcome, args=(site, bool(n % 2), outcomes)) for n in range(8)]
        for thread in threads:
            thread.start()
        until(lambda: victim.metric("vllm:num_requests_running") >= 2, "the victim is busy")
        victim.kill()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 8
        assert wanted in outcomes, "what was not streamed yet is answered by the other rank"
        assert all(each == wanted or "engine" in str(each) for each in outcomes), outcomes
        again: list[str | openai.APIError] = []
        outcome(site, True, again)
        assert again == [wanted]


def outcome(site: Site, stream: bool, outcomes: list[str | openai.APIError]) -> None:
    """Append the whole text, or the error that the client raised."""
    try:
        answer = site.client.completions.create(**TEXT, max_tokens=40, stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        outcomes.append("".join(choice.text for choice in choices))
    except openai.APIError as error:
        outcomes.append(error)
