"""Amounts with their unit in the value: `64Gi`, `500m`, `30s`, `25%`.

Each is a `str` that was checked when it was made, so a manifest keeps the words its author chose, and
properties give the number. The patterns are also what the CRD's schema says, so the API server refuses
what Python refuses.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any, ClassVar, Self

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError, core_schema

# What may follow the number of a Kubernetes quantity.
SUFFIXES = {
    "m": Decimal("0.001"),
    "": Decimal(1),
    "k": Decimal(10**3),
    "M": Decimal(10**6),
    "G": Decimal(10**9),
    "T": Decimal(10**12),
    "P": Decimal(10**15),
    "Ki": Decimal(2**10),
    "Mi": Decimal(2**20),
    "Gi": Decimal(2**30),
    "Ti": Decimal(2**40),
    "Pi": Decimal(2**50),
}
_DURATION_UNIT = {"ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600)}


class _Amount(str):
    """A checked string; subclasses say the pattern, an example, and whether a bare integer is one too."""

    pattern: ClassVar[str]
    example: ClassVar[str]
    max_length: ClassVar[int] = 32
    integers: ClassVar[bool] = False
    minimum: ClassVar[int] = 0
    maximum: ClassVar[int] = 2**63 - 1  # of an integer; a greater one is none to the API server

    def __new__(cls, value: str | int) -> Self:
        return super().__new__(cls, cls._checked(value))

    @classmethod
    def _checked(cls, value: object) -> str:
        text = str(value)
        if isinstance(value, float):
            raise ValueError(f"{text} is a decimal number, not {cls.example}")
        if isinstance(value, bool) or not isinstance(value, (str, int) if cls.integers else str):
            raise ValueError(f"{text} is not {cls.example}")
        if isinstance(value, int) and value > cls.maximum:
            raise ValueError(f"{text} is above the limit {cls.maximum}")
        if len(text) > cls.max_length or not re.fullmatch(cls.pattern, text, re.ASCII):
            raise ValueError(f'"{text[:40]}" is not {cls.example}')
        return text

    @classmethod
    def _validate(cls, value: object) -> Self:
        try:
            return value if isinstance(value, cls) else cls(value)  # type: ignore[arg-type]
        except ValueError as error:
            raise PydanticCustomError("amount", "{reason}", {"reason": str(error)}) from error

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, __: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validate, serialization=core_schema.plain_serializer_function_ser_schema(cls._plain)
        )

    @staticmethod
    def _plain(value: str) -> str | int:
        return str.__str__(value)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, _: core_schema.CoreSchema, __: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        text = {"pattern": cls.pattern, "maxLength": cls.max_length}
        if not cls.integers:
            return {"type": "string", **text}
        return {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "minimum": cls.minimum,
            **({"maximum": cls.maximum} if cls.maximum < 2**53 else {}),
            **text,
            "x-kubernetes-int-or-string": True,
        }


class Quantity(_Amount):
    """A Kubernetes quantity above zero: `64Gi`, `256Mi`, `500m`, `2`, `"1.5"`."""

    pattern = r"^(0*[1-9]\d*(\.\d*)?|\d*\.\d*[1-9]\d*)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"
    example = 'a quantity above zero such as 64Gi, 256Mi, 500m, 2 or "1.5"'
    integers = True
    minimum = 1

    @classmethod
    def _checked(cls, value: object) -> str:
        text = super()._checked(value)
        if _amount(text) >= 2**63:
            raise ValueError(f'"{text}" is above the limit 8191Pi')
        return text

    @property
    def amount(self) -> Decimal:
        """The number itself: cores for CPU, bytes for memory."""
        return _amount(self)

    @property
    def bytes(self) -> int:
        """Whole bytes, rounded up as Kubernetes does."""
        return math.ceil(self.amount)


def _amount(text: str) -> Decimal:
    number = text.rstrip("mkKMGTPi")
    return Decimal(number) * SUFFIXES[text[len(number) :]]


class Duration(_Amount):
    """A time in Go's notation, one or more numbers with units: `500ms`, `30s`, `1m30s`, `2h`."""

    # Nine digits of hours are a hundred thousand years, and any sum of a few fits 64 bits.
    pattern = r"^(\d{1,9}(\.\d+)?(ms|s|m|h))+$"
    example = "a duration such as 500ms, 30s, 1m30s or 2h"

    @property
    def seconds(self) -> float:
        parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", self)
        return float(sum(Fraction(number) * _DURATION_UNIT[unit] for number, unit in parts))


class PositiveDuration(Duration):
    """A duration that is not zero."""

    pattern = (
        r"^(\d{1,9}(\.\d+)?(ms|s|m|h))*(0{0,8}[1-9]\d{0,8}(\.\d+)?|\d{1,9}\.\d*[1-9]\d*)(ms|s|m|h)"
        r"(\d{1,9}(\.\d+)?(ms|s|m|h))*$"
    )
    example = "a duration above zero such as 500ms, 30s, 1m30s or 2h"


class Share(_Amount):
    """A count or a percentage of groups: `1`, `25%`."""

    pattern = r"^(100|[1-9]?\d)%$|^(0|[1-9]\d{0,3})$"
    example = "a count such as 1 or a percentage such as 25%"
    integers = True
    maximum = 9999

    def of(self, total: int, *, round_up: bool) -> int:
        """How many of `total` this is; a percentage rounds as asked, a count is itself."""
        if not self.endswith("%"):
            return int(self)
        percent = int(self[:-1]) * total
        return -(-percent // 100) if round_up else percent // 100

    @staticmethod
    def _plain(value: str) -> str | int:
        return int(value) if value.isdigit() else str.__str__(value)


class ChunkSize(_Amount):
    """Tokens (or outputs) handled at once, or `disabled` for no chunking."""

    pattern = r"^disabled$|^[1-9]\d{0,8}$"
    example = 'a positive number of tokens, or "disabled"'
    integers = True
    minimum = 1
    maximum = 999_999_999

    @property
    def size(self) -> int | None:
        """None when chunking is disabled."""
        return None if self == "disabled" else int(self)

    @staticmethod
    def _plain(value: str) -> str | int:
        return int(value) if value.isdigit() else str.__str__(value)
