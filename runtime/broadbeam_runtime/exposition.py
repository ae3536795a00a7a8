"""Several Prometheus pages as one: each family's HELP and TYPE once, its samples together."""

from __future__ import annotations

from collections.abc import Iterable


def merge(pages: Iterable[str]) -> str:
    """The families of all `pages` in order of first appearance; samples must differ in a label."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for page in pages:
        family = ""
        for line in page.splitlines():
            if line.startswith("# "):
                family = _family(line, heads, samples) or family
            elif line:
                samples.setdefault(family, []).append(line)
    lines = [line for family in samples for line in (*heads.get(family, ()), *samples[family])]
    return "\n".join(lines) + "\n" if lines else ""


def _family(line: str, heads: dict[str, list[str]], samples: dict[str, list[str]]) -> str | None:
    """The family that a HELP or TYPE line opens; other comments open none and are dropped."""
    words = line.split(" ", 3)
    if len(words) < 3 or words[1] not in ("HELP", "TYPE"):
        return None
    head = heads.setdefault(words[2], [])
    samples.setdefault(words[2], [])
    if not any(known.split(" ", 3)[1] == words[1] for known in head):
        head.append(line)
    return words[2]
