"""The endpoint set: picking, leaving out, and counters that nothing resets.

Several of these are other routers' bugs: counters reset by health checks, load counted only until the
answer's head, an idle sick endpoint that switched the policy off, an endpoint marked bad for ever.
"""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from broadbeam_crds.gateway_config import Endpoint, TimeoutsConfig
from broadbeam_router.deadlines import Deadlines
from broadbeam_router.fake_engine import Script
from broadbeam_router.fleet import Fleet, Member, revision_family
from broadbeam_router.policy import least_loaded


class Clock:
    """A loop's clock, by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def time(self) -> float:
        return self.now

    def call_later(self, *_: object) -> asyncio.TimerHandle:
        return None  # type: ignore[return-value]


def endpoint(
    name: str, role: str = "decode", ready: bool = True, host: str = "10.0.0.1", revision: str = "r"
) -> Endpoint:
    return Endpoint(
        name=name, host=host, port=8000, role=role, pool=role, group="0", revision=revision, ready=ready
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


def new_fleet(clock: Clock, ejections: list[str] | None = None) -> Fleet:
    noted = ejections if ejections is not None else []
    return Fleet(clock, Deadlines(clock), least_loaded, 5.0, noted.append, lambda: 0.0)


@pytest.fixture
def fleet(clock: Clock) -> Fleet:
    return new_fleet(clock)


class Slot:
    """A leg in flight, counted as the forwarder counts it."""

    def __init__(self, member: Member, leg: str) -> None:
        self.member, self.leg = member, leg

    def __enter__(self) -> None:
        self.member.in_flight += 1
        self.member.prefill_in_flight += self.leg == "prefill"

    def __exit__(self, *_: object) -> None:
        self.member.in_flight -= 1
        self.member.prefill_in_flight -= self.leg == "prefill"


def names(members: tuple[Member, ...]) -> list[str]:
    return [member.name for member in members]


def picked(fleet: Fleet, times: int = 20) -> set[str]:
    return {member.name for _ in range(times) if (member := fleet.pick_decode([])) is not None}


def test_only_ready_endpoints_get_requests(fleet) -> None:
    fleet.update([endpoint("a"), endpoint("b", ready=False), endpoint("p", "prefill"), endpoint("x", "both")])
    assert (names(fleet.decode), names(fleet.prefill)) == (["a", "x"], ["p"])


def test_load_survives_every_change_of_the_set(fleet) -> None:
    fleet.update([endpoint("a"), endpoint("b")])
    a = fleet.decode[0]
    with Slot(a, "decode"):
        for seen in (
            [endpoint("b")],
            [endpoint("a", ready=False), endpoint("b")],
            [endpoint("a"), endpoint("b")],
        ):
            fleet.update(seen)
            assert a.in_flight == 1
        assert picked(fleet) == {"b"}, "a is still busy with the request from before"
    assert a.in_flight == 0


def test_a_replaced_pod_starts_with_its_own_count(fleet) -> None:
    fleet.update([endpoint("a")])
    with Slot(fleet.decode[0], "decode"):
        fleet.update([endpoint("a", host="10.0.0.2")])
        assert fleet.decode[0].in_flight == 0


def test_what_is_gone_and_idle_is_forgotten(fleet) -> None:
    for generation in range(100):
        fleet.update([endpoint("a", host=f"10.0.1.{generation}")])
    assert len(fleet.members()) == 1


def test_an_endpoint_that_left_while_busy_is_forgotten_later(fleet) -> None:
    fleet.update([endpoint("a")])
    with Slot(fleet.decode[0], "decode"):
        fleet.update([endpoint("b")])
    fleet.update([endpoint("b"), endpoint("c")])
    assert sorted(names(fleet.members())) == ["b", "c"]


def test_both_legs_of_an_endpoint_count_as_its_load(fleet) -> None:
    fleet.update([endpoint("x", "both"), endpoint("y", "both")])
    with Slot(fleet.decode[0], "prefill"), Slot(fleet.decode[1], "decode"), Slot(fleet.decode[1], "decode"):
        assert picked(fleet) == {"x"}


def test_a_failed_endpoint_is_left_out_twice_as_long_each_time_up_to_a_minute(clock) -> None:
    ejections: list[str] = []
    fleet = new_fleet(clock, ejections)
    fleet.update([endpoint("a"), endpoint("b")])
    bad = fleet.decode[0]
    for pause_s in (5, 10, 20, 40, 60, 60):
        fleet.failed(bad, "connect")
        assert picked(fleet) == {"b"}
        clock.now += pause_s - 0.01
        assert picked(fleet) == {"b"}
        clock.now += 0.01
        assert picked(fleet) == {"a"}
    assert len(ejections) == 6


def test_failures_while_left_out_do_not_lengthen_it(fleet, clock) -> None:
    fleet.update([endpoint("a"), endpoint("b")])
    for _ in range(10):  # ten requests were in flight when it died
        fleet.failed(fleet.decode[0], "reset")
    clock.now += 5
    assert picked(fleet) == {"a"}


def test_a_success_takes_back_what_was_held_against_an_endpoint(fleet, clock) -> None:
    fleet.update([endpoint("a"), endpoint("b")])
    bad = fleet.decode[0]
    fleet.failed(bad, "connect")
    clock.now += 5
    fleet.succeeded(bad)
    fleet.failed(bad, "connect")
    clock.now += 5
    assert picked(fleet) == {"a"}


def test_passing_its_probes_again_clears_an_endpoint(fleet) -> None:
    fleet.update([endpoint("a"), endpoint("b")])
    fleet.failed(fleet.decode[0], "connect")
    fleet.update([endpoint("a", ready=False), endpoint("b")])
    fleet.update([endpoint("a"), endpoint("b")])
    assert picked(fleet) == {"a"}


def test_server_errors_count_only_in_a_row(fleet) -> None:
    fleet.update([endpoint("a"), endpoint("b")])
    member = fleet.decode[0]
    for _ in range(5):
        fleet.answered_5xx(member)
        fleet.answered_5xx(member)
        fleet.succeeded(member)
    assert picked(fleet) == {"a"}
    for _ in range(3):
        fleet.answered_5xx(member)
    assert picked(fleet) == {"b"}


def test_a_sick_idle_endpoint_does_not_switch_the_policy_off(fleet) -> None:
    fleet.update([endpoint("a"), endpoint("b"), endpoint("c")])
    fleet.failed(fleet.decode[0], "connect")
    with Slot(fleet.decode[1], "decode"):
        assert picked(fleet) == {"c"}


def test_when_all_decode_endpoints_are_left_out_they_are_tried_all_the_same(fleet) -> None:
    fleet.update([endpoint("a"), endpoint("b")])
    for member in fleet.decode:
        fleet.failed(member, "connect")
    assert picked(fleet) == {"a"}


def test_prefill_endpoints_that_are_left_out_are_not_tried(fleet) -> None:
    fleet.update([endpoint("p", "prefill"), endpoint("a")])
    fleet.failed(fleet.prefill[0], "connect")
    assert fleet.pick_prefill([]) is None


@pytest.mark.parametrize(
    ("revision", "family"), [("7-3f2a", "7"), ("3f2a", "3f2a"), ("", ""), ("a-b-c", "a")]
)
def test_a_revision_names_its_family_before_the_dash(revision, family) -> None:
    assert revision_family(revision) == family


def test_without_a_common_family_any_pair_will_do(fleet) -> None:
    fleet.update([endpoint("p", "prefill", revision="aa"), endpoint("d", revision="bb")])
    prefill = fleet.pick_prefill([])
    assert prefill is not None
    assert fleet.pick_decode([], prefill.family) is fleet.decode[0]


class Counting(RuleBasedStateMachine):
    """Requests come and go, in any order with endpoints; the counts are what a ledger says they are."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.fleet = new_fleet(self.clock)
        self.held: list[tuple[Slot, Member, str]] = []

    @rule(up=st.lists(st.sampled_from("abcd"), unique=True), ready=st.booleans(), host=st.sampled_from("12"))
    def the_set_changes(self, up: list[str], ready: bool, host: str) -> None:
        self.fleet.update(endpoint(name, "both", ready, host) for name in up)

    @rule(leg=st.sampled_from(["prefill", "decode"]))
    def a_leg_begins(self, leg: str) -> None:
        member = self.fleet.pick_decode([])
        if member is not None:
            slot = Slot(member, leg)
            slot.__enter__()
            self.held.append((slot, member, leg))

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 1000), failed=st.booleans())
    def a_leg_ends(self, index: int, failed: bool) -> None:
        slot, member, _ = self.held.pop(index % len(self.held))
        slot.__exit__()
        if failed:
            self.fleet.failed(member, "reset")
        else:
            self.fleet.succeeded(member)

    @rule(seconds=st.floats(0, 70))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def counts_are_the_ledgers(self) -> None:
        everyone = {*self.fleet.members(), *(member for _, member, _ in self.held)}
        for member in everyone:
            for leg, count in (("prefill", member.prefill_in_flight), ("decode", member.decode_in_flight)):
                assert count == sum(m is member and kind == leg for _, m, kind in self.held)

    @invariant()
    def a_busy_endpoint_is_never_forgotten(self) -> None:
        assert {member for _, member, _ in self.held} <= set(self.fleet.members())


