"""Sweeps on eight devices give what they give on one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_sweep import timeless, write_sets

PROGRAM = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from almlip_jax.compilation import prepare_jax
prepare_jax("float64")
import jax
from tiny_sweep import sweep
from almlip_jax.ensembles import devices_side_by_side
from almlip_jax.training import side_by_side

seen = set()

class Watched(side_by_side.SideBySideTrainer):
    def _together(self, number):
        found = super()._together(number)
        seen.add((*found.devices.devices.shape, found.trainer.program.devices is not None))
        return found

from almlip_jax.sweep import bench
bench.SideBySideTrainer = Watched
for width in (2, 3):
    sweep(Path(sys.argv[1]), Path(sys.argv[2]) / str(width), precision="float64", side_by_side=width)
print(json.dumps(sorted(seen)))
"""


def run(folder: Path, devices: int) -> list[list[Any]]:
    """The sweep in a process with so many devices; which its trainings side by side took, and whether they shared."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    flags += f" --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-c", PROGRAM, str(folder), str(folder / str(devices)), str(Path(__file__).parent)]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_eight_devices_give_the_rows_of_one(tmp_path: Path) -> None:
    """Points of two members, with batches of two: two side by side on four devices each, three on two."""
    write_sets(tmp_path)
    assert run(tmp_path, 1) == [[1, 1, 1, False]]  # four points, three side by side: the last one trains alone
    assert run(tmp_path, 8) == [[2, 2, 2, True], [3, 2, 1, False]]
    for width in "23":
        one, eight = (timeless(tmp_path / devices / width) for devices in "18")
        assert len(one) == len(eight) == 24
        for a, b in zip(one, eight, strict=True):
            assert a.keys() == b.keys()
            for name, value in a.items():
                if isinstance(value, float):
                    np.testing.assert_allclose(b[name], value, rtol=1e-6, err_msg=name)
                else:
                    assert b[name] == value, name
