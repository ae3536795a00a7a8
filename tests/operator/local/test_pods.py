"""Real processes: small Python scripts as containers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from broadbeam_operator.local.container import Backoff
from broadbeam_operator.local.environment import Manifest, Sources
from broadbeam_operator.local.pods import Node, PodProcess, PodRunner, open_runner

IP = "127.77.250.1"


class World:
    """A runner, the objects its pods may look up, and scripts as containers."""

    def __init__(self, runner: PodRunner, tmp_path: Path, objects: dict[tuple[str, str], Manifest]) -> None:
        self.runner = runner
        self.tmp_path = tmp_path
        self.objects = objects

    def container(self, script: str, name: str = "main", **fields: Any) -> dict[str, Any]:
        path = self.tmp_path / f"{name}-{len(list(self.tmp_path.iterdir()))}.py"
        path.write_text(textwrap.dedent(script))
        return {"name": name, "command": [sys.executable, str(path)], **fields}

    def start(self, *containers: dict[str, Any], **spec: Any) -> PodProcess:
        metadata = {
            "name": "p-0",
            "namespace": "ns",
            "uid": "1",
            "labels": {"apps.kubernetes.io/pod-index": "3"},
            "annotations": {"a.b/c": "note"},
        }
        manifest = {"metadata": metadata, "spec": {"containers": list(containers), **spec}}
        return self.runner.start(manifest, IP, changed=lambda pod: None)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    objects: dict[tuple[str, str], Manifest] = {}

    async def config_map(namespace: str, name: str) -> Manifest | None:
        return objects.get(("configmap", name))

    async def secret(namespace: str, name: str) -> Manifest | None:
        return objects.get(("secret", name))

    node = Node(
        name="laptop",
        root=tmp_path / "pods",
        sources=Sources(config_map, secret),
        bin_dir=Path(sys.executable).parent,
        inherited={"PATH": os.environ["PATH"]},
        imposed={"FROM_NODE": "imposed"},
        backoff=Backoff(first_s=0.05, limit_s=0.2, healthy_s=30),
    )
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    async with open_runner(node) as runner:
        yield World(runner, scripts, objects)


async def until(condition: Callable[[], Any]) -> Any:
    async with asyncio.timeout(20):
        while not (value := condition()):
            await asyncio.sleep(0.01)
    return value


def state(pod: PodProcess, index: int = 0) -> dict[str, Any]:
    return pod.status()["containerStatuses"][index]["state"]


def waiting(pod: PodProcess, index: int = 0) -> str:
    return state(pod, index).get("waiting", {}).get("reason", "")


def true_conditions(pod: PodProcess) -> set[str]:
    return {c["type"] for c in pod.status()["conditions"] if c["status"] == "True"}


def is_ready(pod: PodProcess) -> bool:
    return "Ready" in true_conditions(pod)


def output(pod: PodProcess, container: str = "main") -> str:
    path = pod.ended_logs()[container]
    return path.read_text() if path.exists() else ""


PRINT_ENVIRONMENT = "import json, os; print(json.dumps(dict(os.environ)))"
SLEEP = "import time; print('up', flush=True); time.sleep(100)"


async def test_a_container_sees_the_environment_that_its_manifest_asks_for(world: World) -> None:
    world.objects["configmap", "settings"] = {"kind": "ConfigMap", "data": {"color": "blue", "size": "9"}}
    world.objects["secret", "keys"] = {"type": "Opaque", "data": {"token": "c2VjcmV0"}}
    env = [
        {"name": "PLAIN", "value": "a"},
        {"name": "EXPANDED", "value": "$(PLAIN)-$(S_size)-$(LATER)-$$(PLAIN)"},
        {"name": "LATER", "value": "x"},
        {"name": "COLOR", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "color"}}},
        {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "token"}}},
        {"name": "NONE", "valueFrom": {"secretKeyRef": {"name": "no", "key": "k", "optional": True}}},
        {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {
            "name": "INDEX",
            "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['apps.kubernetes.io/pod-index']"}},
        },
        {"name": "NOTE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['a.b/c']"}}},
        {"name": "CPUS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
        {"name": "FROM_NODE", "value": "the pod's own"},
    ]
    env_from = [{"prefix": "S_", "configMapRef": {"name": "settings"}}]
    container = world.container(
        PRINT_ENVIRONMENT, env=env, envFrom=env_from, resources={"limits": {"cpu": "1500m"}}
    )
    pod = world.start(container, restartPolicy="Never")
    await pod.wait()
    seen = json.loads(output(pod))
    wanted = {
        "PLAIN": "a",
        "EXPANDED": "a-9-$(LATER)-$(PLAIN)",
        "COLOR": "blue",
        "TOKEN": "secret",
        "NAME": "p-0",
        "NAMESPACE": "ns",
        "IP": IP,
        "NODE": "laptop",
        "INDEX": "3",
        "NOTE": "note",
        "CPUS": "2",
        "S_color": "blue",
        "FROM_NODE": "imposed",
    }
    assert wanted.items() <= seen.items()
    assert "NONE" not in seen
    assert pod.status()["phase"] == "Succeeded"


async def test_volumes_lie_where_the_rewritten_paths_say(world: World, tmp_path: Path) -> None:
    world.objects["configmap", "engine"] = {"data": {"engine.json": "{}", "other": "o"}}
    world.objects["secret", "keys"] = {"data": {"k": "c2VjcmV0"}}
    script = """
        import os, sys
        for argument in sys.argv[1:]:
            name, _, path = argument.partition("=")
            print(name, "|".join(sorted(os.listdir(path))) if os.path.isdir(path) else open(path).read())
        open(os.environ["SCRATCH"] + "/new", "w").write("x")
        """
    mounts = {"engine": "/etc/broadbeam", "keys": "/etc/broadbeam-keys", "all": "/var/all", "facts": "/facts"}
    container = world.container(
        script,
        args=["a=/etc/broadbeam/engine.json", "b=/etc/broadbeam-keys/k", "c=/var/all", "d=/facts/labels"],
        env=[{"name": "SCRATCH", "value": "/scratch"}],
        volumeMounts=[{"name": name, "mountPath": path} for name, path in mounts.items()]
        + [{"name": "scratch", "mountPath": "/scratch"}, {"name": "host", "mountPath": "/host"}],
    )
    container["args"].append("e=/host/file")
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "file").write_text("of the host")
    downward = {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}
    pod = world.start(
        container,
        restartPolicy="Never",
        volumes=[
            {
                "name": "engine",
                "configMap": {"name": "engine", "items": [{"key": "engine.json", "path": "engine.json"}]},
            },
            {"name": "keys", "secret": {"secretName": "keys"}},
            {
                "name": "all",
                "projected": {"sources": [{"configMap": {"name": "engine"}}, {"secret": {"name": "keys"}}]},
            },
            {"name": "facts", "downwardAPI": downward},
            {"name": "scratch", "emptyDir": {}},
            {"name": "host", "hostPath": {"path": str(tmp_path / "host")}},
        ],
    )
    await pod.wait()
    assert output(pod).splitlines() == [
        "a {}",
        "b secret",
        "c engine.json|k|other",
        'd apps.kubernetes.io/pod-index="3"',
        "e of the host",
    ]
    assert (pod.root / "volumes" / "scratch" / "new").exists()


async def test_a_pod_waits_for_its_config_map_and_says_so(world: World) -> None:
    ref = {"configMapKeyRef": {"name": "late", "key": "k"}}
    pod = world.start(world.container(SLEEP, env=[{"name": "K", "valueFrom": ref}]))
    await until(lambda: waiting(pod) == "CreateContainerConfigError")
    assert state(pod)["waiting"]["message"] == 'configmap "late" not found'
    assert pod.status()["phase"] == "Pending"
    world.objects["configmap", "late"] = {"data": {"k": "v"}}
    await until(lambda: "running" in state(pod))
    assert pod.status()["phase"] == "Running"


async def test_init_containers_run_in_turn_before_the_others(world: World) -> None:
    trace = world.tmp_path / "trace"
    write = f"open({str(trace)!r}, 'a').write('{{}} ')"
    fails_once = f"""
        import os, sys
        open({str(trace)!r}, 'a').write('first ')
        sys.exit(0 if open({str(trace)!r}).read().count('first') > 1 else 1)
        """
    pod = world.start(
        world.container(write.format("main"), name="main"),
        restartPolicy="OnFailure",
        initContainers=[
            world.container(fails_once, name="a"),
            world.container(write.format("second"), name="b"),
        ],
    )
    assert "Initialized" not in true_conditions(pod)
    await pod.wait()
    assert trace.read_text() == "first first second main "
    assert pod.status()["initContainerStatuses"][0]["restartCount"] == 1
    assert "Initialized" in true_conditions(pod)


async def test_a_container_that_keeps_crashing_is_restarted_ever_more_slowly(world: World) -> None:
    pod = world.start(world.container("print('my last words'); raise SystemExit(3)"))
    await until(lambda: waiting(pod) == "CrashLoopBackOff")
    status = pod.status()["containerStatuses"][0]
    assert status["restartCount"] == 1
    assert status["lastState"]["terminated"]["exitCode"] == 3
    assert pod.last_words("main") == ["my last words"]
    assert pod.status()["phase"] == "Running"
    await until(lambda: pod.status()["containerStatuses"][0]["restartCount"] >= 4)


def test_back_off_doubles_up_to_its_limit() -> None:
    backoff = Backoff(first_s=1, limit_s=300)
    assert [backoff.delay_s(n) for n in (1, 2, 3, 4, 10, 11, 1000)] == [0, 1, 2, 4, 256, 300, 300]


async def test_a_failing_container_is_not_restarted_against_its_policy(world: World) -> None:
    pod = world.start(
        world.container(
            "print('why'); raise SystemExit(7)", terminationMessagePolicy="FallbackToLogsOnError"
        ),
        restartPolicy="Never",
    )
    await pod.wait()
    assert pod.status()["phase"] == "Failed"
    ended = state(pod)["terminated"]
    assert (ended["exitCode"], ended["reason"], ended["message"]) == (7, "Error", "why")


async def test_a_command_that_does_not_exist_is_a_start_error(world: World) -> None:
    pod = world.start({"name": "main", "command": ["no-such-program"]}, restartPolicy="Never")
    await pod.wait()
    assert state(pod)["terminated"]["reason"] == "StartError"
    assert pod.last_words("main") == ["no-such-program: No such file or directory"]


async def test_a_command_without_slash_is_the_running_installations(world: World) -> None:
    pod = world.start(
        {"name": "main", "command": ["python", "-c", "import sys; print(sys.prefix)"]}, restartPolicy="Never"
    )
    await pod.wait()
    assert output(pod).strip() == sys.prefix


SERVER = """
    import http.server, os, sys
    port, flags = int(sys.argv[1]), sys.argv[2]
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            ok = os.path.exists(f"{flags}/{self.path[1:]}")
            self.send_response(200 if ok else 503)
            self.end_headers()
        def log_message(self, *args): pass
    class Server(http.server.HTTPServer):
        allow_reuse_address = True
    Server((os.environ["IP"], port), Handler).serve_forever()
    """


def server(world: World, flags: Path, **fields: Any) -> dict[str, Any]:
    ip = {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    ports = [{"name": "http", "containerPort": 18080}]
    return world.container(SERVER, args=["18080", str(flags)], env=[ip], ports=ports, **fields)


def get(path: str, **fields: Any) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": "http"}, "periodSeconds": 0.05, **fields}


async def test_readiness_follows_its_probe_and_the_gates(world: World, tmp_path: Path) -> None:
    flags = tmp_path / "flags"
    flags.mkdir()
    pod = world.start(
        server(world, flags, readinessProbe=get("/ready", failureThreshold=1)),
        readinessGates=[{"conditionType": "example.com/joined"}],
    )
    await until(lambda: "running" in state(pod))
    assert "ContainersReady" not in true_conditions(pod)
    (flags / "ready").touch()
    await until(lambda: "ContainersReady" in true_conditions(pod))
    assert not is_ready(pod)
    pod.set_gates({"example.com/joined": True})
    assert is_ready(pod)
    (flags / "ready").unlink()
    await until(lambda: not is_ready(pod))
    assert pod.status()["containerStatuses"][0]["restartCount"] == 0


async def test_a_start_up_probe_holds_the_others_back_and_a_failed_liveness_probe_restarts(
    world: World, tmp_path: Path
) -> None:
    flags = tmp_path / "flags"
    flags.mkdir()
    container = server(
        world,
        flags,
        startupProbe=get("/started", failureThreshold=10_000),
        livenessProbe=get("/alive", failureThreshold=2, terminationGracePeriodSeconds=5),
    )
    pod = world.start(container)
    await until(lambda: "running" in state(pod))
    await asyncio.sleep(0.3)  # long enough for the liveness probe to have failed twice, were it running
    status = pod.status()["containerStatuses"][0]
    assert (status["restartCount"], status["started"], status["ready"]) == (0, False, False)
    (flags / "alive").touch()
    (flags / "started").touch()
    await until(lambda: is_ready(pod))
    (flags / "alive").unlink()
    await until(lambda: pod.status()["containerStatuses"][0]["restartCount"] >= 1)
    ended = pod.status()["containerStatuses"][0]["lastState"]["terminated"]
    assert ended["exitCode"] == 128 + signal.SIGTERM
    log = pod.root / "logs" / "main" / "0.log"
    assert "liveness probe failed: HTTP 503" in log.read_text()


async def test_a_start_up_probe_that_never_succeeds_restarts_the_container(world: World) -> None:
    probe = {"tcpSocket": {"port": 1}, "periodSeconds": 0.01, "failureThreshold": 2}
    pod = world.start(world.container(SLEEP, startupProbe=probe))
    await until(lambda: pod.status()["containerStatuses"][0]["restartCount"] >= 1)


async def test_an_exec_probe_runs_beside_the_container(world: World, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    command = [sys.executable, "-c", f"import os,sys; sys.exit(not os.path.exists({str(flag)!r}))"]
    pod = world.start(
        world.container(
            SLEEP, readinessProbe={"exec": {"command": command}, "periodSeconds": 0.05, "timeoutSeconds": 10}
        )
    )
    await until(lambda: "running" in state(pod))
    assert not is_ready(pod)
    flag.touch()
    await until(lambda: is_ready(pod))


async def test_a_probe_this_node_cannot_run_is_named(world: World) -> None:
    pod = world.start(world.container(SLEEP, livenessProbe={"grpc": {"port": 1}}))
    await until(lambda: waiting(pod) == "CreateContainerConfigError")
    assert state(pod)["waiting"]["message"] == "this node runs httpGet, tcpSocket, exec probes only"


async def test_stopping_is_graceful_hook_first(world: World) -> None:
    trace = world.tmp_path / "trace"
    script = f"""
        import signal, sys, time
        def stop(*_):
            open({str(trace)!r}, 'a').write('term ')
            sys.exit(0)
        signal.signal(signal.SIGTERM, stop)
        print('up', flush=True)
        time.sleep(100)
        """
    hook = {"exec": {"command": [sys.executable, "-c", f"open({str(trace)!r}, 'a').write('hook ')"]}}
    pod = world.start(world.container(script, lifecycle={"preStop": hook}))
    await until(lambda: "up" in output(pod))
    await pod.stop()
    assert trace.read_text() == "hook term "
    assert state(pod)["terminated"]["exitCode"] == 0
    assert pod.status()["phase"] == "Succeeded"


async def test_a_container_that_ignores_sigterm_is_killed_with_all_its_children(world: World) -> None:
    pod = world.start(world.container(STUBBORN_PARENT))
    children = await until(lambda: output(pod).split() if output(pod).count("\n") == 2 else None)
    await pod.stop(grace_s=0.2)
    assert state(pod)["terminated"]["exitCode"] == 128 + signal.SIGKILL
    await until(lambda: not any(alive(int(pid)) for pid in children))


async def test_stopping_a_pod_in_back_off_or_waiting_for_its_config_ends_at_once(world: World) -> None:
    crashing = world.start(world.container("raise SystemExit(1)"))
    await until(lambda: waiting(crashing) == "CrashLoopBackOff")
    await crashing.stop()
    volumes = [{"name": "v", "configMap": {"name": "never"}}]
    unready = world.start(world.container(SLEEP), volumes=volumes)
    await until(lambda: waiting(unready) == "CreateContainerConfigError")
    await unready.stop()
    assert [each.status()["containerStatuses"][0]["containerID"] for each in (crashing, unready)] == ["", ""]


# Ignores SIGTERM, and so does its child in a session of its own; both print their process id.
STUBBORN_PARENT = """
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(os.getpid(), flush=True)
    if len(sys.argv) == 1:
        subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
    time.sleep(100)
    """


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


NODE = """
    import asyncio, os, sys
    from pathlib import Path
    from broadbeam_operator.local.environment import Sources
    from broadbeam_operator.local.pods import Node, open_runner

    async def nothing(namespace, name):
        return None

    async def main():
        node = Node("n", Path(sys.argv[1]), Sources(nothing, nothing), Path(sys.executable).parent)
        async with open_runner(node) as runner:
            container = {"name": "main", "command": [sys.executable, sys.argv[2]]}
            manifest = {"metadata": {"name": "p"}, "spec": {"containers": [container]}}
            pod = runner.start(manifest, "127.77.250.2", changed=lambda pod: None)
            await asyncio.sleep(100)

    asyncio.run(main())
    """


async def test_killing_the_node_outright_leaves_no_child_and_no_grandchild(tmp_path: Path) -> None:
    (tmp_path / "node.py").write_text(textwrap.dedent(NODE))
    (tmp_path / "parent.py").write_text(textwrap.dedent(STUBBORN_PARENT))
    arguments = [str(tmp_path / "node.py"), str(tmp_path / "root"), str(tmp_path / "parent.py")]
    node = await asyncio.create_subprocess_exec(sys.executable, *arguments)
    log = tmp_path / "root" / "default" / "p.0" / "logs" / "main" / "0.log"
    pids = await until(lambda: log.exists() and log.read_text().count("\n") == 2 and log.read_text().split())
    assert all(alive(int(pid)) for pid in pids)
    node.kill()
    await node.wait()
    await until(lambda: not any(alive(int(pid)) for pid in pids))
