"""Amounts keep the words of their author and give the right number."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broadbeam_crds.quantity import ChunkSize, Duration, PositiveDuration, Quantity, Share

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
SECONDS = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}
AMOUNTS = (Quantity, Duration, PositiveDuration, Share, ChunkSize)


@given(number=st.integers(1, 10**6), unit=st.sampled_from(sorted(UNITS)))
def test_a_quantity_is_its_number_times_its_unit(number: int, unit: str) -> None:
    quantity = Quantity(f"{number}{unit}")

    assert quantity.amount == number * UNITS[unit]
    assert quantity.bytes == number * UNITS[unit]
    assert quantity == f"{number}{unit}"


@given(whole=st.integers(0, 999), digits=st.integers(1, 999))
def test_a_fraction_of_a_byte_counts_as_one(whole: int, digits: int) -> None:
    quantity = Quantity(f"{whole}.{digits:03}")

    assert quantity.amount == Decimal(f"{whole}.{digits:03}")
    assert quantity.bytes == whole + 1


def test_thousandths_are_cores() -> None:
    assert Quantity("500m").amount == Decimal("0.5")
    assert Quantity(2).amount == 2


@given(parts=st.dictionaries(st.sampled_from(sorted(SECONDS)), st.integers(1, 999), min_size=1))
def test_a_duration_is_the_sum_of_its_parts(parts: dict[str, int]) -> None:
    text = "".join(f"{number}{unit}" for unit, number in parts.items())

    assert Duration(text).seconds == pytest.approx(sum(SECONDS[u] * n for u, n in parts.items()))
    assert PositiveDuration(text) == text


@given(text=st.text(alphabet="0123456789.hms", max_size=12))
def test_a_positive_duration_is_a_duration_above_zero(text: str) -> None:
    try:
        seconds = Duration(text).seconds
    except ValueError:
        seconds = 0.0
    try:
        positive = PositiveDuration(text).seconds
    except ValueError:
        positive = 0.0

    assert positive == seconds


@given(percent=st.integers(0, 100), total=st.integers(0, 1000))
def test_a_percentage_rounds_as_asked(percent: int, total: int) -> None:
    share = Share(f"{percent}%")

    below, above = share.of(total, round_up=False), share.of(total, round_up=True)
    assert below <= percent * total / 100 <= above
    assert above - below <= 1


def test_a_count_is_itself() -> None:
    assert Share(3).of(10, round_up=True) == 3


def test_a_chunk_is_a_size_or_disabled() -> None:
    assert ChunkSize(2048).size == 2048
    assert ChunkSize("disabled").size is None


@given(text=st.text(max_size=12), kind=st.sampled_from(AMOUNTS))
def test_any_text_is_taken_or_refused_by_name(text: str, kind: type[Quantity]) -> None:
    if re.fullmatch(kind.pattern, text, re.ASCII):
        assert kind(text) == text
    else:
        with pytest.raises(ValueError, match=re.escape(kind.example)):
            kind(text)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        pytest.param(Quantity, "64 Gi", '"64 Gi" is not a quantity above zero', id="a space"),
        pytest.param(Quantity, "64GB", '"64GB" is not a quantity above zero', id="another unit"),
        pytest.param(Quantity, "-1", '"-1" is not a quantity above zero', id="below zero"),
        pytest.param(Quantity, "0Gi", '"0Gi" is not a quantity above zero', id="nothing"),
        pytest.param(Quantity, "٤Gi", '"٤Gi" is not a quantity above zero', id="other digits"),
        pytest.param(Quantity, 1.5, "1.5 is a decimal number, not a quantity", id="a float"),
        pytest.param(Quantity, True, "True is not a quantity", id="a truth value"),
        pytest.param(Quantity, "1" * 40, "is not a quantity", id="too long"),
        pytest.param(Quantity, "8192Pi", '"8192Pi" is above the limit 8191Pi', id="beyond 64 bits"),
        pytest.param(Quantity, "9" * 30, "is above the limit 8191Pi", id="far beyond 64 bits"),
        pytest.param(Share, 10000, "10000 is above the limit 9999", id="too many"),
        pytest.param(Duration, "9999999999h", '"9999999999h" is not a duration such as', id="for ever"),
        pytest.param(Duration, "5", '"5" is not a duration such as', id="no unit"),
        pytest.param(Duration, 5, "5 is not a duration such as", id="a bare number"),
        pytest.param(PositiveDuration, "0.0s", '"0.0s" is not a duration above zero', id="no time"),
        pytest.param(Share, "101%", '"101%" is not a count such as', id="more than all"),
        pytest.param(ChunkSize, "off", '"off" is not a positive number of tokens', id="another word"),
        pytest.param(ChunkSize, 0, '"0" is not a positive number of tokens', id="no tokens"),
    ],
)
def test_what_is_no_amount_is_refused_in_words(kind: type[Quantity], value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(value)  # type: ignore[arg-type]
