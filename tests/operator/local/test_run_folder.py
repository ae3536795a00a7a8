from __future__ import annotations

import threading
from pathlib import Path

import pytest

from broadbeam_operator.local.run_folder import LOCK, locked, run_folder


def test_a_folder_lasts_as_long_as_its_run(tmp_path: Path) -> None:
    with run_folder(tmp_path, "c") as folder:
        (folder / "log").touch()
    assert not folder.exists()


def test_a_failed_run_leaves_its_logs_until_the_next(tmp_path: Path) -> None:
    (tmp_path / "no folder").touch()

    def fail() -> None:
        with run_folder(tmp_path, "c") as folder:
            (folder / "log").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    (folder,) = tmp_path.glob("c-*")
    assert (folder / "log").exists()
    with run_folder(tmp_path, "d"):
        assert not folder.exists()


def test_a_running_neighbour_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "addresses").mkdir()
    with run_folder(tmp_path, "one") as one, run_folder(tmp_path, "two"):
        assert one.exists()
    assert (tmp_path / "addresses").exists()


def test_no_folder_is_made_while_another_run_cleans(tmp_path: Path) -> None:
    """Else it could be cleaned away before it is locked."""

    def enter() -> None:
        with run_folder(tmp_path, "c"):
            made.set()
            leave.wait()

    made, leave = threading.Event(), threading.Event()
    entering = threading.Thread(target=enter)
    with locked(tmp_path / LOCK):
        entering.start()
        assert not made.wait(0.2)
        assert list(tmp_path.glob("c-*")) == []
    assert made.wait(30)
    leave.set()
    entering.join()


def test_two_runs_of_one_cluster_have_a_folder_each(tmp_path: Path) -> None:
    with run_folder(tmp_path, "c") as one, run_folder(tmp_path, "c") as two:
        assert one != two
