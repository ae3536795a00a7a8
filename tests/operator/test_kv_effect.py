"""Proof that KV moves: counters of real pages, over real sockets."""

from __future__ import annotations

import aiohttp
import pytest
from aiohttp import web

from broadbeam_operator.kv_effect import HttpMeter, KVWatch, Tokens, parse, targets, verdict
from broadbeam_operator.observe import Observed

PAGE = b"""# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="tiny",source="local_compute"} 9110.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="tiny",source="local_cache_hit"} 5.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="tiny",source="external_kv_transfer"} 12.0
vllm:prompt_tokens_by_source_total{engine="1",model_name="tiny",source="external_kv_transfer"} 1e3
vllm:prompt_tokens_total{engine="0",model_name="tiny"} 9110.0
"""


def test_counters_of_all_ranks_are_added():
    assert parse(PAGE) == Tokens(transferred=1012, computed=9110)


@pytest.mark.parametrize(
    "page", [b"", b"not metrics at all", b'vllm:prompt_tokens_by_source_total{source="x"} 1']
)
def test_a_page_without_the_counters_says_nothing(page):
    assert parse(page) == Tokens()


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        pytest.param(Tokens(0, 0), None, id="no traffic"),
        pytest.param(Tokens(40, 1), "effective", id="one token a request is computed"),
        pytest.param(Tokens(0, 63), None, id="too little"),
        pytest.param(Tokens(0, 64), "recomputed", id="recomputed"),
        pytest.param(Tokens(10, 100), "recomputed", id="mostly recomputed"),
    ],
)
def test_the_verdict(tokens, found):
    assert verdict(tokens) == found


@pytest.mark.parametrize(
    ("earlier", "now", "moved"),
    [
        pytest.param(Tokens(5, 5), Tokens(9, 6), Tokens(4, 1), id="counting on"),
        pytest.param(Tokens(500, 5), Tokens(3, 1), Tokens(3, 1), id="started anew"),
    ],
)
def test_counters_are_compared_with_their_earlier_values(earlier, now, moved):
    assert now.since(earlier) == moved


def decode_pod(uid: str, address: str | None = "10.0.0.1", ready: str = "True", ranks: int = 2):
    return {
        "metadata": {
            "uid": uid,
            "labels": {"serving.broadbeam.io/role": "decode"},
            "annotations": {"serving.broadbeam.io/ranks-per-node": str(ranks)},
        },
        "status": {"podIP": address, "conditions": [{"type": "Ready", "status": ready}]},
    }


def seen(*pods):
    return Observed({"metadata": {"name": "demo", "namespace": "default"}}, {}, pods)


@pytest.mark.parametrize(
    ("engine", "urls"),
    [
        pytest.param("broadbeam", ["http://10.0.0.1:9000/metrics"], id="our supervisor answers for all"),
        pytest.param(
            "vllm",
            ["http://10.0.0.1:8000/metrics", "http://10.0.0.1:8001/metrics"],
            id="vLLM's ranks answer themselves",
        ),
    ],
)
def test_where_the_counters_are(engine, urls):
    assert targets(seen(decode_pod("a")), engine) == {"a": urls}


@pytest.mark.parametrize(
    "pod",
    [
        pytest.param(decode_pod("a", ready="False"), id="not ready"),
        pytest.param(decode_pod("a", address=None), id="without an address"),
    ],
)
def test_pods_that_cannot_answer_are_not_asked(pod):
    assert targets(seen(pod), "broadbeam") == {}


async def test_pages_are_read_over_http_and_dead_pods_left_out():
    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=PAGE)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with aiohttp.ClientSession() as session:
            found = await HttpMeter(session).read(
                {
                    "alive": [f"http://127.0.0.1:{port}/metrics"],
                    "wrong": [f"http://127.0.0.1:{port}/nothing"],
                    "dead": ["http://127.0.0.1:1/metrics"],
                }
            )
    finally:
        await runner.cleanup()
    assert found == {"alive": Tokens(1012, 9110)}


class Counters:
    def __init__(self) -> None:
        self.tokens = Tokens()
        self.reads = 0

    async def read(self, _):
        self.reads += 1
        return {"a": self.tokens}


async def test_recomputing_after_good_times_is_noticed():
    meter = Counters()
    watch = KVWatch(meter, every_s=0)
    meter.tokens = Tokens(10_000, 0)
    assert await watch.look(seen(decode_pod("a")), "broadbeam") == "effective"
    meter.tokens = Tokens(10_000, 100)
    assert await watch.look(seen(decode_pod("a")), "broadbeam") == "recomputed"


async def test_a_burst_of_passes_asks_once():
    meter, now = Counters(), [0.0]
    watch = KVWatch(meter, every_s=2, clock=lambda: now[0])
    for now[0] in (0.0, 0.5, 1.9, 2.0):
        await watch.look(seen(decode_pod("a")), "broadbeam")
    assert meter.reads == 2


async def test_little_traffic_adds_up():
    meter = Counters()
    watch = KVWatch(meter, every_s=0)
    meter.tokens = Tokens(0, 40)
    assert await watch.look(seen(decode_pod("a")), "broadbeam") is None
    meter.tokens = Tokens(0, 80)
    assert await watch.look(seen(decode_pod("a")), "broadbeam") == "recomputed"
