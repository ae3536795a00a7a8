"""Why a pod is not merely starting, in a few words."""

from __future__ import annotations

import pytest

from broadbeam_operator.pods import trouble


def container(**fields):
    return {"phase": "Running", "containerStatuses": [{"name": "engine", "ready": False, **fields}]}


EXIT = {"exitCode": 3, "message": "loading\nmodel.gguf: truncated at byte 512\n"}


@pytest.mark.parametrize(
    ("status", "words"),
    [
        pytest.param({}, None, id="just made"),
        pytest.param(container(state={"waiting": {"reason": "ContainerCreating"}}), None, id="being made"),
        pytest.param(container(state={"running": {}}, restartCount=0), None, id="starting"),
        pytest.param(
            container(state={"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}),
            "ImagePullBackOff (no such image)",
            id="no image",
        ),
        pytest.param(
            container(
                state={"waiting": {"reason": "CrashLoopBackOff"}},
                lastState={"terminated": EXIT},
                restartCount=2,
            ),
            "CrashLoopBackOff (exit code 3, model.gguf: truncated at byte 512)",
            id="crashing, with its last words",
        ),
        pytest.param(
            container(state={"running": {}}, lastState={"terminated": {"exitCode": 137}}, restartCount=1),
            "restarted (exit code 137)",
            id="killed and starting again",
        ),
        pytest.param({"phase": "Failed", "reason": "Evicted"}, "Evicted", id="evicted"),
        pytest.param(
            {
                "phase": "Pending",
                "conditions": [
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": "0/3 nodes have nvidia.com/gpu",
                    }
                ],
            },
            "Unschedulable: 0/3 nodes have nvidia.com/gpu",
            id="no room",
        ),
        pytest.param(
            {
                "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": [{"ready": True, "restartCount": 4, "lastState": {"terminated": EXIT}}],
            },
            None,
            id="recovered",
        ),
    ],
)
def test_trouble_is_named(status, words):
    assert trouble({"metadata": {}, "status": status}) == words
