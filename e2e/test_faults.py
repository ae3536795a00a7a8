"""What dies comes back, and requests get an answer or a clear error meanwhile."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from broadbeam_crds.conventions import SUPERVISOR_PORT
from cluster import Answer, Cluster, Object, Serving, eventually
from installation import ACCOUNT, RELEASE, SYSTEM
from manifests import namespace, simulated

NAMESPACE = "e2e-faults"
WRITES = {"create", "update", "patch", "delete", "deletecollection"}


@pytest.fixture(scope="module")
def running(operator: Cluster) -> Iterator[Serving]:
    operator.apply(namespace(NAMESPACE))
    # 30 ms a token, so that there is time to kill something while an answer is on its way.
    operator.apply(simulated(NAMESPACE, decodeBase="30ms"))
    yield operator.serving(NAMESPACE, "sim")
    operator.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


@pytest.fixture
def sim(running: Serving) -> Serving:
    """The cluster at rest, whatever the test before has done to it."""
    running.wait_available()
    return running


def only_pod(sim: Serving, pool: str) -> str:
    (pod,) = sim.pods(pool=pool)
    return str(pod["metadata"]["name"])


def restarts(sim: Serving, pod: str) -> int:
    found = {p["metadata"]["name"]: p for p in sim.pods()}
    return int(found[pod]["status"]["containerStatuses"][0]["restartCount"])


@contextmanager
def recovery(sim: Serving, pod: str) -> Iterator[None]:
    """Around what kills a process of `pod`: its container starts anew, and the cluster is Available again."""
    before = restarts(sim, pod), since(sim)
    yield
    eventually(lambda: restarts(sim, pod) > before[0], 30, "the container restarts")
    eventually(lambda: since(sim) != before[1], 30, "the operator sees it")
    sim.wait_available()


def since(sim: Serving) -> str:
    """When Available changed last."""
    return str((sim.condition("Available") or {})["lastTransitionTime"])


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_a_killed_rank_restarts_its_group(sim: Serving, pool: str) -> None:
    pod = only_pod(sim, pool)

    with recovery(sim, pod):
        assert sim.signal(pod, signal.SIGKILL) > 0

    assert sim.ask("Back again?").status == 200


def test_a_decode_process_killed_under_load_gives_an_answer_or_a_clear_error(sim: Serving) -> None:
    pod = only_pod(sim, "decode")
    with recovery(sim, pod), ThreadPoolExecutor(8) as clients:
        answers = [
            clients.submit(sim.ask, f"Question {n}", max_tokens=64, stream=bool(n % 2)) for n in range(8)
        ]
        eventually(lambda: sim.metric(pod, SUPERVISOR_PORT, "vllm:num_requests_running") == 8, 30, "load")
        sim.signal(pod, signal.SIGKILL)
        outcomes = [answer.result() for answer in answers]

    for outcome in outcomes:
        assert is_whole(outcome) or clear_error(outcome), outcome
    assert is_whole(sim.ask("And now?", stream=True))


def is_whole(answer: Answer) -> bool:
    """The answer a client asked for, to its last token."""
    if answer.status != 200:
        return False
    if "text/event-stream" in answer.headers["Content-Type"]:
        return answer.body.rstrip().endswith("data: [DONE]") and '"error"' not in answer.body
    return bool(answer.json["choices"][0]["finish_reason"] == "length")


def clear_error(answer: Answer) -> bool:
    """An error object with a message, as the whole answer or as the last event of a stream."""
    lines = [line for line in answer.body.splitlines() if line.strip() and "[DONE]" not in line]
    last = json.loads(lines[-1].removeprefix("data: ") if answer.status == 200 else answer.body)
    return bool(last.get("error", {}).get("message"))


def test_a_prefill_process_killed_between_the_legs_does_not_cost_the_answer(sim: Serving) -> None:
    prompt = "Which way does the current set at slack water?"
    wanted = sim.ask(prompt).json["choices"][0]["text"]
    prefill, decode = only_pod(sim, "prefill"), only_pod(sim, "decode")
    done = finished(sim, prefill)

    with recovery(sim, prefill), ThreadPoolExecutor(1) as client:
        sim.signal(decode, signal.SIGSTOP)
        answer = client.submit(sim.ask, prompt)
        eventually(lambda: finished(sim, prefill) > done, 10, "the prefill leg is over")
        sim.signal(prefill, signal.SIGKILL)
        sim.signal(decode, signal.SIGCONT)

        assert answer.result().status == 200, answer.result().body
        assert answer.result().json["choices"][0]["text"] == wanted


def finished(sim: Serving, pod: str) -> float:
    return sim.metric(pod, SUPERVISOR_PORT, "vllm:request_success_total")


def test_the_cluster_answers_while_the_operator_is_away_and_nothing_is_done_twice(sim: Serving) -> None:
    sim.ask("Is there a current?")
    eventually(lambda: (sim.condition("KVTransferEffective") or {}).get("status") == "True", 30, "KV moves")
    before = versions(sim)
    answered = Repeated(sim)
    (old,) = operator_pods(sim.cluster)

    with answered:
        sim.cluster.kubectl("delete", "pod", old, f"--namespace={SYSTEM}")
        rollout = ("rollout", "status", f"deployment/{RELEASE}", f"--namespace={SYSTEM}", "--timeout=60s")
        sim.cluster.kubectl(*rollout)
    (new,) = operator_pods(sim.cluster)

    assert new != old
    assert answered.statuses == {200}
    if sim.cluster.is_ours:
        eventually(lambda: reads(sim, new), 30, "a pass of the new operator")
        seen = len(reads(sim, new))
        eventually(lambda: len(reads(sim, new)) > seen, 30, "a further pass")
        assert writes(sim, new) == []
    assert versions(sim) == before


def test_what_changed_while_the_operator_was_away_is_made_up_for(sim: Serving) -> None:
    scale = ("scale", f"deployment/{RELEASE}", f"--namespace={SYSTEM}")
    sim.cluster.kubectl(*scale, "--replicas=0")
    eventually(lambda: not operator_pods(sim.cluster), 30, "the operator is gone")

    sim.patch({"op": "replace", "path": "/spec/pools/0/groups", "value": 2})
    sim.kubectl("delete", "service", f"{sim.name}-decode-0")
    sim.cluster.kubectl(*scale, "--replicas=1")

    assert sim.wait_available()["summary"]["prefill"] == "2/2"
    sim.kubectl("get", "service", f"{sim.name}-decode-0")


def test_deletion_leaves_nothing_behind(sim: Serving) -> None:
    sim.delete()

    eventually(lambda: not sim.leftovers(), 60, "all children gone")


def operator_pods(cluster: Cluster) -> list[str]:
    selector = "--selector=app.kubernetes.io/component=operator"
    names = "--output=jsonpath={.items[*].metadata.name}"
    return cluster.kubectl("get", "pods", f"--namespace={SYSTEM}", selector, names).split()


def versions(sim: Serving) -> dict[str, str]:
    """uid -> resourceVersion of the ServingCluster and all children but pods."""
    kinds = "servingclusters,statefulsets,services,configmaps,serviceaccounts,roles,rolebindings"
    found = json.loads(sim.kubectl("get", f"{kinds},poddisruptionbudgets", "--output=json"))["items"]
    return {obj["metadata"]["uid"]: obj["metadata"]["resourceVersion"] for obj in found}


def requests_of(sim: Serving, pod: str) -> list[Object]:
    """What an operator's pod has asked about the namespace, from the audit log."""
    assert sim.cluster.audit_log is not None
    events = [json.loads(line) for line in sim.cluster.audit_log.read_text().splitlines()]
    key = "authentication.kubernetes.io/pod-name"
    return [
        event
        for event in events
        if event["user"]["username"] == ACCOUNT
        and event["user"]["extra"][key] == [pod]
        and event.get("objectRef", {}).get("namespace") == NAMESPACE
    ]


def reads(sim: Serving, pod: str) -> list[Object]:
    """Passes over our ServingCluster."""
    return [
        event
        for event in requests_of(sim, pod)
        if event["verb"] == "get" and event["objectRef"]["resource"] == "servingclusters"
    ]


def writes(sim: Serving, pod: str) -> list[str]:
    return [
        f"{event['verb']} {event['objectRef']['resource']}/{event['objectRef'].get('name')}"
        for event in requests_of(sim, pod)
        if event["verb"] in WRITES
    ]


class Repeated:
    """Asks one question after the other while it is entered."""

    def __init__(self, sim: Serving) -> None:
        self.statuses: set[int] = set()
        self._sim = sim
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._stop.is_set():
            self.statuses.add(self._sim.ask("Who is at the helm?").status)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
