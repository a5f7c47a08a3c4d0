"""A campaign on one water molecule that is small in every respect, and a program that runs or resumes it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ase.build import molecule

import almlip_jax
from almlip_jax.campaign import Outcome, resume_campaign, run_campaign
from almlip_jax.campaign.config import ExperimentConfig
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.files import read_csv, read_json
from almlip_jax.oracles import LabelStore
from almlip_jax.progress import Advance, SilentProgress
from almlip_jax.structures.io import read_structures, write_structures

PACKAGE = Path(almlip_jax.__file__).parents[1]

SECTIONS: dict[str, Any] = {
    "name": "tiny",
    "seed": 7,
    "oracle": {"kind": "tblite"},
    "executor": {"kind": "local", "workers": 1},
    "initial": {"rattle": {"count": 6, "stdev": 0.05}, "md": [{"temperature": 300, "steps": 4, "every": 2}]},
    "test": {
        "md": [
            {"temperature": 300, "steps": 20, "every": 5, "equilibration": 5},
            {"temperature": 600, "steps": 20, "every": 5, "equilibration": 5},
        ]
    },
    "model": {"kind": "shared_density", "cutoff": 3.0, "radial": 4, "l_max": 0, "channels": 4, "hidden": [8]},
    "ensemble": {"size": 2},
    "training": {"batch_size": 4, "max_steps": 300, "validate_every": 50, "validation_fraction": 0.2},
    "exploration": {
        "kind": "md",
        "walkers": [{"temperature": 300, "count": 1}, {"temperature": 600, "count": 1}],
        "steps": 60,
        "chunk": 20,
        "record_every": 10,
        "buffer": 8,
        "trace_every": 5,
        "trajectory_every": 10,
        "thresholds": {"kind": "fixed", "record": 0.1, "stop": 10.0},
    },
    "selection": {"batch": 3, "selector": {"kind": "max_det"}},
    "stopping": {"max_rounds": 2, "share_below": None},
}
"""Settings of every section but the system."""


def tiny_config(folder: Path, **sections: Any) -> ExperimentConfig:
    """The config, with the given sections updated; its start geometry is written into a folder."""
    start = folder / "water.extxyz"
    if not start.exists():
        write_structures(start, [molecule("H2O")])
    changed = {
        name: {**SECTIONS.get(name, {}), **value} if isinstance(value, dict) and "kind" not in value else value
        for name, value in sections.items()
    }
    return ExperimentConfig.model_validate({**SECTIONS, "system": {"structures": str(start)}, **changed})


def run_or_resume(folder: Path, run_dir: Path, progress: Any = None, **sections: Any) -> Outcome:
    """Runs the tiny campaign, or goes on with it where it has begun."""
    config = tiny_config(folder, **sections)
    if (run_dir / "state.json").exists():
        return resume_campaign(config, run_dir, progress=progress)
    return run_campaign(config, run_dir, progress=progress)


class Killed(BaseException):
    """The end of a process, as far as a test in the same process can have it."""


class KillingProgress(SilentProgress):
    """Ends the campaign the moment a stage of a round begins, or reports for the first time.

    Args:
        round_index: in which round; None before the first.
        stage: name of the stage.
        within: whether to wait for the first report from within the stage.
    """

    def __init__(self, round_index: int | None, stage: str, *, within: bool = False) -> None:
        super().__init__()
        self.place = (round_index, stage)
        self.within = within

    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> AbstractContextManager[Advance]:
        """Ends the campaign, or hands out what may end it."""
        here = (self.forecast.index, name) == self.place
        if here and not self.within:
            raise Killed
        return _killing(super().stage(name, total, unit=unit), here)


@contextmanager
def _killing(stage: AbstractContextManager[Advance], here: bool) -> Iterator[Callable[..., None]]:
    with stage as advance:

        def killing(n: int = 1, **fields: float | int | str) -> None:
            advance(n, **fields)
            if here:
                raise Killed

        yield killing


def start_process(folder: Path, run_dir: Path, cache: Path, **sections: Any) -> subprocess.Popen[bytes]:
    """Starts a process that runs the tiny campaign, or goes on with it."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, __file__, str(folder), str(run_dir), json.dumps(sections)]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def kill_in(process: subprocess.Popen[bytes], run_dir: Path, round_index: int, stage: str, delay: float) -> None:
    """Kills a process with SIGKILL a while after its state names a stage."""
    state = RunDirectory(run_dir).state
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if state.exists():
            now = read_json(state)
            if (now["round"], now["stage"]) == (round_index, stage):
                time.sleep(delay)
                break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


def result_of(run_dir: Path) -> dict[str, Any]:
    """Everything that must not depend on whether a campaign was interrupted: sets in order, labels, errors."""
    run = RunDirectory(run_dir)
    found: dict[str, Any] = {"metrics": [], "sets": {}, "evaluation": []}
    for row in read_csv(run.metrics):
        found["metrics"].append({key: value for key, value in row.items() if not key.startswith("seconds_")})
    for folder in run.rounds():
        found["evaluation"].append(read_json(folder.evaluation))
        for path in (folder.dataset, folder.pool, folder.batch, folder.labelled):
            if path.exists():
                found["sets"][str(path.relative_to(run.path))] = [_content(a) for a in read_structures(path)]
    found["sets"]["test"] = [_content(a) for a in read_structures(run.test)]
    with LabelStore(run.labels, readonly=True) as store:
        found["labels"] = [(row.label.identity, row.label.calls, row.label.energy) for row in store.labelled()]
        found["calls"] = store.count_calls(exclude_purpose=None)
    return found


def _content(atoms: Any) -> tuple[Any, ...]:
    results = {} if atoms.calc is None else atoms.calc.results
    forces = results["forces"].tobytes() if "forces" in results else None
    info = tuple(sorted((key, str(value)) for key, value in atoms.info.items()))
    return atoms.positions.tobytes(), results.get("energy"), forces, info


if __name__ == "__main__":
    run_or_resume(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3]))
