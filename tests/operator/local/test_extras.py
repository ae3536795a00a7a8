"""Each image installs one extra, and what its process imports is in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tests.operator.local.desk import PROMPT, Desk

EXTRA_OF = {"broadbeam[-_]router": "router", "broadbeam[-_]runtime": "sim", "": "operator"}  # by command line

# Python imports a module of this name before the program, in every process of the cluster.
SITECUSTOMIZE = """
import re, sys
EXTRA_OF, REFUSED = {extra_of!r}, {refused!r}
extra = next(extra for program, extra in EXTRA_OF.items() if re.search(program, " ".join(sys.orig_argv)))
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED[extra]:
            raise ModuleNotFoundError(f"{{name}} is not in extra {{extra}}", name=name)
sys.meta_path.insert(0, Refuse())
"""


def requirements(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What a distribution asks for with these extras."""
    for text in metadata.requires(name) or ():
        found = Requirement(text)
        if found.marker is None or any(found.marker.evaluate({"extra": e}) for e in extras | {""}):
            yield found


def closure(extra: str) -> set[str]:
    """The distributions that are installed with `broadbeam[extra]`."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(f"broadbeam[{extra}]")]
    while waiting:
        wanted = waiting.pop()
        each = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if each not in seen:
            seen.add(each)
            waiting += requirements(*each)
    return {name for name, _ in seen}


def refused(extra: str) -> set[str]:
    """Modules that are here, but not where only `extra` is installed."""
    there = closure(extra)
    return {
        module
        for module, owners in metadata.packages_distributions().items()
        if not there & {canonicalize_name(owner) for owner in owners}
    }


@pytest.mark.parametrize("extra", EXTRA_OF.values())
def test_an_image_names_an_extra_that_has_no_torch(extra: str) -> None:
    assert "torch" in refused(extra)
    assert "msgspec" not in refused(extra)


async def test_a_rehearsal_runs_where_each_process_has_its_own_extra_alone(desk: Desk) -> None:
    modules = {extra: refused(extra) for extra in EXTRA_OF.values()}
    text = SITECUSTOMIZE.format(extra_of=EXTRA_OF, refused=modules)
    (desk.folder / "sitecustomize.py").write_text(text)
    words = ("--prompt", PROMPT, "--max-tokens", "4")
    command = await desk.start("demo", desk.manifest(), *words, environment={"PYTHONPATH": str(desk.folder)})
    assert await command.end() == 0, command.text
    assert re.search(r"generated +4 tokens", command.text)
