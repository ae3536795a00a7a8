"""Events on transitions, and only on those."""

from __future__ import annotations

import pytest

from broadbeam_operator.transitions import transitions


def status(**conditions: str):
    """Accepted="True" or Accepted="False: why"."""
    found = []
    for kind, text in conditions.items():
        word, _, message = text.partition(": ")
        found.append({"type": kind, "status": word, "message": message})
    return {"conditions": found}


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        pytest.param(
            {}, status(Accepted="True", Progressing="True"), ["Accepted", "Progressing"], id="begun"
        ),
        pytest.param({}, status(Available="False", Degraded="False"), [], id="a beginning without news"),
        pytest.param({}, status(Accepted="False: no"), ["NotAccepted"], id="refused at once"),
        pytest.param(status(Available="False"), status(Available="True"), ["Available"], id="up"),
        pytest.param(status(Available="True"), status(Available="False"), ["NotAvailable"], id="down"),
        pytest.param(status(Degraded="False"), status(Degraded="True"), ["Degraded"], id="degraded"),
        pytest.param(status(Degraded="True"), status(Degraded="False"), ["Recovered"], id="recovered"),
        pytest.param(status(Progressing="True"), status(Progressing="False"), ["Complete"], id="complete"),
        pytest.param(status(Degraded="True: a"), status(Degraded="True: b"), [], id="another detail"),
        pytest.param(
            status(Accepted="False: a"), status(Accepted="False: b"), ["NotAccepted"], id="another mistake"
        ),
        pytest.param(status(Accepted="False: a"), status(Accepted="False: a"), [], id="the same mistake"),
        pytest.param(
            status(KVTransferEffective="Unknown"), status(KVTransferEffective="True"), [], id="silent"
        ),
    ],
)
def test_events_tell_of_transitions(before, after, told):
    assert [each.reason for each in transitions(before, after)] == told


@pytest.mark.parametrize(
    ("after", "severity"),
    [
        (status(Accepted="False: no"), "Warning"),
        (status(Degraded="True"), "Warning"),
        (status(Available="True"), "Normal"),
    ],
    ids=["refused", "degraded", "available"],
)
def test_bad_news_is_a_warning(after, severity):
    assert [each.severity for each in transitions({}, after)] == [severity]
