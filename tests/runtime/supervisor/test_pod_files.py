"""Names to addresses, and several metric pages as one."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from broadbeam_runtime import resolve
from broadbeam_runtime.exposition import merge

HOSTS = "# pods\n127.77.0.2 a-0.a.ns.svc a-0  # the first\n127.77.0.3\ta-1.a.ns.svc\n\n"


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("a-0.a.ns.svc", "127.77.0.2"),
        ("a-0", "127.77.0.2"),
        ("a-1.a.ns.svc", "127.77.0.3"),
        ("10.1.2.3", "10.1.2.3"),
        ("::1", "::1"),
        ("localhost", "127.0.0.1"),
    ],
)
def test_the_hosts_file_comes_before_dns(tmp_path: Path, name: str, address: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(HOSTS)
    found = resolve.resolve(name, str(path))
    assert found == address or (name, found) == ("localhost", "::1")


def test_a_name_may_come_late(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            path.write_text(HOSTS)

    assert resolve.wait_for("a-1.a.ns.svc", str(path), 10, sleep, lambda: sum(slept)) == "127.77.0.3"
    with pytest.raises(resolve.ResolveError, match=r"z\.invalid: no address in .*hosts or DNS after 1 s"):
        resolve.wait_for("z.invalid", str(path), 1, slept.append, lambda: sum(slept))


def test_pages_merge_into_one_that_parses() -> None:
    page = (
        '# HELP a_total Things.\n# TYPE a_total counter\na_total{{engine="{0}"}} {0}\n'
        '# TYPE b gauge\nb{{engine="{0}"}} 1\n'
    )
    merged = merge([page.format(1), page.format(2)])
    assert merged.count("# TYPE a_total") == merged.count("# HELP a_total") == 1
    families = {family.name: family.samples for family in text_string_to_metric_families(merged)}
    assert [sample.labels["engine"] for sample in families["a"]] == ["1", "2"]
    assert len(families["b"]) == 2


def test_no_pages_make_an_empty_one() -> None:
    assert merge([]) == ""
