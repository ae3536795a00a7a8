from __future__ import annotations

from typing import Any, cast

import pytest

from broadbeam_crds.conventions import LABEL_COMPONENT
from broadbeam_operator.cluster import Object
from broadbeam_operator.local.addresses import AddressRange
from broadbeam_operator.local.pods import PodProcess
from broadbeam_operator.local.session import Placement


def pod(component: str = "engine", **limits: Any) -> Object:
    return {
        "metadata": {"labels": {LABEL_COMPONENT: component}},
        "spec": {"containers": [{"resources": {"limits": limits}}]},
    }


class Gone:
    """As much of a pod as a release looks at."""

    def __init__(self, ip: str) -> None:
        self.ip = ip


@pytest.fixture
def placement() -> Placement:
    return Placement(AddressRange(3), "127.0.0.1", {"HOSTS": "h"}, ("0", "1", "2", "3"))


def test_the_first_gateway_has_the_address_people_expect(placement: Placement) -> None:
    places = [placement.place(pod(kind))[0] for kind in ("engine", "gateway", "gateway")]
    assert places == ["127.77.3.1", "127.0.0.1", "127.77.3.2"]
    placement.release(cast(PodProcess, Gone("127.0.0.1")))
    assert placement.place(pod("gateway"))[0] == "127.0.0.1"


def test_devices_are_given_to_one_pod_at_a_time(placement: Placement) -> None:
    gpus = pod(**{"nvidia.com/gpu": "2"})
    assert placement.place(gpus) == ("127.77.3.1", {"HOSTS": "h", "CUDA_VISIBLE_DEVICES": "0,1"})
    assert placement.place(gpus)[1]["CUDA_VISIBLE_DEVICES"] == "2,3"
    placement.release(cast(PodProcess, Gone("127.77.3.1")))
    assert placement.place(pod(**{"nvidia.com/gpu": 1})) == (
        "127.77.3.1",
        {"HOSTS": "h", "CUDA_VISIBLE_DEVICES": "0"},
    )
    assert placement.place(pod(cpu="2"))[1] == {"HOSTS": "h"}
