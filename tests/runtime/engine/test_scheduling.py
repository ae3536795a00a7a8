"""The scheduler without a model: who runs when, who waits, and that no block is ever lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broadbeam_crds.engine_config import SchedulingConfig
from broadbeam_runtime.core import Output, RemotePrefill, Request, SamplingParams, TokenLogprob
from broadbeam_runtime.kv.connector import PullResult
from broadbeam_runtime.kv.pool import BlockPool
from broadbeam_runtime.kv.prefix import ROOT, block_hash
from broadbeam_runtime.scheduler import Limits, Scheduler
from broadbeam_runtime.transfers import Transfers

EOS = 2


def scheduler(blocks: int = 64, block_size: int = 4, reuse: bool = True, **scheduling: Any) -> Scheduler:
    limits = Limits(
        SchedulingConfig(**scheduling), max_len=200, vocab=1000, eos_token_ids=(EOS,), prefix_reuse=reuse
    )
    return Scheduler(limits, BlockPool(blocks, block_size))


def request(name: str, prompt: int | tuple[int, ...] = 8, **sampling: Any) -> Request:
    tokens = tuple(range(10, 10 + prompt)) if isinstance(prompt, int) else prompt
    return Request(name, tokens, SamplingParams(**({"max_tokens": 4} | sampling)), 0.0)


def step(s: Scheduler, token: int = 7) -> dict[str, int]:
    """Run one step, every sampled token being `token`; how many tokens each request computed."""
    work = s.schedule()
    sampled = {i: TokenLogprob(token, 0.0) for i, item in enumerate(work) if item.chunk().sample}
    computed = {item.sequence.id: item.count for item in work}
    s.commit(work, sampled)
    return computed


def outputs(s: Scheduler, name: str) -> list[Output]:
    return [output for output in s.outputs if output.request_id == name]


def test_decodes_go_before_prompts_and_prompts_share_what_is_left() -> None:
    s = scheduler(max_batched_tokens=10, reuse=False)
    s.add(request("a", 4))
    assert step(s) == {"a": 4}
    s.add(request("b", 16))
    s.add(request("c", 4))
    assert step(s) == {"a": 1, "b": 9}
    assert step(s) == {"a": 1, "b": 7, "c": 2}
    assert step(s) == {"a": 1, "b": 1, "c": 2}


def test_first_come_is_first_served() -> None:
    s = scheduler(blocks=12, reuse=False)
    s.add(request("big", 40))
    s.add(request("bigger", 44))
    s.add(request("small", 4))
    assert step(s) == {"big": 40}
    for _ in range(3):
        assert step(s) == {"big": 1}  # the small one does not overtake
    assert step(s) == {"bigger": 44}


def test_no_more_than_max_sequences_run() -> None:
    s = scheduler(max_sequences=2)
    for name in "abc":
        s.add(request(name, 4, max_tokens=2))
    assert set(step(s)) == {"a", "b"}
    assert set(step(s)) == {"a", "b"}
    assert set(step(s)) == {"c"}


def test_the_last_admitted_gives_up_its_blocks_and_comes_back() -> None:
    s = scheduler(blocks=6, block_size=4, reuse=False)
    s.add(request("first", 8, max_tokens=12))
    s.add(request("second", tuple(range(100, 106)), max_tokens=12))
    seen = [step(s) for _ in range(40) if s.has_work]
    assert s.counts.preemptions == 1
    assert [len(outputs(s, name)) for name in ("first", "second")] == [12, 12]
    assert seen[-1] == {"second": 1}
    s.check_integrity()


@pytest.mark.parametrize(
    ("given_request", "message"),
    [
        pytest.param(request("a", ()), "the prompt is empty", id="empty"),
        pytest.param(request("a", 200), "the prompt has 200 tokens, the model takes at most 199", id="long"),
        pytest.param(request("a", (5, 1000)), "a token id outside 0..999", id="unknown token"),
        pytest.param(
            request("a", stop_token_ids=(1000,), min_tokens=1),
            "a token id outside 0..999",
            id="unknown stop token",
        ),
    ],
)
def test_what_can_never_run_is_refused(given_request: Request, message: str) -> None:
    s = scheduler()
    s.add(given_request)
    assert s.outputs[0].finish == "error"
    assert message in (s.outputs[0].error or "")
    assert not s.has_work


@pytest.mark.parametrize(
    ("sampling", "token", "finish", "count"),
    [
        pytest.param({}, 7, "length", 4, id="max_tokens"),
        pytest.param({}, EOS, "stop", 1, id="end of text"),
        pytest.param({"ignore_eos": True}, EOS, "length", 4, id="ignored"),
        pytest.param({"stop_token_ids": (7,)}, 7, "stop", 1, id="stop token"),
        pytest.param({"max_tokens": 500}, 7, "length", 192, id="model's limit"),
    ],
)
def test_how_sequences_end(sampling: dict[str, Any], token: int, finish: str, count: int) -> None:
    s = scheduler()
    s.add(request("a", **sampling))
    while s.has_work:
        step(s, token)
    made = outputs(s, "a")
    assert (made[-1].finish, len(made)) == (finish, count)
    assert made[-1].stop_token_id == (token if finish == "stop" else None)
    s.check_integrity()


def test_stop_tokens_are_forbidden_until_min_tokens() -> None:
    s = scheduler()
    s.add(request("a", min_tokens=2, stop_token_ids=(7,)))
    forbidden = []
    while s.has_work:
        forbidden += [item.sequence.draw().forbidden for item in s.schedule()]
        work = s.schedule()
        s.commit(work, {0: TokenLogprob(9, 0.0)})
    assert forbidden == [(7, EOS), (7, EOS), (), ()]


@pytest.mark.parametrize("steps", [0, 1, 2], ids=["waiting", "in its prompt", "decoding"])
def test_an_aborted_request_frees_its_blocks(steps: int) -> None:
    s = scheduler(max_batched_tokens=8)
    s.add(request("a", 12))
    for _ in range(steps):
        step(s)
    s.abort("a")
    assert s.outputs[-1].finish == "abort"
    assert not s.has_work
    assert s.pool.available == len(s.pool)
    s.abort("a")  # it has ended
    assert len([o for o in s.outputs if o.finish]) == 1


def test_the_end_of_a_prefix_is_reused_before_its_beginning() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(3)
    for index, block in enumerate(blocks):
        pool.prefix.register(block, block_hash(ROOT, [index]))
    pool.release(blocks)
    taken = pool.allocate(2)
    assert taken == [3, blocks[2]]
    assert pool.prefix.match([block_hash(ROOT, [0]), block_hash(ROOT, [1])]) == blocks[:2]


def test_block_hashes_depend_on_everything_before() -> None:
    first, other = block_hash(ROOT, [1, 2]), block_hash(ROOT, [2, 1])
    assert block_hash(first, [3]) != block_hash(other, [3])


class Wire:
    """A connector whose holds and pulls end when the test says so."""

    def __init__(self) -> None:
        self.holds: list[str] = []
        self.pulls: list[str] = []
        self.news: tuple[list[tuple[str, bool]], list[PullResult]] = ([], [])
        self.wake = lambda: None

    def hold(self, request_id: str, block_ids: Any, num_tokens: int) -> dict[str, Any]:
        self.holds.append(request_id)
        return {}

    def release(self, request_id: str) -> None:
        self.end_hold(request_id, pulled=False)

    def end_hold(self, request_id: str, pulled: bool) -> None:
        if request_id in self.holds:
            self.holds.remove(request_id)
            self.news[0].append((request_id, pulled))

    def expect(self, request_id: str, params: Any) -> None: ...

    def pull(self, request_id: str, params: Any, block_ids: Any) -> None:
        self.pulls.append(request_id)

    def cancel(self, request_id: str) -> None: ...

    def end_pull(self, request_id: str, error: str | None) -> None:
        self.pulls.remove(request_id)
        self.news[1].append(PullResult(request_id, 1, 0.0, error))

    def released(self) -> list[tuple[str, bool]]:
        taken = self.news[0][:]
        self.news[0].clear()
        return taken

    def pulled(self) -> list[PullResult]:
        taken = self.news[1][:]
        self.news[1].clear()
        return taken


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["add", "hold", "pull", "pull first", "abort", "end hold", "arrive", "fail", "step"]),
        st.integers(0, 20),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(moves=MOVES, reuse=st.booleans(), recompute=st.booleans(), budget=st.integers(1, 50))
def test_whatever_is_held_pulled_and_lost_every_block_has_its_owner_and_all_requests_end(
    moves: list[tuple[str, int]], reuse: bool, recompute: bool, budget: int
) -> None:
    pool, wire = BlockPool(50, 4), Wire()
    limits = Limits(
        SchedulingConfig(max_batched_tokens=budget, max_sequences=4), 200, 1000, (EOS,), reuse, recompute
    )
    s, added = Scheduler(limits, pool, Transfers(wire, pool)), 0  # type: ignore[arg-type]

    def add(number: int, length: int, **leg: Any) -> None:
        nonlocal added
        prompt = tuple(10 + i // 6 for i in range(1 + 7 * number))
        s.add(Request(f"{added}", prompt, SamplingParams(max_tokens=length), 0.0, **leg))
        added += 1

    for kind, number in moves:
        match kind:
            case "add":
                add(number, 1 + number)
            case "hold":
                add(number, 1, hold_blocks=True)
            case "pull" | "pull first":
                first = TokenLogprob(9, 0.0) if kind == "pull first" else None
                add(number, 30, remote_prefill=RemotePrefill({}, 1 + 7 * number, first))
            case "abort":
                s.abort(f"{number}")
            case "end hold" if wire.holds:
                wire.end_hold(wire.holds[number % len(wire.holds)], pulled=bool(number % 2))
            case "arrive" | "fail" if wire.pulls:
                wire.end_pull(wire.pulls[number % len(wire.pulls)], "lost" if kind == "fail" else None)
            case _:
                turn(s)
        s.check_integrity()
    for _ in range(5000):
        turn(s)
        if not s.has_work:  # nothing goes on without the transport
            for held in wire.holds[:1]:
                wire.end_hold(held, pulled=False)
            for pulling in wire.pulls[:1]:
                wire.end_pull(pulling, None)
    assert sorted(o.request_id for o in s.outputs if o.finish) == sorted(map(str, range(added)))
    assert pool.available == len(pool)


def turn(s: Scheduler) -> None:
    """What the engine's thread does: take in what the transport has, step if there is work."""
    s.poll()
    if s.has_work:
        step(s)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 40), st.integers(1, 30)),
        st.tuples(st.just("abort"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 5), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS, reuse=st.booleans(), budget=st.integers(1, 50))
def test_whatever_happens_every_block_has_its_owner_and_all_requests_end(
    actions: list[tuple[str, int, int]], reuse: bool, budget: int
) -> None:
    s = scheduler(blocks=50, reuse=reuse, max_batched_tokens=budget, max_sequences=5)
    added = 0
    for kind, number, length in actions:
        if kind == "add":
            s.add(request(f"{added}", tuple(10 + i // 6 for i in range(number)), max_tokens=length))
            added += 1
        elif kind == "abort":
            s.abort(f"{number}")
        else:
            for _ in range(number):
                assert sum(step(s).values()) <= budget
        s.check_integrity()
    for _ in range(5000):
        if s.has_work:
            step(s)
    assert sorted(o.request_id for o in s.outputs if o.finish) == sorted(map(str, range(added)))
    assert s.pool.available == len(s.pool)
