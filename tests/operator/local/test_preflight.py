from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broadbeam_crds.testing import pool, serving_cluster
from broadbeam_crds.v1alpha1 import ServingCluster
from broadbeam_operator.local.preflight import ThisMachine, look, obstacles

LAPTOP = ThisMachine(
    system="Linux",
    available_bytes=8 * 2**30,
    devices=0,
    commands=frozenset(),
    port_is_free=lambda port: True,
    exists=lambda path: True,
)
GPU_POOL = {
    "name": "decode",
    "role": "both",
    "parallelism": {"data": 2},
    "accelerator": {"resource": "nvidia.com/gpu", "perNode": 2},
}


def cluster(**spec: Any) -> ServingCluster:
    return serving_cluster(**spec)


@pytest.mark.parametrize(
    ("wanted", "machine", "message"),
    [
        pytest.param(
            cluster(),
            replace(LAPTOP, system="Darwin"),
            "local mode needs Linux (addresses 127.77.x.y, PR_SET_PDEATHSIG); this is Darwin",
            id="another system",
        ),
        pytest.param(
            cluster(model={"name": "m", "source": "oci://image", "maxModelLen": 128}),
            LAPTOP,
            "spec.model.source: oci://image needs a cluster; here use file://, hf:// or pypi://",
            id="a model in an image",
        ),
        pytest.param(
            cluster(model={"name": "m", "source": "file:///no/model", "maxModelLen": 128}),
            replace(LAPTOP, exists=lambda path: path != Path("/no/model")),
            "spec.model.source: file:///no/model: there is no such file or folder",
            id="a model that is not there",
        ),
        pytest.param(
            cluster(engine="vllm", pools=[pool("both")]),
            LAPTOP,
            'spec.engine.name: vllm: there is no command "vllm" here; install vLLM or use engine broadbeam',
            id="an engine that is not installed",
        ),
        pytest.param(
            cluster(gateway={"replicas": 0}),
            LAPTOP,
            "spec.gateway.replicas: 0: without a gateway nothing can be asked; set it to 1",
            id="no gateway",
        ),
        pytest.param(
            cluster(
                pools=[pool("both", parallelism={"data": 2}, accelerator={"resource": "cpu", "perNode": 2})]
            ),
            replace(LAPTOP, port_is_free=lambda port: port not in (8001, 9000)),
            "port 8001, 9000: in use on every address of this machine (a server on 0.0.0.0?); "
            "pods need it on theirs: stop that server, or let it listen on 127.0.0.1",
            id="a server on every address",
        ),
        pytest.param(
            cluster(gateway={"auth": {"secretRef": {"name": "keys"}}}),
            LAPTOP,
            "spec.gateway.auth.secretRef.name: keys: no such Secret here; "
            "give its keys with --secret keys=FOLDER",
            id="a missing Secret of the gateway",
        ),
        pytest.param(
            cluster(
                engine={
                    "name": "sim",
                    "env": [{"name": "T", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
                }
            ),
            LAPTOP,
            "spec.engine.env[T].valueFrom.secretKeyRef.name: s: no such Secret here; "
            "give its keys with --secret s=FOLDER",
            id="a missing Secret of the engine",
        ),
        pytest.param(
            cluster(pools=[GPU_POOL]),
            replace(LAPTOP, devices=1),
            "spec.pools[decode].accelerator.resource: nvidia.com/gpu: 2 devices are needed, "
            "this machine has 1",
            id="too few devices",
        ),
        pytest.param(
            cluster(pools=[pool("both", groups=4, kvCache={"memory": "2Gi"})]),
            LAPTOP,
            "not enough memory: the ranks need 9.3 GiB (both 4 x 2.3), 8.0 GiB is available; "
            "lower spec.pools[].kvCache.memory, groups or parallelism.data",
            id="too little memory",
        ),
    ],
)
def test_what_this_machine_cannot_do_is_named(
    wanted: ServingCluster, machine: ThisMachine, message: str
) -> None:
    assert obstacles(wanted, machine, ()) == [message]


@pytest.mark.parametrize(
    ("wanted", "machine", "secrets"),
    [
        pytest.param(cluster(), LAPTOP, (), id="two small ranks"),
        pytest.param(cluster(pools=[GPU_POOL]), replace(LAPTOP, devices=2), (), id="devices enough"),
        pytest.param(
            cluster(gateway={"auth": {"secretRef": {"name": "keys"}}}), LAPTOP, ("keys",), id="a given Secret"
        ),
        pytest.param(
            cluster(engine="sim", pools=[pool("both", groups=4, kvCache={"memory": "64Gi"})]),
            LAPTOP,
            (),
            id="simulated memory",
        ),
    ],
)
def test_what_fits_is_not_refused(
    wanted: ServingCluster, machine: ThisMachine, secrets: tuple[str, ...]
) -> None:
    assert obstacles(wanted, machine, secrets) == []


def test_the_machine_at_hand_has_memory() -> None:
    assert look().available_bytes > 0
