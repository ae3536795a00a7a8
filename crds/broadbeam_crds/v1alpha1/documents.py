"""YAML read as kubectl reads it: whatever it says, what comes out is what JSON can say."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from typing import Any, Final

import yaml

MOST_VALUES: Final = 100_000  # of a document; aliases of aliases can make billions out of ten lines
STR: Final = "tag:yaml.org,2002:str"
MERGE: Final = "tag:yaml.org,2002:merge"
INT: Final = "tag:yaml.org,2002:int"
FLOAT: Final = "tag:yaml.org,2002:float"
TIMESTAMP: Final = "tag:yaml.org,2002:timestamp"
# Values that JSON has no word for.
FOREIGN: Final = {TIMESTAMP, *(f"tag:yaml.org,2002:{name}" for name in ("binary", "omap", "pairs", "set"))}
# As kubectl's reader: 1e3 is a number, and 12:30 is not one to the base of 60.
NUMBERS: Final = {
    FLOAT: r"[-+]?(([0-9][0-9_]*)?\.[0-9_]+|[0-9][0-9_]*\.)([eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    INT: r"[-+]?(0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)",
}


class DocumentError(ValueError):
    """A text that gives no plain values; the message is one line, with its line where that is known."""


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice; takes keys as the text they are, and times too."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.tag == MERGE:
                continue
            if key.value in seen:
                raise DocumentError(f'line {key.start_mark.line + 1}: the key "{key.value}" is given twice')
            seen.add(key.value)
            key.tag = STR
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        number = self.construct_yaml_float(node)
        if not math.isfinite(number):
            problem = f'"{node.value}" is no number that JSON has'
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return number


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (TIMESTAMP, INT, FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list("-+.0123456789"))
_Loader.yaml_constructors = {
    tag: constructor for tag, constructor in yaml.SafeLoader.yaml_constructors.items() if tag not in FOREIGN
}
_Loader.add_constructor(FLOAT, _Loader.construct_number)


def documents(text: str) -> list[object]:
    """What the text holds, empty documents left out; DocumentError says why it cannot be used."""
    try:
        found = [each for each in yaml.load_all(text, _Loader) if each is not None]
        _count(found)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise DocumentError(f"{line}not YAML: {error.problem or error.context}") from error
    except DocumentError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise DocumentError(f"not YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise DocumentError("nested too deeply to be a manifest") from None
    return found


def _count(value: object, before: int = 0) -> int:
    """Values in `value` with aliases written out, and `before`. RecursionError where it holds itself."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    count = before + 1
    for each in inner:
        count = _count(each, count)
    if count > MOST_VALUES:
        raise DocumentError(f"more than {MOST_VALUES:,} values, too many for a manifest")
    return count


def stored(value: object, field: str = "") -> Any:
    """Plain values as the API server keeps them: a field that is null is one that is absent, and a number
    without a fraction is an integer. In a pod template null means something, and stays."""
    match value:
        case dict():
            keep = field == "template"
            return {
                key: item if keep else stored(item, str(key))
                for key, item in value.items()
                if keep or item is not None
            }
        case list():
            return [stored(each) for each in value]
        case float() if value.is_integer() and abs(value) < 2**63:
            return int(value)
        case _:
            return value
