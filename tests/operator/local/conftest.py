"""A desk for each test, with nothing left running afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.operator.local.desk import Desk, until


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    for command in desk.commands:
        if command.process.returncode is None:
            command.process.kill()
        await command.end()
    await until(lambda: not desk.left())
