"""Options and config keys that say how files are read reach the files; conversions lose nothing that has a place."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from typer.testing import CliRunner

from almlip_jax import cli
from almlip_jax.campaign.config import ExperimentConfig, load_config
from almlip_jax.campaign.preparation import bare_frames, labelled_frames
from almlip_jax.campaign.settings import InitialSettings, SystemSettings
from almlip_jax.campaign.settings import TestFileSettings as FileOfTest
from almlip_jax.cli import inputs, potentials
from almlip_jax.ensembles import EnsembleSettings
from almlip_jax.errors import InputError
from almlip_jax.files import write_json
from almlip_jax.models.mtp.text import template
from almlip_jax.oracles.sources.external import ExternalSettings, _read
from almlip_jax.oracles.sources.labelled_file import FileSettings
from almlip_jax.potential.file_types import FileTypes
from almlip_jax.simulation.run import _Run
from almlip_jax.simulation.settings import ExploreConfig
from almlip_jax.structures.io import read_structures, write_cfg, write_structures
from almlip_jax.structures.labels import LabelKeys
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.sweep.pools import read_pool
from almlip_jax.sweep.settings import SweepConfig
from almlip_jax.units import GPA

CONFIG = {
    "system": {"structures": "start.cfg", "types": ["O", "Mg"]},
    "oracle": {"kind": "file", "path": "named.extxyz", "keys": {"energy": "dft_energy", "forces": "dft_forces"}},
    "initial": {"dataset": "named.extxyz", "keys": {"energy": "dft_energy", "forces": "dft_forces"}},
    "test": {"files": [{"path": "plain.cfg", "types": ["O", "Mg"]}]},
}
KEYS = ["--energy-key", "dft_energy", "--forces-key", "dft_forces"]


def labelled(seed: int) -> Atoms:
    rng = np.random.default_rng(seed)
    atoms = bulk("MgO", "rocksalt", a=4.2)
    atoms.rattle(0.05, rng=rng)
    results = {"energy": float(rng.normal()), "forces": rng.normal(size=(2, 3)), "stress": 0.01 * rng.normal(size=6)}
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info = {"weight": 2.0, "origin": "a b", "step": seed, "grade": 1 / 3}
    return atoms


FRAMES = [labelled(seed) for seed in range(3)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same frames under the usual names, under those of somebody's DFT code (stress in GPa), and of MLIP-2."""
    named = []
    for atoms in FRAMES:
        other = Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=True, info={"weight": 2.0})
        other.info |= {"dft_energy": atoms.get_potential_energy(), "dft_stress": atoms.get_stress() / GPA}
        other.info["dft_virial"] = -atoms.get_volume() * atoms.get_stress()
        other.arrays["dft_forces"] = atoms.get_forces()
        named.append(other)
    write_structures(tmp_path / "plain.extxyz", FRAMES)
    write_structures(tmp_path / "named.extxyz", named)
    write_cfg(tmp_path / "plain.cfg", FRAMES, [8, 12])
    write_cfg(tmp_path / "start.cfg", [Atoms(atoms) for atoms in FRAMES], [8, 12])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Seen(Exception):
    """Raised with the structures that a command has read, in place of what it would compute from them."""


