"""The folder of a run of ``almlip explore`` or ``almlip md``, and whether it belongs to the run that is asked for.

Layout::

    out/
      config.yaml        resolved config
      versions.json      package versions, git commit, devices
      run.log            what progress reported, with times, and errors
      inputs.json        what the input files were
      thresholds.json    of the gate, where there is one
      state.npz          from which a run goes on, also to more steps once it is over
      trajectories/000.extxyz, ...   or trajectory.h5
      thermo.csv         of production dynamics
      hills_0.npz        hills of the first bias, where that is metadynamics
      candidates.extxyz  frames that the gate recorded
      final.extxyz       last good frame of each walker
      exploration.npz    traces of an exploration
      summary.json       how it ended; there when the run is over
      lock               the process that works here, while it does
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from almlip_jax.errors import InputError
from almlip_jax.files import damaged, read_json, write_json, write_text
from almlip_jax.simulation.settings import SimulationConfig
from almlip_jax.work_directory import Inside, WorkDirectory
from almlip_jax.yaml_text import read_yaml, yaml_text

_FREE = ("out", "checkpoint_every", "exploration.steps")  # keys that may differ between the parts of one run
_INPUTS = ("potential", "structures", "training_set", "calibration_set")


class SimulationDirectory(WorkDirectory):
    """The files of a run; see the module's docstring."""

    inputs = Inside("inputs.json")
    """Digests of the input files (JSON)."""
    thresholds = Inside("thresholds.json")
    """Record and stop threshold (JSON)."""
    state = Inside("state.npz")
    """State of the walkers, and how far the outputs were written (npz)."""
    trajectories = Inside("trajectories")
    """Folder of the trajectories as extended XYZ."""
    h5md = Inside("trajectory.h5")
    """Trajectories of all walkers (H5MD)."""
    thermo = Inside("thermo.csv")
    """Energies and the like (CSV)."""

    def hills(self, bias: int) -> Path:
        """Hills of a metadynamics by its position among the biases (npz)."""
        return self.path / f"hills_{bias}.npz"

    traces = Inside("traces.unfinished")
    """Traces of an unfinished exploration (raw numbers)."""
    candidates = Inside("candidates.extxyz")
    """Recorded frames with their scores (extxyz)."""
    final = Inside("final.extxyz")
    """Last good frame of each walker (extxyz)."""
    exploration = Inside("exploration.npz")
    """Traces of an exploration (npz)."""
    summary = Inside("summary.json")
    """How the run ended (JSON)."""

    def refuse_others(self) -> None:
        """Refuses a folder with files that are not those of a run of this kind, such as a campaign.

        Raises:
            InputError: as said.
        """
        if not self.is_empty() and not self.inputs.exists():
            raise InputError(f"{self.path} holds something other than such a run; choose another folder with --out.")

    def settle(self, config: SimulationConfig) -> bool:
        """Makes the folder that of a run, or finds that it is already; one with fewer steps is reopened for more.

        Returns:
            whether there is something to go on from: a state, or the end.

        Raises:
            InputError: the folder holds another run, input files have changed since its beginning, or the run cannot
                go on to as many steps.
        """
        wanted, inputs = config.model_dump(mode="json"), _digests(config)
        begun = self.state.exists() or self.summary.exists()
        if not begun:
            write_json(self.inputs, inputs)
            write_text(self.config, yaml_text(wanted))
            return False
        before = self._before()
        self._compare(before, wanted, inputs)
        done, steps = before["exploration"]["steps"], config.dynamics.steps
        if done != steps:
            self._check_more_steps(done, config)
            self.summary.unlink(missing_ok=True)
            write_text(self.config, yaml_text(wanted))
        return True

    def _check_more_steps(self, done: int, config: SimulationConfig) -> None:
        settings = config.dynamics
        refused = f"{self.path} holds a run of {done} steps, which cannot be continued to {settings.steps}"
        if settings.steps < done:
            raise InputError(f"{refused}: they are fewer; choose another folder with --out.")
        moving = settings.follows_progress
        if moving is not None:
            raise InputError(f"{refused}: {moving} follows the length of the run; choose another folder with --out.")
        for name in ("trace_every", "trajectory_every"):
            stride = getattr(settings, name)
            if done % stride:
                raise InputError(
                    f"{refused}: {done} is not a multiple of {stride}, the steps between two rows or frames; choose "
                    "another folder with --out."
                )
        if not self.state.exists():
            raise InputError(f"{refused}: {self.state} is missing; choose another folder with --out.")

    def _before(self) -> dict[str, Any]:
        """The config that the run has had so far."""
        try:
            before = read_yaml(self.config).value
            readable = isinstance(before["exploration"]["steps"], int)
        except (InputError, ValueError, TypeError, KeyError):
            readable = False
        if not readable:
            raise InputError(f"{self.config} cannot be read; choose another folder for this run.")
        return dict(before)

    def _compare(self, before: dict[str, Any], wanted: dict[str, Any], inputs: dict[str, Any]) -> None:
        changed = [key for key in _changes(before, wanted) if key not in _FREE]
        if changed:
            raise InputError(
                f"by {self.config} this folder holds a run with another {', '.join(changed)}; choose another folder "
                "with --out, or delete this one."
            )
        known = read_json(self.inputs)
        for name, digest in inputs.items():
            if not isinstance(known.get(name), str):
                raise damaged(self.inputs, f"it does not say what the {name.replace('_', ' ')} was")
            if known[name] != digest:
                raise InputError(
                    f"the {name.replace('_', ' ')} has changed since the run in {self.path} began; choose another "
                    "folder with --out."
                )


def _changes(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Keys whose values differ, dotted."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [prefix.removesuffix(".")]
    names = dict.fromkeys([*before, *after])
    return [key for name in names for key in _changes(before.get(name), after.get(name), f"{prefix}{name}.")]


def _digests(config: SimulationConfig) -> dict[str, str]:
    """SHA-256 of each input by the name of its key; of a folder, of all its files in order.

    Raises:
        InputError: one cannot be read.
    """
    found = {}
    for name in _INPUTS:
        path = getattr(config, name)
        if path is None:
            continue
        try:
            found[name] = _digest(path)
        except OSError as error:
            raise InputError(f"{name} {path} cannot be read ({error.strerror}); correct the config.") from error
    return found


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    for file in (one for one in sorted(path.rglob("*")) if one.is_file()) if path.is_dir() else (path,):
        total.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()
