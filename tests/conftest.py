"""What every test process does before its first test."""

from __future__ import annotations

import gc

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of slow tests come first: two workers that take file by file then end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """The tests and what they imported stay: looking through them for garbage again and again takes a sixth
    of a test process's time."""
    gc.freeze()