@pytest.fixture
def reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs a command up to where its structures go into a potential, and gives the structures."""

    class Potential:
        member_settings = EnsembleSettings()
        ensemble = SimpleNamespace(targets=())
        species = SpeciesTable((8, 12))
        type_numbers = (8, 12)
        metadata: ClassVar[dict[str, Any]] = {}

        def check_elements(self, *_: Any) -> None:
            """It knows all."""

        def evaluate(self, frames: list[Atoms], **_: Any) -> None:
            seen.append(frames)
            raise Seen

        def evaluate_stream(self, frames: Iterator[Atoms], **_: Any) -> Iterator[Any]:
            self.evaluate(list(frames))
            yield

    def fit(frames: list[Atoms], *_: Any) -> None:
        seen.append(frames)
        raise Seen

    def select(_selector: Any, _potential: Any, pool: list[Atoms], *_: Any, **__: Any) -> None:
        seen.append(pool)
        raise Seen

    def run(*arguments: str) -> list[Atoms]:
        done = CliRunner().invoke(cli.app, list(arguments))
        assert isinstance(done.exception, Seen), done.exception
        return seen.pop()

    seen: list[list[Atoms]] = []
    for commands in (inputs, potentials):
        monkeypatch.setattr(commands, "load_potential", lambda _, types=None: Potential())
    monkeypatch.setattr("almlip_jax.compilation.prepare_jax", lambda _: None)
    monkeypatch.setattr("almlip_jax.fitting.fit_potential", fit)
    monkeypatch.setattr("almlip_jax.steps.select", select)
    run.seen, run.potential = seen, Potential  # type: ignore[attr-defined]
    yield run


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(cli.app, list(arguments))
    _, said, message = done.stderr.partition("almlip: ")
    assert done.exit_code == 1 and said, done.output
    return message


def assert_labels(frames: list[Atoms], *, stress: bool = True, expected: list[Atoms] = FRAMES) -> None:
    assert len(frames) == len(expected)
    for found, one in zip(frames, expected, strict=True):
        assert found.symbols.get_chemical_formula() == "MgO"
        assert found.get_potential_energy() == pytest.approx(one.get_potential_energy(), rel=1e-14)
        np.testing.assert_allclose(found.get_forces(), one.get_forces(), rtol=1e-14)
        assert ("stress" in found.calc.results) == stress
        if stress:
            np.testing.assert_allclose(found.get_stress(), one.get_stress(), rtol=1e-12)


@pytest.mark.parametrize(
    "command", [["evaluate", "potential"], ["train", "config.yaml", "--out", "potential", "--data"]]
)
def test_labels_are_read_by_their_keys(reads: Any, command: list[str]) -> None:
    assert_labels(reads(*command, "plain.extxyz"))
    assert_labels(reads(*command, "named.extxyz", *KEYS), stress=False)
    assert_labels(reads(*command, "named.extxyz", *KEYS, "--stress-key", "dft_stress", "--stress-unit", "GPa"))
    assert_labels(reads(*command, "named.extxyz", *KEYS, "--virial-key", "dft_virial"))
    assert_labels(reads(*command, "plain.cfg", "--types", "O,Mg"))
    assert "perhaps dft_energy, dft_forces) with --energy-key and --forces-key" in refused(*command, "named.extxyz")
    assert "which by its name is a virial" in refused(*command, "named.extxyz", "--stress-key", "dft_virial")
    assert refused(*command, "named.extxyz", "--energy-key", "e").startswith(
        "named.extxyz, frame 0 has no energy"
        if command[0] == "train"
        else "no structure of named.extxyz has 'e', which"
    )
    assert "stress_unit: Input should be 'eV/A^3'" in refused(*command, "named.extxyz", "--stress-unit", "bar")
    assert "'Qq' is not an element" in refused(*command, "plain.cfg", "--types", "O Qq")


def test_training_data_are_one_set(reads: Any) -> None:
    train = ["train", "config.yaml", "--out", "potential", "--set", "system.types=null"]
    both = reads(*train, "--data", "plain.extxyz", "--data", "plain.cfg", "--types", "O,Mg")
    assert_labels(both, expected=[*FRAMES, *FRAMES])
    assert "plain.cfg is an MLIP-2 file; say which element" in refused(*train, "--data", "plain.cfg")
    named = "system.keys={energy: dft_energy, forces: dft_forces, virial: dft_virial}"
    assert_labels(reads(*train, "--data", "named.extxyz", "--set", named))
    over = reads(*train, "--data", "named.extxyz", "--set", "system.keys={energy: other, forces: dft_forces}", *KEYS)
    assert_labels(over, stress=False)


def test_types_are_those_that_a_potential_remembers(reads: Any, folder: Path) -> None:
    """In MLIP-2 the types of a file are those of the potential; another order is taken, and said."""
    evaluate, score = ("evaluate", "potential", "plain.cfg"), ("score", "potential", "plain.cfg", "--out", "out.cfg")
    reads.potential.metadata = FileTypes((8, 12)).note()
    assert_labels(reads(*evaluate))
    assert_labels(reads(*score))
    picks = ["--train", "plain.cfg", "--pool", "plain.cfg", "--out", "batch.cfg", "-k", "1"]
    found = reads("select", "config.yaml", "--potential", "potential", *picks, "--set", "system.types=null")
    assert [frame.symbols.get_chemical_formula() for frame in found] == [str(frame.symbols) for frame in FRAMES]

    for command in (evaluate, score):
        done = CliRunner().invoke(cli.app, [*command, "--types", "Mg,O"])
        told = " ".join((done.output + done.stderr).split())
        assert "types are taken for Mg, O; those of the files of potential are O, Mg" in told
        swapped = {8: 12, 12: 8}
        expected = [[swapped[z] for z in frame.numbers] for frame in FRAMES]
        assert [frame.numbers.tolist() for frame in reads.seen.pop()] == expected
        done = CliRunner().invoke(cli.app, [*command, "--types", "O,Mg"])
        assert "are taken for" not in done.output + done.stderr


def test_a_training_reads_the_types_of_the_potential_that_it_begins_with(
    reads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or elements would change places between the files of before and those of now without a word."""
    monkeypatch.setattr("almlip_jax.saved_potential.SavedPotential.read", lambda *_: None)
    monkeypatch.setattr(potentials, "_as_of", lambda start, saved, settings: settings)
    train = ["train", "config.yaml", "--out", "potential", "--data", "plain.cfg", "--set", "system.types=null"]
    reads.potential.metadata = FileTypes((8, 12)).note()
    assert_labels(reads(*train, "--from", "potential"))
    done = CliRunner().invoke(cli.app, [*train, "--from", "potential", "--types", "Mg,O"])
    told = " ".join((done.output + done.stderr).split())
    assert "types are taken for Mg, O; those of the files of potential are O, Mg" in told


