"""The operator has the rights of the chart and no other, and uses each of them. Judged by the audit log of
everything the tests before this one have made it do."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest

from broadbeam_operator.cluster import CHILD_KINDS
from cluster import Cluster, Object
from installation import ACCOUNT, RELEASE

CREATED = 201  # also the answer to a server-side apply of what was not there

Right = tuple[str, str, str]  # group, resource, verb

# What differs from the plan is patched and what is not in it is deleted, of whichever kind it is.
UPKEEP: set[Right] = {
    (kind.api_version.rpartition("/")[0], kind.plural, verb)
    for kind in CHILD_KINDS
    for verb in ("get", "list", "create", "patch", "delete")
}
# Rights that no request shows, each with its reason.
UNUSED: dict[Right, str] = {
    ("serving.broadbeam.io", "servingclusters/finalizers", "update"): (
        "asked for only where the admission plugin OwnerReferencesPermissionEnforcement is on (OpenShift)"
    ),
    ("", "pods", "get"): "given to the gateway, and nobody can give what he lacks",
}


@pytest.fixture(scope="module")
def audited(operator: Cluster) -> list[Object]:
    if operator.audit_log is None:
        pytest.skip("needs the audit log of our own control plane")
    return [json.loads(line) for line in operator.audit_log.read_text().splitlines()]


def rights(rules: Iterable[Object]) -> set[Right]:
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def used(events: Iterable[Object], account: str) -> set[Right]:
    found = set()
    for event in events:
        if event["user"]["username"] == account and "objectRef" in event:
            what = event["objectRef"]
            resource = "/".join(filter(None, (what["resource"], what.get("subresource"))))
            found.add((what.get("apiGroup", ""), resource, event["verb"]))
            if event["verb"] == "patch" and event["responseStatus"].get("code") == CREATED:
                found.add((what.get("apiGroup", ""), resource, "create"))
    return found


def test_no_pod_was_ever_refused(audited: list[Object]) -> None:
    refused = [
        f"{event['user']['username']} {event['verb']} {event['requestURI']}"
        for event in audited
        if event["user"]["username"].startswith("system:serviceaccount:")
        and event.get("responseStatus", {}).get("code") in (401, 403)
        # A namespace on its way out refuses new objects.
        and "being terminated" not in event["responseStatus"].get("message", "")
    ]

    assert refused == []


def test_every_right_of_the_operator_is_used(operator: Cluster, audited: list[Object]) -> None:
    role = operator.get(f"/apis/rbac.authorization.k8s.io/v1/clusterroles/{RELEASE}")
    assert role is not None

    granted = rights(role["rules"])

    assert granted - used(audited, ACCOUNT) - UPKEEP == set(UNUSED)


def test_engines_have_no_rights_at_all(operator: Cluster, audited: list[Object]) -> None:
    engines = {
        event["user"]["username"] for event in audited if event["user"]["username"].endswith("-engine")
    }

    assert engines == set()