Counting.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCounting = Counting.TestCase


# -- through the whole gateway ------------------------------------------------------------------------


async def _ask(rig, kind: int) -> None:
    """One request, ended in one of five ways."""
    stream = kind % 2 == 0
    try:
        async with asyncio.timeout(0.03 if kind == 4 else None):
            await rig.chat(stream=stream, max_tokens=kind + 1)
    except TimeoutError:
        pass


@pytest.fixture
async def busy_rig(rig_of):
    roles = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
    return await rig_of(roles, ejection_s=0.05, timeouts=TimeoutsConfig())


async def test_counts_come_back_to_zero_whatever_happens(busy_rig) -> None:
    """The rig's own teardown asserts it; here the mess is made."""
    scripts = [
        Script(),
        Script(status=500),
        Script(cut="nothing"),
        Script(cut="half"),
        Script(delay_s=0.1),
        Script(cut_after=1, gap_s=0.01),
        Script(status=429),
        Script(status=400),
        Script(raw=b"garbage"),
    ]
    turn = iter(range(10**6))
    for engine in busy_rig.engines.values():
        engine.script = lambda seen: scripts[next(turn) * 7 % len(scripts)]
    for _ in range(6):
        await asyncio.gather(*(_ask(busy_rig, kind) for kind in range(5) for _ in range(6)))
    await busy_rig.settled()
    total = sum(
        [
            await busy_rig.metric("requests_total", route="chat", status=str(s))
            for s in (200, 400, 429, 499, 502, 504)
        ]
    )
    assert 144 <= total <= 180, "one in five may have left before it was read"