def test_a_file_that_a_training_begins_with_has_the_first_types(
    reads: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data may have further elements, which the training adds."""
    told: list[Any] = []
    loaded = potentials.load_potential
    monkeypatch.setattr(
        potentials, "load_potential", lambda path, types=None: (told.append(types), loaded(path, types))[1]
    )
    monkeypatch.setattr("almlip_jax.saved_potential.SavedPotential.read", lambda _, types: told.append(types))
    monkeypatch.setattr(potentials, "_as_of", lambda start, saved, settings: settings)
    (folder / "oxygen.mtp").write_text(template(4))
    train = ["train", "config.yaml", "--out", "potential", "--data", "plain.cfg", "--types", "O,Mg"]
    assert_labels(reads(*train, "--from", "oxygen.mtp"))
    assert_labels(reads(*train, "--from", "potential"))
    assert told == [("O",), ("O",), ("O", "Mg"), ("O", "Mg")]


def test_candidates_need_types_but_no_labels(reads: Any, folder: Path) -> None:
    pick = ["select", "config.yaml", "--potential", "potential", "-k", "1", "--out", "batch.xyz"]
    pick += ["--set", "system.types=null", "--train", "plain.cfg", "--pool", "plain.cfg", "--types", "O,Mg"]
    frames = reads(*pick)
    assert [atoms.get_chemical_formula() for atoms in frames] == ["MgO"] * 3 and frames[0].calc is None
    for name in ("s.xyz", "s.cfg", "s.db"):
        assert_labels(reads("score", "potential", "plain.cfg", "--out", name, "--types", "O,Mg"))
    assert "plain.cfg is an MLIP-2 file" in refused("score", "potential", "plain.cfg", "--out", "s.xyz")
    text = (folder / "plain.extxyz").read_text().replace("energy=", "energy=nan old=")
    (folder / "bad.extxyz").write_text(text)
    assert len(reads("score", "potential", "bad.extxyz", "--out", "s.xyz")) == 3


# -------------------------------------------------------------------------------------------------------------- configs


def test_configs_say_how_files_are_read(folder: Path) -> None:
    config = load_config(folder / "config.yaml")
    system, initial, test = config.system, config.initial, config.test.files[0]
    assert initial.dataset is not None
    assert_labels(labelled_frames(initial.dataset, system, initial), stress=False)
    assert_labels(labelled_frames(test.path, system, test))
    assert labelled_frames(initial.dataset, system, initial)[0].info == {"charge": 0, "spin": 1, "weight": 2.0}
    starts = bare_frames(folder / "start.cfg", system)
    assert [atoms.get_chemical_formula() for atoms in starts] == ["MgO"] * 3
    everywhere = SystemSettings(keys={"energy": "dft_energy", "forces": "dft_forces"}, types=("O", "Mg"))
    plain = FileOfTest(path=folder / "plain.extxyz", keys={})
    assert_labels(labelled_frames(folder / "named.extxyz", everywhere, InitialSettings(dataset="x")), stress=False)
    assert_labels(labelled_frames(plain.path, everywhere, plain))
    assert_labels([*map(labelled_by(config), FRAMES)], stress=False)


def labelled_by(config: ExperimentConfig) -> Any:
    source = config.oracle.build()

    def label(atoms: Atoms) -> Atoms:
        found, bare = source(atoms), atoms.copy()
        stress = {} if found.stress is None else {"stress": found.stress}
        bare.calc = SinglePointCalculator(bare, energy=found.energy, forces=found.forces, **stress)
        return bare

    return label


def test_the_label_source_keeps_its_identity(folder: Path) -> None:
    """Labels of earlier versions are found again, whose configs name the keys one by one."""
    before = FileSettings(
        path=folder / "named.extxyz", energy_key="dft_energy", forces_key="dft_forces", stress_key=None
    )
    now = FileSettings(path=folder / "named.extxyz", keys={"energy": "dft_energy", "forces": "dft_forces"})
    identity = {"kind": "file", "energy_key": "dft_energy", "forces_key": "dft_forces", "stress_key": None}
    assert before == now and now.identity() == identity | {"tolerance": 1e-8}
    with_virial = FileSettings(path="x", keys={"virial": "v"}, types=("Si", "X"))
    assert with_virial.identity()["virial"] == "v" and with_virial.identity()["types"] == ["Si", "X"]
    with pytest.raises(ValueError, match="energy_key belong in keys, which is given as well"):
        FileSettings(path="x", keys={"virial": "v"}, energy_key="e")
    with pytest.raises(ValueError, match="'Qq' is not an element"):
        FileSettings(path="x", types=("Qq",))


def test_results_from_elsewhere_are_read_by_their_keys(folder: Path) -> None:
    (folder / "results").mkdir()
    for name in ("named.extxyz", "plain.cfg"):
        (folder / name).rename(folder / "results" / name)
    keys = {"virial": "dft_virial", "energy": "dft_energy"}
    for given in ({"keys": keys | {"forces": "dft_forces"}}, {"keys": keys, "forces_key": "dft_forces"}):
        oracle = ExternalSettings(method="m", folder=folder, **given)
        assert_labels(_read(folder / "results" / "named.extxyz", oracle))
        assert oracle.identity() == {"kind": "external", "method": "m"}
    typed = ExternalSettings(method="m", folder=folder, types=("O", "Mg"))
    assert_labels(_read(folder / "results" / "plain.cfg", typed))


def test_sweeps_say_how_files_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALMLIP_DATA_DIR", raising=False)
    system = {
        "pool": ["named.extxyz"],
        "keys": {"energy": "dft_energy", "forces": "dft_forces", "virial": "dft_virial"},
        "tests": {"same": {"file": "plain.cfg", "keys": {}, "types": ["O", "Mg"]}},
        "initial": 1,
    }
    content = {"systems": {"mgo": system}, "selectors": {"random": {"kind": "random"}}, "rounds": 1, "batch_sizes": [1]}
    config = SweepConfig.model_validate(content).based(folder)
    with pytest.raises(InputError, match="the pool of mgo has 0 structures that are in no other set"):
        read_pool(config, "mgo")
    more = [labelled(seed) for seed in range(10, 15)]
    write_cfg(folder / "plain.cfg", more, [8, 12])
    pool = read_pool(config, "mgo")
    assert_labels(pool.frames)
    assert_labels(pool.tests, expected=more)
    assert config.systems["mgo"].readings["same"] == {"keys": {}, "types": ["O", "Mg"]}
    untold = SweepConfig.model_validate(content | {"systems": {"mgo": {"pool": "a", "tests": {"b": "b"}}}})
    assert untold.systems["mgo"].readings == {}


def test_configs_of_runs_say_how_files_are_read(folder: Path) -> None:
    content = {
        "potential": folder / "potential",
        "structures": folder / "start.cfg",
        "calibration_set": folder / "named.extxyz",
        "exploration": {"walkers": [{"temperature": 300}], "steps": 10},
        "thresholds": {"kind": "calibrated", "tolerance": 0.1},
        "keys": {"energy": "dft_energy", "forces": "dft_forces"},
        "types": ["O", "Mg"],
    }
    config = ExploreConfig.model_validate(content)
    starts = _Run.bare_structures(SimpleNamespace(config=config), config.structures)
    assert [atoms.get_chemical_formula() for atoms in starts] == ["MgO"] * 3
    assert_labels(read_structures(config.calibration_set, require_labels=True, **config.arguments), stress=False)


def test_generated_structures_are_written_as_a_campaign_would_label_them(folder: Path) -> None:
    made = [{"kind": "strained", "count": 4}, {"kind": "vacancies", "count": 2, "repeat": [2, 1, 1]}]
    content = CONFIG | {"initial": {"generated": made, "from_generated": {"count": 5}}}
    (folder / "made.yaml").write_text(yaml.safe_dump(content))
    done = CliRunner().invoke(cli.app, ["generate", "made.yaml", "--out", "made.extxyz", "--json", "made.json"])
    assert done.exit_code == 0, done.exception
    found = read_structures(folder / "made.extxyz")
    told = json.loads((folder / "made.json").read_text())
    assert told["num_structures"] == len(found) == 5 == sum(told["by_kind"].values())
    assert [frame.info["generator"] for frame in found] == [k for k, n in told["by_kind"].items() for _ in range(n)]
    assert CliRunner().invoke(cli.app, ["generate", "made.yaml", "--out", "made.cfg"]).exit_code == 0
    again = read_structures(folder / "made.cfg", type_numbers=[8, 12])  # types of the config
    assert [str(frame.symbols) for frame in again] == [str(frame.symbols) for frame in found]
    assert [frame.info["generator"] for frame in again] == [frame.info["generator"] for frame in found]
    (folder / "none.yaml").write_text(yaml.safe_dump(CONFIG))
    done = CliRunner().invoke(cli.app, ["generate", "none.yaml", "--out", "none.extxyz"])
    assert done.exit_code == 1 and "says nothing in initial.generated" in " ".join(done.output.split())


def test_types_are_said_to_commands_of_configs_too(folder: Path, reads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(_: Any, __: Path, structures: list[Atoms], **___: Any) -> None:
        reads.seen.append(structures)
        raise Seen

    def run(*arguments: str) -> None:
        done = CliRunner().invoke(cli.app, [*arguments, "--set", "system.types=null"])
        assert done.exit_code == 0, (done.output, done.exception)

    monkeypatch.setattr("almlip_jax.interfaces.stablehlo.export_stablehlo", export)
    asked = ["export", "potential", "out.zip", "--stablehlo", "--like"]
    assert [str(atoms.symbols) for atoms in reads(*asked, "start.cfg", "--types", "O,Mg")] == ["MgO"] * 3
    assert "start.cfg is an MLIP-2 file; say which element" in refused(*asked, "start.cfg")
    content = CONFIG | {"initial": {"generated": [{"kind": "strained", "count": 3}], "from_generated": {"count": 2}}}
    (folder / "made.yaml").write_text(yaml.safe_dump(content))
    run("generate", "made.yaml", "--out", "made.cfg", "--types", "O,Mg")
    assert [str(atoms.symbols) for atoms in read_structures(folder / "made.cfg", type_numbers=[8, 12])] == ["MgO"] * 2
    run("label", "config.yaml", "start.cfg", "--out", "labelled.cfg", "--types", "O,Mg")
    assert_labels(read_structures(folder / "labelled.cfg", type_numbers=[8, 12]), stress=False)


def test_types_that_a_file_lacks_are_missed_before_a_label_is_paid(folder: Path) -> None:
    said = refused("label", "config.yaml", "plain.extxyz", "--out", "labelled.cfg", "--types", "X,O")
    assert said.startswith("plain.extxyz, frame 0: no type is given for atomic number 12; add it.")
    assert not (folder / "labelled.db").exists()


# ---------------------------------------------------------------------------------------------------------- conversions


def test_structures_are_converted_in_a_circle(folder: Path) -> None:
    """Labels, weights, numbers and texts of `info` come back through all three formats."""
    names = ["plain.extxyz", "one.cfg", "two.db", "three.extxyz"]
    for source, target in zip(names[:-1], names[1:], strict=True):
        options = ["--types", "O,Mg"] if "cfg" in source + target else []
        done = CliRunner().invoke(cli.app, ["convert", source, target, *options, "--json", "convert.json"])
        assert done.exit_code == 0, done.exception
        assert json.loads((folder / "convert.json").read_text()) == {
            "structures": 3,
            "types": ["O", "Mg"] if target == "one.cfg" else [],
            "left_out": [],
            "out": target,
        }
        found = read_structures(folder / target, type_numbers=[8, 12])
        assert_labels(found)
        for atoms, expected in zip(found, FRAMES, strict=True):
            np.testing.assert_array_equal(atoms.positions, expected.positions)
            assert atoms.info == expected.info


def test_a_conversion_says_what_it_leaves_out(folder: Path) -> None:
    frames = [atoms.copy() for atoms in FRAMES]
    for atoms in frames:
        atoms.info["vector"] = np.arange(3)
        atoms.set_array("site", np.eye(2))
    write_structures(folder / "more.extxyz", frames)
    for target, left_out, types in (("a.cfg", ["site", "vector"], ["O", "Mg"]), ("a.db", ["site"], [])):
        done = CliRunner().invoke(cli.app, ["convert", "more.extxyz", target, "--json", "convert.json"])
        assert done.exit_code == 0, done.exception
        told = json.loads((folder / "convert.json").read_text())
        assert told["left_out"] == left_out and told["types"] == types
    np.testing.assert_array_equal(read_structures(folder / "a.db")[0].info["vector"], np.arange(3))
    keyed = ["convert", "named.extxyz", "keyed.xyz", *KEYS, "--stress-key", "dft_stress", "--stress-unit", "GPa"]
    assert CliRunner().invoke(cli.app, keyed).exit_code == 0
    assert_labels(read_structures(folder / "keyed.xyz"))
    keyed = ["convert", "named.extxyz", "keyed.xyz", *KEYS, "--virial-key", "dft_virial"]
    assert CliRunner().invoke(cli.app, keyed).exit_code == 0
    assert_labels(read_structures(folder / "keyed.xyz", keys=LabelKeys()))
    assert "should end in .extxyz, .xyz, .cfg" in refused("convert", "plain.extxyz", "plain.json")
    assert "no type is given for atomic number 12" in refused("convert", "plain.extxyz", "a.cfg", "--types", "O")


POOL = ["--potential", "p", "--pool", "x", "--train", "x", "-k", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "p", "x.xyz", "--json", "."], ". is a folder; give the name of a file"),
        (["score", "p", "x.xyz", "--out", "a.extxyz/b.txt"], "should end in .extxyz or .xyz"),
        (["score", "p", "x.xyz", "--out", "file/b.xyz"], "file/b.xyz cannot be written, since file is not a folder"),
        (["select", "c.yaml", *POOL, "--out", "folder.xyz"], "folder.xyz is a folder"),
        (["label", "c.yaml", "x.xyz", "--out", "y.xyz", "--db", "folder.xyz"], "folder.xyz is a folder"),
        (["train", "c.yaml", "--data", "x.xyz", "--out", "file"], "file is a file; give a folder"),
        (["run", "c.yaml", "--run-dir", "file/run"], "file/run cannot be written, since file is not a folder"),
        (["md", "c.yaml", "--out", "file"], "file is a file; give a folder"),
        (["sweep", "c.yaml", "--out", "file"], "file is a file; give a folder"),
        (["figure", "all", "x.csv", "--out", "file"], "file is a file; give a folder"),
        (["init", "zundel", "--out", "file/y"], "file/y cannot be written"),
        (["evaluate", "p", "x.xyz", "--predictions", "file/b.xyz"], "file/b.xyz cannot be written"),
        (["evaluate", "p", "x.xyz", "--predictions", "b.txt"], "b.txt should end in .extxyz or .xyz"),
        (["evaluate", "p", "x.xyz", "--figures", "file"], "file is a file; give a folder"),
        (["free-energy", "run", "--out", "folder.xyz"], "folder.xyz is a folder"),
        (["free-energy", "run", "--out", "a.csv", "--figure", "file/a.png"], "file/a.png cannot be written"),
        (["free-energy", "run", "--out", "a.csv", "--figure", "surface"], "surface should end in .png, .pdf or .svg"),
        (["export", "p", "x.xyz", "--like", "./x.xyz", "--stablehlo"], "x.xyz is read; give another file to write"),
    ],
)
def test_places_are_looked_at_before_the_work(arguments, message, tmp_path, monkeypatch, capsys):
    """No input can be used: a place that cannot be written to is told of first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.xyz").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.xyz").mkdir()
    with pytest.raises(SystemExit) as ended:
        cli.app(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 1 and message in error and error.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipes_and_devices_are_written_to_and_stay_what_they_are(tmp_path):
    """As root, a file that takes the place of /dev/null would break the machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_json(pipe, {"number": 1})
        assert json.loads(os.read(reader, 100)) == {"number": 1} and pipe.is_fifo()
    finally:
        os.close(reader)
    (tmp_path / "nothing").symlink_to(os.devnull)
    write_json(tmp_path / "nothing", {"number": 1})
    assert (tmp_path / "nothing").is_char_device() and (tmp_path / "nothing").is_symlink()
