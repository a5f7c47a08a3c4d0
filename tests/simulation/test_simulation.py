"""Runs on their own: the same files after any interruption, H5MD that says what extended XYZ says, and clear refusals.

The committee is analytic (Morse potentials of different depth), and one compiled exploration serves most tests.
"""

from __future__ import annotations

import copy
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import read
from ase.io import write as ase_write
from typer.testing import CliRunner

from almlip_jax.cli import app
from almlip_jax.config import load_settings
from almlip_jax.dynamics import ExplorationSettings, Explorer, Knowledge, Status, relax, relaxing
from almlip_jax.ensembles import Ensemble, EnsembleSettings, Prediction
from almlip_jax.errors import InputError
from almlip_jax.files import read_npz, write_json, write_npz
from almlip_jax.models import SharedDensitySettings, build_model
from almlip_jax.potential import Potential
from almlip_jax.progress import Advance, SilentProgress
from almlip_jax.simulation import ExploreConfig, MdConfig, run_exploration, run_md
from almlip_jax.simulation.folder import SimulationDirectory
from almlip_jax.simulation.free_energy import run_free_energy
from almlip_jax.simulation.quantities import Quantities
from almlip_jax.simulation.summary import failure, render_summary
from almlip_jax.structures.graph import Graph, Places, forces_and_virial, sum_over_atoms
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.units import FEMTOSECOND, KB

SPECIES = SpeciesTable((1, 8))
REFERENCES = {1: -13.0, 8: -2000.0}
CUTOFF, WIDTH = 6.0, 2.0  # Angstrom, 1/Angstrom
PARAMS = np.array([4.0, 4.5, 5.0], np.float32)  # depths of the members, eV
EXPLORATION = {
    "pressure": True,
    "conserved": True,
    "walkers": [{"temperature": 300, "count": 2}, {"temperature": 900}],
    "steps": 115,  # no multiple of anything
    "chunk": 20,
    "trace_every": 5,
    "trajectory_every": 10,
    "record_every": 10,
    "buffer": 6,
    "sanity": {"max_temperature": 1000, "dissociation": False, "closest_contact": 0.1, "max_force": 1e4},
}
EXPLORATION_OF_MD = {name: EXPLORATION[name] for name in EXPLORATION if name not in ("trace_every", "trajectory_every")}
THRESHOLDS = {"kind": "fixed", "record": 0.3, "stop": 2.2}


def morse(params: jax.Array, graph: Graph) -> Prediction:
    def member(depth: jax.Array) -> Prediction:
        def energies(vectors: jax.Array) -> jax.Array:
            distance = jnp.sqrt(jnp.sum(jnp.where(graph.edge_mask[..., None], vectors, 1.0) ** 2, axis=-1))
            pair = 0.5 * depth * (1 - jnp.exp(-WIDTH * (distance - 1.0))) ** 2
            return sum_over_atoms(jnp.sum(jnp.where(graph.edge_mask, pair, 0), axis=1), graph)

        energy, pull = jax.vjp(energies, graph.vectors)
        forces, virial = forces_and_virial(Places(pull(jnp.ones_like(energy))[0]), graph)
        return Prediction(energy=energy, forces=forces, virial=virial, features=forces)

    return jax.vmap(member)(params)


def committee() -> Any:
    """As much of a potential as a run with fixed thresholds looks at."""
    return SimpleNamespace(
        ensemble=SimpleNamespace(predict=morse, targets=()),
        training_set=None,
        novelty={},
        params=PARAMS,
        member_settings=EnsembleSettings(size=len(PARAMS)),
        species=SPECIES,
        cutoff=CUTOFF,
        strange_state=lambda atoms: None,
        reference_energy=lambda atoms: sum(REFERENCES[z] for z in atoms.numbers),
    )


class Killed(BaseException):
    """The end of a process, as far as a test in the same process can have it."""


class Watching(SilentProgress):
    """Calls a function with the number of every report of the run, from 1."""

    def __init__(self, look: Callable[[int], None]) -> None:
        super().__init__()
        self.look = look
        self.fields: list[dict[str, Any]] = []

    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> AbstractContextManager[Advance]:
        return self._watched(super().stage(name, total, unit=unit))

    @contextmanager
    def _watched(self, stage: AbstractContextManager[Advance]) -> Iterator[Advance]:
        with stage as advance:

            def looking(n: int = 1, **fields: float | int | str) -> None:
                advance(n, **fields)
                self.fields.append({"n": n, **fields})
                self.look(len(self.fields))

            yield looking


