from __future__ import annotations

from pathlib import Path

import pytest

from broadbeam_operator.local import devices


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        pytest.param({}, ("0", "1", "2", "3"), id="all, where nothing is said"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "2, 3"}, ("2", "3"), id="those that were given to us"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "GPU-8932f937,1"}, ("GPU-8932f937", "1"), id="by their UUID"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, ("0",), id="none after one that is not there"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "7,0"}, (), id="none after a number beyond the last"),
        pytest.param({"CUDA_VISIBLE_DEVICES": ""}, (), id="none at all"),
        pytest.param({"HIP_VISIBLE_DEVICES": "1"}, ("1",), id="AMD's"),
    ],
)
def test_only_the_devices_that_this_process_may_see_are_given_to_pods(
    environ: dict[str, str], names: tuple[str, ...]
) -> None:
    assert devices.ours(environ, there=4) == names


@pytest.mark.parametrize(
    ("files", "count"),
    [
        pytest.param((), 0, id="none"),
        pytest.param(("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"), 2, id="NVIDIA's"),
        pytest.param(("kfd", "dri/card0", "dri/renderD128", "dri/renderD129"), 2, id="AMD's"),
        pytest.param(("dri/renderD128",), 0, id="a display is no accelerator"),
    ],
)
def test_devices_are_counted_by_their_files(tmp_path: Path, files: tuple[str, ...], count: int) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert devices.count(tmp_path) == count