async def test_a_stream_counts_until_its_last_byte(rig_of) -> None:
    rig = await rig_of({"d0": "decode", "d1": "decode"})
    rig["d0"].script = rig["d1"].script = lambda seen: Script(words=("a",) * 20, gap_s=0.02)
    streams = [asyncio.create_task(rig.chat(stream=True)) for _ in range(6)]
    await asyncio.sleep(0.15)
    assert (rig.member("d0").in_flight, rig.member("d1").in_flight) == (3, 3)
    assert await rig.metric("endpoint_in_flight", endpoint="d0", leg="decode") == 3
    await asyncio.gather(*streams)


async def test_no_engine_is_starved(rig_of) -> None:
    rig = await rig_of({f"d{i}": "decode" for i in range(5)})
    for _ in range(10):
        await asyncio.gather(*(rig.chat() for _ in range(20)))
    counts = [len(engine.seen) for engine in rig.engines.values()]
    assert sum(counts) == 200
    assert min(counts) >= 20, counts


@pytest.mark.parametrize("policy", ["round-robin", "random"])
async def test_the_other_policies_spread_too(rig_of, policy) -> None:
    rig = await rig_of({"d0": "decode", "d1": "decode"}, policy=policy)
    for _ in range(40):
        await rig.chat()
    assert min(len(engine.seen) for engine in rig.engines.values()) >= 8