def ending(report: int, error: type[BaseException]) -> Watching:
    """Ends the run at one of its reports: the outputs of the chunk are written, its state is not."""

    def look(number: int) -> None:
        if number == report:
            raise error

    return Watching(look)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two start structures; the first hydrogen of the second is held fixed."""
    folder = tmp_path_factory.mktemp("inputs")
    water = Atoms("OH2", [[0, 0, 0], [0.95, 0, 0], [0, 0.95, 0]], constraint=FixAtoms([1]))
    dimer = Atoms("OH", [[0, 0, 0], [0, 0, 1.1]])
    ase_write(folder / "starts.extxyz", [dimer], columns=["symbols", "positions"])
    ase_write(folder / "starts.extxyz", [water], columns=["symbols", "positions", "move_mask"], append=True)
    (folder / "potential").mkdir()
    (folder / "potential" / "potential.json").write_text("{}")
    return folder


def explore_config(inputs: Path, **changes: Any) -> ExploreConfig:
    plain = {"exploration": EXPLORATION, "thresholds": THRESHOLDS, "checkpoint_every": 0}
    paths = {"potential": inputs / "potential", "structures": inputs / "starts.extxyz"}
    return ExploreConfig.model_validate({**paths, **plain, **changes})


def md_config(inputs: Path, format: str = "extxyz", **changes: Any) -> MdConfig:
    given = {
        "potential": inputs / "potential",
        "structures": inputs / "starts.extxyz",
        "exploration": EXPLORATION_OF_MD,
        "thresholds": THRESHOLDS,
        "checkpoint_every": 0,
        "trajectory": {"format": format, "every": 10},
        "thermo": {"every": 5},
    }
    return MdConfig.model_validate({**given, **changes})


@pytest.fixture(scope="module")
def explorer(inputs: Path) -> Explorer:
    """Compiled once; the dynamics of both commands are the same here."""
    assert md_config(inputs).dynamics == explore_config(inputs).dynamics
    return Explorer(morse, SPECIES, CUTOFF, explore_config(inputs).dynamics)


@pytest.fixture(scope="module")
def runs(inputs: Path, explorer: Explorer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An exploration and a production run in either format, which nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run_exploration(explore_config(inputs), folder / "explore", committee(), SilentProgress(), explorer)
    for format in ("extxyz", "h5md"):
        run_md(md_config(inputs, format), folder / format, committee(), SilentProgress(), explorer)
    return {name: folder / name for name in ("explore", "extxyz", "h5md")}


def again(name: str, inputs: Path, folder: Path, progress: SilentProgress, explorer: Explorer) -> dict[str, Any]:
    """Starts, or goes on with, the run that is ``name`` among the whole ones."""
    if name == "explore":
        return run_exploration(explore_config(inputs), folder, committee(), progress, explorer)
    return run_md(md_config(inputs, name), folder, committee(), progress, explorer)


def content(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves, but for where and with what it ran."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".h5":
            with h5py.File(path) as file:
                file.visititems(
                    lambda key, item: (
                        found.update({key: item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None
                    )
                )
        elif path.is_file() and name not in ("versions.json", "summary.json", "run.log", ".lock.guard"):
            found[name] = path.read_bytes()
    summary = json.loads((folder / "summary.json").read_text())
    return found | {"summary": {key: value for key, value in summary.items() if key != "out"}}


def test_the_runs_have_something_to_show(runs: dict[str, Path]):
    """One walker ends at the gate, others run through; frames are recorded; traces have all entries."""
    summary = json.loads((runs["explore"] / "summary.json").read_text())
    ends = [walker["end_step"] for walker in summary["walkers"]]
    assert None in ends and any(end is not None for end in ends), ends
    candidates = read_structures(runs["explore"] / "candidates.extxyz")
    assert len(candidates) == summary["recorded"] == sum(walker["recorded"] for walker in summary["walkers"])
    traces = read_npz(runs["explore"] / "exploration.npz")
    np.testing.assert_array_equal(traces["step"], np.arange(5, 116, 5))
    assert traces["force_std_max"].shape == (23, 3) and traces["gate_stop"] == pytest.approx([2.2] * 3)
    for w, end in enumerate(ends):
        there = np.isfinite(traces["force_std_max"][:, w])
        np.testing.assert_array_equal(there, traces["step"] <= (end or 115))
    assert {path.name for path in runs["explore"].iterdir()} == {
        *("config.yaml", "versions.json", "inputs.json", "thresholds.json", "summary.json", "run.log", ".lock.guard"),
        *("trajectories", "candidates.extxyz", "final.extxyz", "exploration.npz", "state.npz"),
    }


@pytest.mark.parametrize("name", ["explore", "extxyz", "h5md"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(name, inputs, explorer, runs, tmp_path):
    """Killed after outputs were written and before the state was, by Ctrl-C, and at the first report."""
    with pytest.raises(Killed):
        again(name, inputs, tmp_path / "run", ending(1, Killed), explorer)  # there is no state yet
    with pytest.raises(Killed):
        again(name, inputs, tmp_path / "run", ending(3, Killed), explorer)
    with pytest.raises(KeyboardInterrupt):
        again(name, inputs, tmp_path / "run", ending(2, KeyboardInterrupt), explorer)
    progress = Watching(lambda _: None)
    again(name, inputs, tmp_path / "run", progress, explorer)
    steps = [fields["n"] for fields in progress.fields]
    assert steps[0] == 100 and sum(steps) == 115, "two chunks, two more by Ctrl-C, and one of this session"
    assert {"walkers", "force_std_max"} <= set(progress.fields[0])
    assert content(tmp_path / "run") == content(runs[name])
    log = (tmp_path / "run" / "run.log").read_text()
    assert log.count("session begins") == 4 and log.count(" 115 steps in ") == 1, log
    assert log.count("error: Killed") == 2 and log.count("session interrupted") == 1


@pytest.mark.parametrize("name", ["explore", "extxyz", "h5md"])
def test_a_killed_process_leaves_what_can_be_gone_on_from(name, inputs, explorer, runs, tmp_path):
    """What lies on the disk at some moment of a run, files that are open included, with further bytes behind them."""

    def look(number: int) -> None:
        if number == 4:
            shutil.copytree(tmp_path / "run", tmp_path / "killed")

    again(name, inputs, tmp_path / "run", Watching(look), explorer)
    killed = tmp_path / "killed"
    (killed / "lock").unlink()
    for path in [*killed.glob("trajectories/*"), *killed.glob("thermo.csv"), *killed.glob("traces.*")]:
        with path.open("ab") as file:
            file.write(b"2\nbroken")
    if name == "h5md":
        with pytest.raises(OSError):
            h5py.File(killed / "trajectory.h5", "r+")  # as HDF5 says of a file that a writer has left open
    again(name, inputs, killed, SilentProgress(), explorer)
    assert content(killed) == content(runs[name])
    finished = Watching(lambda _: None)
    again(name, inputs, killed, finished, explorer)  # it is over, and nothing is done again
    assert finished.fields == [] and content(killed) == content(runs[name])


def test_starts_are_relaxed_first_also_in_a_run_that_goes_on(inputs, explorer, tmp_path, monkeypatch):
    """As an exploration that begins at the relaxed structures, from a file."""
    config = explore_config(inputs, relax={"fmax": 0.02, "steps": 150})
    relaxer = Explorer(morse, SPECIES, CUTOFF, relaxing(config.dynamics, config.relax))
    origins = [read_structures(config.structures)[n] for n in (0, 1, 0)]
    found = relax(relaxer, PARAMS, origins, THRESHOLDS["stop"], Knowledge())
    assert set(found.status) == {Status.CONVERGED}
    text = ""
    for frame in found.structures[:2]:
        text += f'{len(frame)}\nProperties=species:S:1:pos:R:3:move_mask:L:1 pbc="F F F"\n'
        for n, (symbol, (x, y, z)) in enumerate(zip(frame.symbols, frame.positions.tolist(), strict=True)):
            text += f"{symbol} {x!r} {y!r} {z!r} {'F' if len(frame) == 3 and n == 1 else 'T'}\n"
    (tmp_path / "relaxed.extxyz").write_text(text)
    plain = explore_config(inputs, structures=tmp_path / "relaxed.extxyz")
    run_exploration(plain, tmp_path / "plain", committee(), SilentProgress(), explorer)

    monkeypatch.setattr("almlip_jax.simulation.run.Explorer", lambda *_, **__: relaxer)
    with pytest.raises(Killed):
        run_exploration(config, tmp_path / "run", committee(), ending(3, Killed), explorer)
    run_exploration(config, tmp_path / "run", committee(), SilentProgress(), explorer)
    different = ("config.yaml", "inputs.json")
    one, two = (
        {name: value for name, value in content(tmp_path / folder).items() if name not in different}
        for folder in ("plain", "run")
    )
    assert one == two


def test_a_run_is_not_taken_for_another(inputs, explorer, tmp_path):
    with pytest.raises(Killed):
        again("extxyz", inputs, tmp_path / "run", ending(3, Killed), explorer)
    other = md_config(inputs, seed=1, thermo={"every": 10}, checkpoint_every=7)
    with pytest.raises(
        InputError,
        match=r"config\.yaml this folder holds a run with another seed, thermo\.every; choose another folder",
    ):
        run_md(other, tmp_path / "run", committee(), SilentProgress(), explorer)
    elsewhere = shutil.copytree(inputs, tmp_path / "inputs")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config |= {"structures": str(elsewhere / "starts.extxyz"), "potential": str(elsewhere / "potential")}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    (elsewhere / "potential" / "potential.json").write_text('{"trained": "again"}')
    with pytest.raises(InputError, match="the potential has changed since the run"):
        run_md(md_config(elsewhere), tmp_path / "run", committee(), SilentProgress(), explorer)
    (elsewhere / "potential" / "potential.json").write_text("{}")
    thermo = tmp_path / "run" / "thermo.csv"
    whole = thermo.read_bytes()
    thermo.write_bytes(whole[:50])
    with pytest.raises(InputError, match=r"thermo\.csv lacks what its run had written"):
        run_md(md_config(elsewhere), tmp_path / "run", committee(), SilentProgress(), explorer)
    thermo.write_bytes(whole)
    state = tmp_path / "run" / "state.npz"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"state\.npz cannot be read .* begin this run again\.$"):
        run_md(md_config(elsewhere), tmp_path / "run", committee(), SilentProgress(), explorer)


def test_a_folder_of_something_else_is_left_alone(inputs, explorer, tmp_path):
    (tmp_path / "config.yaml").write_text("name: a campaign")
    with pytest.raises(InputError, match="holds something other than such a run; choose another folder with --out"):
        run_md(md_config(inputs), tmp_path, committee(), SilentProgress(), explorer)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_folder_is_not_spoilt_by_a_run_that_could_not_begin(inputs, explorer, tmp_path, monkeypatch):
    """Neither by an input that is missing nor by a kill before anything was written."""
    wrong = md_config(inputs, structures=str(tmp_path / "nowhere.extxyz"))
    for _ in range(2):
        with pytest.raises(InputError, match=r"structures .*nowhere\.extxyz cannot be read"):
            run_md(wrong, tmp_path / "run", committee(), SilentProgress(), explorer)

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process does not tidy up
        with pytest.raises(Killed):
            run_md(md_config(inputs), tmp_path / "run", committee(), SilentProgress(), explorer)
    assert len(list((tmp_path / "run").iterdir())) > 1
    again("extxyz", inputs, tmp_path / "run", SilentProgress(), explorer)


def test_the_resolved_config_is_one(inputs, runs):
    for kind, name, config in ((ExploreConfig, "explore", explore_config), (MdConfig, "extxyz", md_config)):
        assert load_settings(kind, runs[name] / "config.yaml") == config(inputs)


def test_h5md_says_what_extended_xyz_says(runs):
    """Structure as the specification asks for it (H5MD 1.1), content as in the other format."""
    with (runs["extxyz"] / "thermo.csv").open() as lines:
        thermo = list(csv.DictReader(lines))
    with h5py.File(runs["h5md"] / "trajectory.h5") as file:
        about = file["h5md"]
        assert list(about.attrs["version"]) == [1, 1] and about["author"].attrs["name"]
        assert about["creator"].attrs["name"] == b"almlip-jax" and about["creator"].attrs["version"]
        assert set(file["particles"]) == set(file["observables"]) == {"walker000", "walker001", "walker002"}
        for w in range(3):
            frames = read(runs["extxyz"] / "trajectories" / f"{w:03d}.extxyz", ":")
            group = file[f"particles/walker{w:03d}"]
            assert group["box"].attrs["dimension"] == 3 and list(group["box"].attrs["boundary"]) == [b"none"] * 3
            np.testing.assert_array_equal(group["species"], frames[0].numbers)
            np.testing.assert_allclose(group["mass"], frames[0].get_masses())
            np.testing.assert_array_equal(group["position/step"], [frame.info["step"] for frame in frames])
            np.testing.assert_allclose(group["position/time"], [frame.info["time_fs"] for frame in frames])
            assert group["position/time"].attrs["unit"] == b"fs"
            velocities = [frame.get_velocities() * FEMTOSECOND for frame in frames]
            for name, expected, unit in (
                ("position", [frame.positions for frame in frames], b"Angstrom"),
                ("velocity", velocities, b"Angstrom fs-1"),
                ("force", [frame.get_forces(apply_constraint=False) for frame in frames], b"eV Angstrom-1"),
                ("force_std", [frame.arrays["force_std"] for frame in frames], b"eV Angstrom-1"),
            ):
                np.testing.assert_allclose(group[name]["value"], expected, rtol=1e-6, atol=1e-7)
                assert group[name]["value"].attrs["unit"] == unit
                assert group[name]["step"] == group["position/step"], "elements of a walker share their steps"
            seen = file[f"observables/walker{w:03d}"]
            rows = [row for row in thermo if row[f"temperature_{w}"]]
            np.testing.assert_array_equal(seen["temperature/step"], [int(row["step"]) for row in rows])
            for name in ("potential_energy", "temperature", "force_std_max", "bias"):
                values = [float(row[f"{name}_{w}"]) for row in rows]
                np.testing.assert_allclose(seen[name]["value"], values, rtol=1e-8)
            assert np.isnan(seen["volume/value"]).all(), "an open structure has no volume"


def test_frames_have_the_energy_and_forces_of_the_mean_potential(runs):
    depth = float(PARAMS.mean())
    for frame in read(runs["extxyz"] / "trajectories" / "000.extxyz", ":"):
        stretch = np.exp(-WIDTH * (frame.get_distance(0, 1) - 1.0))
        pull = 2 * depth * WIDTH * (1 - stretch) * stretch
        assert frame.get_potential_energy() == pytest.approx(-2013.0 + depth * (1 - stretch) ** 2, abs=2e-4)
        assert np.linalg.norm(frame.get_forces()[0]) == pytest.approx(abs(pull), rel=1e-3, abs=1e-4)


def test_structures_are_dealt_out_and_fixed_atoms_stay(runs):
    formulas = [len(frame) for frame in read_structures(runs["extxyz"] / "final.extxyz")]
    assert formulas == [2, 3, 2]
    for frame in read(runs["extxyz"] / "trajectories" / "001.extxyz", ":"):
        np.testing.assert_allclose(frame.positions[1], [0.95, 0, 0], atol=1e-6)
        assert abs(frame.positions[2] - [0, 0.95, 0]).max() > 1e-4 and not frame.get_momenta()[1].any()


def test_tables_hold_the_scores_that_a_run_looks_at():
    gate = {"kind": "absolute", "score": "energy_std_per_atom"}
    asked = {"walkers": [{"temperature": 300}], "gate": gate, "monitor": ["latent_distance", "dipole_std"]}
    units = Quantities(ExplorationSettings.model_validate(asked), [], []).units
    assert [units[name] for name in ("force_std_max", "energy_std_per_atom", "latent_distance", "dipole_std")] == [
        *("eV Angstrom-1", "eV atom-1", "", "e Angstrom"),
    ]


def test_memory_and_buffers_of_ungated_dynamics_are_small(inputs):
    config = md_config(inputs, thresholds=None, trajectory={"every": 7}, thermo={"every": 3})
    assert config.rule is None and config.dynamics.buffer == 1
    assert config.dynamics.chunk == 21 and config.dynamics.trace_every == 3 and config.dynamics.trajectory_every == 7


def test_npt_writes_volumes_and_cells(tmp_path):
    corners = [[0, 0, 0], [1.1, 0, 0], [0, 1.1, 0], [0, 0, 1.1]]
    write_structures(tmp_path / "cell.extxyz", [Atoms("OH3", corners, cell=[7.0, 7.5, 8.0], pbc=True)])
    config = md_config(
        tmp_path,
        "h5md",
        potential=tmp_path,
        structures=tmp_path / "cell.extxyz",
        thresholds=None,
        exploration={
            "walkers": [{"temperature": 300, "pressure": 1.0}],
            "steps": 40,
            "chunk": 20,
            "integrator": {"kind": "npt", "barostat_time": 50},
            "sanity": EXPLORATION["sanity"],
        },
        thermo={"every": 10},
    )
    potential = committee()
    potential.cutoff = 2.5
    summary = run_md(config, tmp_path / "run", potential, SilentProgress())
    assert summary["walkers"][0]["status"] == Status.COMPLETED.name.lower() and "recorded" not in summary
    with (tmp_path / "run" / "thermo.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    volumes = [float(row["volume_0"]) for row in rows]
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40] and rows[3]["time_ps"] == "0.02"
    assert len(set(volumes)) == 4 and all(row["pressure_0"] for row in rows)
    with h5py.File(tmp_path / "run" / "trajectory.h5") as file:
        box = file["particles/walker000/box"]
        assert list(box.attrs["boundary"]) == [b"periodic"] * 3
        assert box["edges/step"] == file["particles/walker000/position/step"]
        np.testing.assert_allclose(np.abs(np.linalg.det(box["edges/value"][()])), volumes, rtol=1e-5)
        np.testing.assert_allclose(file["observables/walker000/volume/value"], volumes, rtol=1e-8)
    final = read_structures(tmp_path / "run" / "final.extxyz")[0]
    assert final.get_volume() == pytest.approx(volumes[-1], rel=1e-5)


def of_steps(explorer: Explorer, steps: int) -> Explorer:
    """The same compiled programs for a run of another length."""
    other = copy.copy(explorer)
    other.settings = explorer.settings.model_copy(update={"steps": steps})
    return other


@pytest.mark.parametrize("name", ["explore", "extxyz", "h5md"])
def test_a_finished_run_goes_on_to_more_steps(name, inputs, explorer, tmp_path):
    """And ends as one that was planned so long, bit for bit; also after a kill on the way."""

    def run(folder: Path, steps: int, progress: SilentProgress) -> dict[str, Any]:
        sized = {"exploration": {**EXPLORATION, "steps": steps}}
        if name == "explore":
            config: Any = explore_config(inputs, **sized)
            return run_exploration(config, folder, committee(), progress, of_steps(explorer, steps))
        del sized["exploration"]["trace_every"], sized["exploration"]["trajectory_every"]
        return run_md(md_config(inputs, name, **sized), folder, committee(), progress, of_steps(explorer, steps))

    run(tmp_path / "whole", 70, SilentProgress())
    run(tmp_path / "parts", 30, SilentProgress())  # ends within a chunk
    with pytest.raises(Killed):
        run(tmp_path / "parts", 70, ending(2, Killed))
    assert run(tmp_path / "parts", 70, SilentProgress())["steps"] == 70
    one, two = content(tmp_path / "whole"), content(tmp_path / "parts")
    assert one.keys() == two.keys() and [key for key in one if one[key] != two[key]] == []
    with pytest.raises(InputError, match="holds a run of 70 steps, which cannot be continued to 60: they are fewer"):
        run(tmp_path / "parts", 60, SilentProgress())


def test_runs_that_cannot_go_on_say_why(inputs, explorer, runs, tmp_path):
    longer = {"exploration": {**EXPLORATION, "steps": 200}}
    with pytest.raises(InputError, match=r"115 steps.*200: 115 is not a multiple of 10, the steps between two rows"):
        run_exploration(explore_config(inputs, **longer), runs["explore"], committee(), SilentProgress(), explorer)
    for changes, why in (
        ({"walkers": [{"temperature": [300, 400], "count": 3}]}, "a temperature ramp follows the length of the run"),
        ({"biases": [{"kind": "sphere", "radius": 9.0, "ramp": [0, 1]}]}, "the ramp of the bias 'sphere'"),
    ):
        place = SimulationDirectory(tmp_path / why[:8])
        short, long = (
            explore_config(inputs, exploration={**EXPLORATION, **changes, "steps": steps}) for steps in (10, 20)
        )
        place.path.mkdir()
        place.settle(short)
        write_json(place.summary, {})
        with pytest.raises(InputError, match=why):
            place.settle(long)


@pytest.mark.parametrize("parts", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["explore", "h5md"])
def test_damaged_files_are_one_sentence_or_do_no_harm(name, parts, inputs, explorer, runs, damages, tmp_path):
    """Files of a run that is over, and of one that was killed, replaced by every kind of wrong content.

    Without ``parts`` only those that are read, and one trajectory.
    """
    read = ("inputs.json", "summary.json"), ("state.npz", "thresholds.json", "traces.unfinished", "thermo.csv")
    files = dict(zip((runs[name], tmp_path / "killed"), (read[0], (*read[1], "trajectory.h5")), strict=True))
    with pytest.raises(Killed):
        again(name, inputs, tmp_path / "killed", ending(3, Killed), explorer)
    trouble = []
    for whole, few in files.items():
        for path in [path for path in sorted(whole.rglob("*")) if path.is_file() and path.name != ".lock.guard"]:
            for damage, content in damages(path, parts=parts).items() if parts or path.name in few else ():
                run = shutil.copytree(whole, tmp_path / "run")
                (run / path.relative_to(whole)).write_bytes(content)
                try:
                    found = again(name, inputs, run, SilentProgress(), explorer)
                    render_summary(found), failure(found)
                except InputError as error:
                    if path.name not in str(error) or "\n" in str(error):
                        trouble.append((whole.name, path.name, damage, str(error)))
                except Exception as error:
                    trouble.append((whole.name, path.name, damage, repr(error)))
                shutil.rmtree(run)
    assert not trouble, "\n".join(map(str, trouble))


DISTANCE = {"kind": "distance", "points": [0, 1]}
BIASES = [
    {"kind": "steered", "variable": DISTANCE, "stiffness": 8.0, "start": 1.05, "end": 1.25},
    {"kind": "metadynamics", "variables": [DISTANCE], "widths": [0.05], "height": 0.02, "pace": 10, "bias_factor": 8},
]


@pytest.fixture(scope="module")
def biased(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two walkers of a dimer with a thermostat, steered and under metadynamics; their own momenta have a drift."""
    folder = tmp_path_factory.mktemp("biased")
    dimer = Atoms("OH", [[0, 0, 0], [0, 0, 1.05]])
    dimer.set_momenta([[0, 0.3, 0.4], [0, -0.3, -0.4]] + dimer.get_masses()[:, None] * [0.05, 0, 0])
    write_structures(folder / "starts.extxyz", [dimer])
    exploration = {
        "walkers": [{"temperature": 600, "count": 2}],
        "steps": 400,
        "timestep": 0.1,
        "chunk": 100,
        "momenta": "start",
        "integrator": {"kind": "csvr", "time": 20},
        "biases": BIASES,
        "sanity": EXPLORATION["sanity"],
    }
    outputs = {"trajectory": {"every": 1}, "thermo": {"every": 1}}
    config = md_config(inputs, structures=folder / "starts.extxyz", thresholds=None, exploration=exploration, **outputs)
    run_md(config, folder / "run", committee(), SilentProgress())
    return folder / "run"


def table_of(run: Path) -> dict[str, np.ndarray]:
    with (run / "thermo.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def test_energies_of_the_table_are_those_of_the_frames_and_one_is_conserved(biased):
    """The thermostat, the steering and the hills move the total energy by far more than the conserved one."""
    table = table_of(biased)
    for w in range(2):
        frames = read(biased / "trajectories" / f"{w:03d}.extxyz", ":")
        kinetic = [frame.get_kinetic_energy() for frame in frames]
        np.testing.assert_allclose(table[f"kinetic_energy_{w}"], kinetic, rtol=1e-5)
        warmth = [frame.info["temperature"] for frame in frames]
        np.testing.assert_allclose(table[f"temperature_{w}"], warmth, rtol=1e-6)
        np.testing.assert_allclose(warmth, [2 * k / (3 * KB) for k in kinetic], rtol=1e-5)  # the centre of mass rests
        assert {frame.info["bath_temperature"] for frame in frames} == {600.0}
        total, conserved = table[f"total_energy_{w}"], table[f"conserved_energy_{w}"]
        parts = [table[f"{name}_{w}"] for name in ("potential_energy", "kinetic_energy", "bias")]
        np.testing.assert_allclose(total, sum(parts), atol=1e-8)
        assert np.ptp(total) > 0.05 and np.ptp(conserved) < 0.02 * np.ptp(total), (np.ptp(total), np.ptp(conserved))
        distances = [frame.get_distance(0, 1) for frame in frames]
        for name in ("bias0.distance", "bias1.distance"):
            np.testing.assert_allclose(table[f"{name}_{w}"], distances, atol=1e-5)
        np.testing.assert_allclose(table[f"bias0.centre_{w}"], 1.05 + 0.2 * np.arange(400) / 400, atol=1e-5)
        np.testing.assert_array_equal(table[f"bias1.hills_{w}"], np.arange(400) // 10)


def test_walkers_take_up_the_momenta_of_their_starts(inputs, biased, tmp_path):
    first = read(biased / "trajectories" / "000.extxyz", "0")
    assert np.abs(first.get_momenta() - [[0, 0.3, 0.4], [0, -0.3, -0.4]]).max() < 0.05
    asked = md_config(inputs, exploration={**EXPLORATION_OF_MD, "momenta": "start"})
    with pytest.raises(InputError, match="walker 0 has no momenta, which 'momenta: start' asks for"):
        run_md(asked, tmp_path / "run", committee(), SilentProgress())
    with pytest.raises(ValueError, match="integrator 'fire' has no momenta"):
        md_config(inputs, exploration={**EXPLORATION_OF_MD, "momenta": "start", "integrator": {"kind": "fire"}})


def test_averages_are_those_of_the_table(biased):
    table = table_of(biased)
    for w, walker in enumerate(json.loads((biased / "summary.json").read_text())["walkers"]):
        assert "pressure" not in walker["averages"], "an open structure has none"
        for name in ("conserved_energy", "temperature", "bias0.work"):
            found, values = walker["averages"][name], table[f"{name}_{w}"]
            slope = np.polyfit(table["time_ps"], values - values[0], 1)[0]
            assert found["mean"] == pytest.approx(values.mean(), rel=1e-9)
            assert found["fluctuation"] == pytest.approx(values.std(), rel=1e-6)
            assert found["drift"] == pytest.approx(slope, rel=1e-6)


def test_free_energy_of_a_run_is_the_sum_of_its_hills(biased, tmp_path):
    """By hand from the hills, walker by walker; the error is that of the mean of two."""
    out = tmp_path / "surface.csv"
    arguments = ["free-energy", str(biased), "--out", str(out), "--points", "41", "--range", "0.9,1.4"]
    arguments += ["--figure", str(tmp_path / "surface.png"), "--json", str(tmp_path / "j")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    rows = np.genfromtxt(out, delimiter=",", names=True)
    assert rows.dtype.names == ("distance_Angstrom", "free_energy_eV", "error_eV")
    hills, grid = read_npz(biased / "hills_1.npz"), np.linspace(0.9, 1.4, 41)
    assert list(hills["count"]) == [39, 39] and json.loads((tmp_path / "j").read_text())["hills"] == 78
    surfaces = []
    for centres, heights in zip(hills["centres"][:, :39, 0], hills["heights"][:, :39], strict=True):
        bias = (heights * np.exp(-0.5 * ((grid[:, None] - centres) / 0.05) ** 2)).sum(axis=1)
        surfaces.append(8 / 7 * (bias.max() - bias))
    mean = np.mean(surfaces, axis=0)
    np.testing.assert_allclose(rows["free_energy_eV"], mean - mean.min(), atol=1e-6)
    np.testing.assert_allclose(rows["error_eV"], np.abs(surfaces[0] - surfaces[1]) / 2, atol=1e-6)
    assert (tmp_path / "surface.png").stat().st_size > 5000
    wrong = CliRunner().invoke(app, ["free-energy", str(biased), "--out", str(out), "--bias", "0"])
    assert wrong.exit_code == 1 and "bias 0" in wrong.output and "choose 1" in wrong.output, wrong.output
    shutil.copytree(biased, tmp_path / "one")
    alone = hills | {"count": np.array([39, 0]), "heights": hills["heights"] * [[1], [0]]}
    write_npz(tmp_path / "one" / "hills_1.npz", alone)
    one = run_free_energy(tmp_path / "one", points=41, ranges=[(0.9, 1.4)])  # of two walkers one leaves no hills
    np.testing.assert_allclose(one.mean, surfaces[0] - surfaces[0].min(), atol=1e-6)
    config = tmp_path / "one" / "config.yaml"
    config.write_text(config.read_text().replace("bias: 1.0", "bias: 0.5"))
    with pytest.raises(InputError, match="had a factor on their biases"):
        run_free_energy(tmp_path / "one")
    hills = {name: array for name, array in hills.items() if name != "centres"}
    three = {name: np.repeat(hills.pop(name), 3) for name in ("widths", "periods", "names", "units")}
    shutil.copytree(biased, tmp_path / "run")
    centres = np.repeat(read_npz(biased / "hills_1.npz")["centres"], 3, axis=2)
    write_npz(tmp_path / "run" / "hills_1.npz", hills | three | {"centres": centres})
    assert run_free_energy(tmp_path / "run", points=3).mean.shape == (3, 3, 3)
    with pytest.raises(InputError, match="5000 points along each of 3 variables are too many; take 310 at most"):
        run_free_energy(tmp_path / "run", points=5000)
    with pytest.raises(InputError, match="of three variables cannot be drawn"):
        run_free_energy(tmp_path / "run", drawn=True)


def test_damaged_hills_are_one_sentence(biased, damages, tmp_path):
    shutil.copytree(biased, tmp_path / "run")
    for name in ("hills_1.npz", "config.yaml"):
        path = tmp_path / "run" / name
        whole = path.read_bytes()
        for damage, content in damages(path).items():
            if (name, damage) == ("config.yaml", "half"):
                continue  # that may hold all that is asked of it
            path.write_bytes(content)
            with pytest.raises(InputError) as error:
                run_free_energy(tmp_path / "run")
            assert "\n" not in str(error.value) and str(tmp_path / "run") in str(error.value), (name, damage)
        path.write_bytes(whole)
    arrays = read_npz(biased / "hills_1.npz")
    for name, array in arrays.items():
        write_npz(tmp_path / "run" / "hills_1.npz", arrays | {name: array[..., None]})
        try:
            run_free_energy(tmp_path / "run")
        except InputError as wrong:
            assert "hills_1.npz" in str(wrong), name


def test_structures_that_cannot_be_used_are_named(inputs, explorer, tmp_path):
    write_structures(tmp_path / "gold.extxyz", [Atoms("OH", [[0, 0, 0], [0, 0, 1]]), Atoms("Au")])
    for name, message in (("gold", r"gold\.extxyz, frame 1: atom 0 is Au"), ("no", r"no\.extxyz cannot be read")):
        config = md_config(inputs, structures=tmp_path / f"{name}.extxyz")
        with pytest.raises(InputError, match=message):
            run_md(config, tmp_path / "run", committee(), SilentProgress(), explorer)


def test_thresholds_of_ones_own_that_are_not_there_are_missed_before_anything_runs(inputs, explorer, tmp_path):
    config = md_config(inputs, thresholds={"kind": "user", "function": "nowhere:rule"}, training_set="none.extxyz")
    with pytest.raises(InputError, match="^thresholds: 'nowhere:rule' cannot be imported"):
        run_md(config, tmp_path / "run", committee(), SilentProgress(), explorer)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------ as users do it


MODEL = SharedDensitySettings(cutoff=3.0, radial=4, l_max=0, channels=4, hidden=(8,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a potential that was never trained, structures, and configs."""
    path = tmp_path_factory.mktemp("work")
    ensemble = Ensemble(build_model(MODEL, SpeciesTable((6,))), 2)
    params = jax.tree.map(np.asarray, jax.jit(ensemble.init)(jax.random.key(0)))
    Potential(MODEL, SpeciesTable((6,)), params, {6: -1000.0}).save(path / "potential")
    frames = [bulk("C", "diamond", a=3.6) for _ in range(12)]
    for n, frame in enumerate(frames):
        frame.rattle(0.05, seed=n)
        frame.calc = SinglePointCalculator(frame, energy=-2000.0, forces=np.full((2, 3), 0.1))
    write_structures(path / "train.extxyz", frames)
    write_structures(path / "start.extxyz", frames[:1])
    common = {"potential": "potential", "structures": "start.extxyz"}
    loose = {"sanity": {"max_temperature": 1000, "closest_contact": 0.1, "max_force": 1e4}}
    explore = {
        "exploration": {
            **loose,
            "walkers": [{"temperature": 300, "count": 2}],
            "steps": 40,
            "chunk": 20,
            "trajectory_every": 10,
            "gate": {"kind": "absolute", "score": "latent_distance"},
            "admission": {"kind": "farthest"},
        },
        "thresholds": {"kind": "conformal", "tolerance": 0.1, "stop_factor": 1e6},
        "training_set": "train.extxyz",
        "calibration_set": "train.extxyz",
    }
    md = {"exploration": {"walkers": [{"temperature": 300}]}}
    for name, content in (("explore", explore), ("md", md)):
        (path / f"{name}.yaml").write_text(yaml.safe_dump({**common, **content}))
    return path


def almlip(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the program as a user does."""
    environment = {**os.environ, "ALMLIP_CACHE_DIR": str(folder / "cache"), "COLUMNS": "160"}
    command = [sys.executable, "-m", "almlip_jax.cli", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_explore_as_a_user_runs_it(folder):
    """A gate on novelty with a threshold from true errors, an admission by features: all sets are read."""
    done = almlip(folder, "explore", "explore.yaml", "--out", "found", "--json", "found.json")
    assert "latent_distance" in done.stdout and "first departure" in done.stdout and "explore: 40 steps" in done.stderr
    found = json.loads((folder / "found.json").read_text())
    assert found == json.loads((folder / "found" / "summary.json").read_text())
    assert [walker["walker"] for walker in found["walkers"]] == [0, 1] and found["score"] == "latent_distance"
    assert found["walkers"][0]["departure"] > 0 and found["stop"] == pytest.approx(1e6 * found["record"])
    assert {"latent_distance", "departed_step"} <= set(read_npz(folder / "found" / "exploration.npz"))


@pytest.mark.slow
def test_a_potential_that_knows_its_training_set_explores_without_it(folder):
    """The same walkers by the same thresholds, relative to scores that the potential kept."""
    Potential.load(folder / "potential").knowing(read_structures(folder / "train.extxyz")).save(folder / "knowing")
    config = yaml.safe_load((folder / "explore.yaml").read_text()) | {"thresholds": {"kind": "relative"}}
    without = {key: value for key, value in config.items() if key != "training_set"} | {"potential": "knowing"}
    for name, content in (("with", config), ("without", without)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        almlip(folder, "explore", f"{name}.yaml", "--out", name)
    kept, given = (json.loads((folder / name / "thresholds.json").read_text()) for name in ("without", "with"))
    assert kept["record"] == pytest.approx(given["record"], rel=1e-4) and kept["record"] > 0.05
    one, two = (read_npz(folder / name / "exploration.npz") for name in ("without", "with"))
    np.testing.assert_allclose(one["latent_distance"], two["latent_distance"], rtol=1e-4)


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        ("explore", {"training_set": None}, "training_set is missing, which is needed for the novelty score"),
        ("explore", {"calibration_set": None}, "calibration_set is missing, which is needed for conformal"),
        (
            "explore",
            {"thresholds": {"kind": "conformal", "tolerance": 0.1, "frames": 9}},
            "thresholds.frames are drawn in campaigns only",
        ),
        ("explore", {"thresholds": {"kind": "calibrated"}}, "thresholds.tolerance: the key is missing"),
        ("explore", {"potential": "nowhere"}, "nowhere is not a potential"),
        ("md", {"trajektory": {}}, "unknown key 'trajektory'; did you mean 'trajectory'?"),
        ("md", {"thermo": {"every": 9973}, "trajectory": {"every": 997}}, "no common multiple up to 20000"),
        ("md", {"exploration": {"trace_every": 20}}, "exploration.trace_every is not used here; set thermo.every"),
        ("md", {"thermo": {"every": 5000}}, "thermo.every 5000 is more than exploration.steps"),
    ],
)
def test_mistakes_are_one_sentence(folder, tmp_path, monkeypatch, command, changes, message):
    monkeypatch.setattr("almlip_jax.compilation.prepare_jax", lambda _: None)  # this process is not theirs
    config = yaml.safe_load((folder / f"{command}.yaml").read_text()) | changes
    (folder / "wrong.yaml").write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(app, [command, str(folder / "wrong.yaml"), "--out", str(tmp_path / "run")])
    said = result.stderr.strip()
    assert result.exit_code == 1 and message in said and "\n" not in said


@pytest.mark.parametrize("command", ["md", "explore"])
def test_a_run_whose_walkers_all_died_is_no_success(command, inputs, explorer, folder, tmp_path, monkeypatch, capsys):
    """The summary is written, the exit status is 1, and a sentence names step and cause; also when asked again."""
    ase_write(tmp_path / "crushed.extxyz", Atoms("OH", [[0, 0, 0], [0, 0, 0.3]]), columns=["symbols", "positions"])
    explorer = copy.copy(explorer)
    sanity = explorer.settings.sanity.model_copy(update={"closest_contact": 0.9})
    explorer.settings = explorer.settings.model_copy(update={"sanity": sanity})
    make, work = {"md": (md_config, run_md), "explore": (explore_config, run_exploration)}[command]
    config = make(inputs, structures=tmp_path / "crushed.extxyz")
    monkeypatch.setattr("almlip_jax.compilation.prepare_jax", lambda _: None)  # this process is not theirs
    monkeypatch.setattr("almlip_jax.cli.simulations.load_potential", lambda _, types=None: committee())
    monkeypatch.setattr(
        f"almlip_jax.simulation.{work.__name__}",
        lambda _, place, potential, progress: work(config, place, potential, progress, explorer),
    )
    arguments = [command, str(folder / f"{command}.yaml"), "--out", str(tmp_path / "run"), "--json"]
    for name in ("first.json", "again.json"):
        with pytest.raises(SystemExit) as end:
            app([*arguments, str(tmp_path / name)])
        said = " ".join(capsys.readouterr().err.split())
        assert end.value.code == 1
        assert "each of the 3 walkers" in said and "at step 1: two atoms came too close" in said
        summary = json.loads((tmp_path / name).read_text())
        assert [walker["status"] for walker in summary["walkers"]] == ["unphysical"] * 3
    summary["walkers"][1] |= {"status": "stopped"}  # by the gate, as it was told to
    assert failure(summary) is None


def test_an_interruption_says_how_to_go_on_as_a_shell_takes_it(folder, tmp_path, monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("almlip_jax.cli.simulations.load_potential", lambda _, types=None: None)
    monkeypatch.setattr("almlip_jax.simulation.run_md", interrupted)
    arguments = ["md", str(folder / "md.yaml"), "--out", str(tmp_path / "my run"), "--set", "structures='a b.extxyz'"]
    with pytest.raises(SystemExit) as end:
        app(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 130
    assert shlex.split(said.partition("go on with: ")[2]) == ["almlip", *arguments]


def test_schemas_of_all_configs():
    for kind, title in (("campaign", "ExperimentConfig"), ("explore", "ExploreConfig"), ("md", "MdConfig")):
        done = CliRunner().invoke(app, ["schema", "--of", kind])
        assert json.loads(done.stdout)["title"] == title
