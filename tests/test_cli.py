"""The command line, every command for real: one tiny campaign and one tiny potential serve them all."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import read
from rich.console import Console, Group
from rich.panel import Panel
from tiny_campaign import SECTIONS

from almlip_jax import __version__, cli
from almlip_jax.campaign.loop import Outcome
from almlip_jax.cli import output, program
from almlip_jax.cli.campaigns import show_outcome
from almlip_jax.errors import InputError
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.yaml_text import parse_yaml, yaml_text

# Of the sizes of the tiny campaign in every respect: programs of its trainings and explorations serve here, too.
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "system": {"structures": "water.extxyz"},
    "oracle": {"kind": "ase", "calculator": "ase.calculators.emt:EMT"},
    "executor": {"kind": "local", "workers": 1},
    "initial": {"rattle": {"count": 8, "stdev": 0.05}},
    "model": SECTIONS["model"],
    "ensemble": SECTIONS["ensemble"],
    "training": SECTIONS["training"],
    "exploration": SECTIONS["exploration"] | {"thresholds": {"kind": "fixed", "record": 0.001, "stop": 100.0}},
    "selection": SECTIONS["selection"],
    "stopping": SECTIONS["stopping"] | {"max_labels": 11},
}
FRAMES = 14
"""Labelled structures, as many as the dataset of that campaign has in the end."""


@dataclass(frozen=True)
class Done:
    """What a command printed, and how it ended."""

    stdout: str
    stderr: str
    prepared: tuple[str, ...] = ()
    """Precisions for which the command would have set up a process of its own, one for each time that it asked."""


def almlip(folder: Path, *arguments: str, code: int = 0) -> Done:
    """Runs the program in this process, as if it had been called in the folder; the process is set up already."""
    out, err, status, prepared = io.StringIO(), io.StringIO(), 0, []
    environment = {"ALMLIP_CACHE_DIR": str(folder / "cache"), "COLUMNS": "160"}
    with (
        contextlib.chdir(folder),
        patch.dict(os.environ, environment),
        patch.object(sys, "argv", ["almlip", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.object(output, "console", Console(width=160)),
        patch("almlip_jax.compilation.prepare_jax", prepared.append),
    ):
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
    done = Done(out.getvalue(), err.getvalue(), tuple(prepared))
    assert status == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def in_a_process_of_its_own(folder: Path, *arguments: str) -> Done:
    """Runs the program as a user does."""
    environment = {**os.environ, "ALMLIP_CACHE_DIR": str(folder / "cache"), "COLUMNS": "160"}
    command = [sys.executable, "-m", "almlip_jax.cli", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return Done(done.stdout, done.stderr)


def labelled(seed: int) -> Atoms:
    atoms = molecule("H2O")
    atoms.rattle(0.07, seed=seed)
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info["group"] = "even" if seed % 2 == 0 else "odd"
    return atoms


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, Done]:
    """A working folder with a config, data and a potential, and what its training said."""
    path = tmp_path_factory.mktemp("work")
    (path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    write_structures(path / "water.extxyz", [molecule("H2O")])
    write_structures(path / "data.extxyz", [labelled(seed) for seed in range(FRAMES)])
    more = ["--data", "data.extxyz", "--out", "potential", "--json", "train.json"]
    return path, almlip(path, "train", "config.yaml", *more)


@pytest.fixture(scope="module")
def folder(study) -> Path:
    return study[0]


def found(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_train(study):
    folder, done = study
    assert done.prepared == ("float32",) and "train: 300 steps in" in done.stderr and "learning curve" in done.stdout
    result = found(folder, "train.json")
    assert result["structures"] == FRAMES and result["steps"] == 300 and result["validation_forces_rmse"] > 0
    assert (folder / "potential" / "potential.json").exists()
    curve = (folder / "potential.training.csv").read_text().splitlines()
    assert curve[0].startswith("epoch,step,train_loss_0,train_loss_1,validation_loss_0") and ",300," in curve[-1]


@pytest.mark.slow
def test_train_on_little_more_than_data(folder):
    """An empty config, files for validation, isolated atoms; then further from there, on one new element."""
    (folder / "empty.yaml").write_text("")
    alone = [Atoms(symbol) for symbol in "HO"]
    for atoms, energy in zip(alone, (-13.5, -2040.25), strict=True):
        atoms.calc = SinglePointCalculator(atoms, energy=energy)
        atoms.info["config_type"] = "IsolatedAtom"
    write_structures(folder / "alone.extxyz", alone)
    frames = read_structures(folder / "data.extxyz")
    write_structures(folder / "learned.extxyz", frames[:-4])
    write_structures(folder / "judging.extxyz", frames[-4:])
    short = ["--set", "training.max_steps=7", "--set", "model.size=tiny"]
    more = ["--data", "alone.extxyz", "--validation", "judging.extxyz"]
    more += ["--data", "learned.extxyz", "--out", "bare", "--json", "b.json"]
    almlip(folder, "train", "empty.yaml", *more, *short)
    assert found(folder, "b.json")["steps"] == 7 and found(folder, "b.json")["structures"] == FRAMES - 2
    import almlip_jax

    potential = almlip_jax.load(folder / "bare")
    np.testing.assert_allclose(potential.evaluate(alone).energy, [-13.5, -2040.25], rtol=1e-9)
    assert potential.calibration["structures"] == 4
    sulphur = molecule("SH2")
    sulphur.calc = SinglePointCalculator(sulphur, energy=-10000.0, forces=np.zeros((3, 3)))
    write_structures(folder / "sulphur.extxyz", [sulphur])
    on = ["--data", "sulphur.extxyz", "--from", "bare", "--out", "further", "--set", "training.max_steps=3"]
    almlip(folder, "train", "empty.yaml", *on)
    further = almlip_jax.load(folder / "further")
    assert further.reference_energies[8] == -2040.25 and further.settings == potential.settings
    assert further.evaluate([sulphur]).energy[0] == pytest.approx(-10000.0, abs=0.5)


def test_evaluate_agrees_with_the_calculator(folder):
    more = ["--predictions", "predicted.extxyz", "--figures", "errors", "--json", "evaluate.json"]
    done = almlip(folder, "evaluate", "potential", "data.extxyz", *more)
    result = found(folder, "evaluate.json")
    assert all((folder / path).stat().st_size > 0 for path in result["written"]) and len(result["written"]) == 5
    assert "element O" in done.stdout and result["by_species"]["O"]["num_atoms"] == FRAMES
    import almlip_jax

    potential = almlip_jax.load(folder / "potential")
    errors = []
    for frame in read_structures(folder / "data.extxyz"):
        reference = frame.get_forces()
        frame.calc = potential.calculator()
        errors.append(frame.get_forces() - reference)
    assert result["forces_rmse"] == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-3)
    assert result["num_structures"] == FRAMES and set(result["by_group"]) == {"even", "odd"}
    names = [
        "energy_mae",
        "energy_rmse",
        "energy_offset_free_rmse",
        "forces_mae",
        "forces_rmse",
        "stress_rmse",
        "calibration",
    ]
    assert set(names) <= set(result) and result["stress_rmse"] is None
    predicted = read_structures(folder / "predicted.extxyz", require_labels=True)
    off = [frame.arrays["predicted_forces"] - frame.get_forces() for frame in predicted]
    assert np.sqrt(np.mean(np.square(off))) == pytest.approx(result["forces_rmse"], rel=1e-6)
    almlip(folder, "evaluate", "potential", "data.extxyz", "--predictions", "predicted.csv", code=1)


def test_score_and_select(folder):
    almlip(folder, "score", "potential", "data.extxyz", "--out", "scored.extxyz", "--json", "score.json")
    scored = read(folder / "scored.extxyz", ":")
    for frame in scored:
        assert frame.info["force_std_max"] == pytest.approx(frame.arrays["force_std"].max(), rel=1e-5)
        assert {"energy_std", "force_std_mean"} <= set(frame.info)
    worst = int(np.argmax([frame.info["force_std_max"] for frame in scored]))
    assert found(folder, "score.json")["most_uncertain"] == worst
    pick = ["select", "config.yaml", "--potential", "potential", "--pool", "data.extxyz", "--train", "water.extxyz"]
    by_score = ["--set", "selection.selector={kind: top_k, score: force_std_max}"]
    almlip(folder, *pick, "-k", "3", "--out", "batch.extxyz", "--json", "select.json", *by_score)
    result = found(folder, "select.json")
    assert result["indices"][0] == worst and len(set(result["indices"])) == 3
    batch = read(folder / "batch.extxyz", ":")
    np.testing.assert_allclose(batch[0].positions, scored[worst].positions)


def test_score_leaves_no_half_file(folder):
    frames = read_structures(folder / "data.extxyz")
    write_structures(folder / "mostly.extxyz", [*frames, Atoms("Au", positions=[[0, 0, 0]]), *frames])
    done = almlip(folder, "score", "potential", "mostly.extxyz", "--out", "half.extxyz", code=1)
    assert f"mostly.extxyz, frame {FRAMES}: atom 0 is Au" in done.stderr
    text = (folder / "data.extxyz").read_text()
    (folder / "cut.extxyz").write_text(text[: text.rindex("\n", 0, -1)])
    done = almlip(folder, "score", "potential", "cut.extxyz", "--out", "half.extxyz", code=1)
    assert f"cut.extxyz, frame {FRAMES - 1} ends after 2 of 3 atoms" in done.stderr
    assert not list(folder.glob("*half.extxyz*"))
    done = almlip(folder, "score", "potential", "data.extxyz", "--out", "whole.extxyz")
    assert f"score: {FRAMES} frames in" in done.stderr


def test_label(folder):
    almlip(folder, "label", "config.yaml", "water.extxyz", "--out", "labelled.extxyz", "--json", "label.json")
    assert found(folder, "label.json")["labelled"] == 1
    atoms = molecule("H2O")
    atoms.calc = EMT()
    frame = read_structures(folder / "labelled.extxyz", require_labels=True)[0]
    np.testing.assert_allclose(frame.get_forces(), atoms.get_forces(), atol=1e-9)
    again = ["label", "config.yaml", "water.extxyz", "--out", "labelled.extxyz", "--json", "label.json"]
    almlip(folder, *again)
    assert found(folder, "label.json")["taken from the store"] == 1


@pytest.mark.usefixtures("labels_here")
def test_labels_that_failed_are_tried_again_where_asked(folder):
    """As where the program was not there: its command is no part of a label's identity."""
    code = '{kind: ase, code: orca, parameters: {orcasimpleinput: "PBE def2-SVP"}, command: /nowhere/orca}'
    command = ["label", "config.yaml", "water.extxyz", "--out", "orca.extxyz", "--json", "j.json", "--set"]
    command += [f"oracle={code}"]
    assert "1 of 1 labels failed; frame 0: ORCA could not be started" in almlip(folder, *command, code=1).stderr
    said = almlip(folder, *command, code=1).stderr
    assert "1 of 1 labels failed (1 of them in an earlier call; --retry tries these again); frame 0" in said
    almlip(folder, *command, "--retry", code=1)
    assert found(folder, "j.json")["taken from the store"] == 0


def test_warnings_are_sentences():
    """Of this package; those of others say where they come from."""
    usual = warnings.formatwarning
    with program.plain_warnings():
        told = [
            warnings.formatwarning("It is.", UserWarning, file, 7, "") for file in (program.__file__, "elsewhere.py")
        ]
    assert told == ["almlip: It is.\n", "elsewhere.py:7: UserWarning: It is.\n"] and warnings.formatwarning is usual


def test_label_looks_before_it_pays(folder):
    oracle = parse_yaml((folder / "config.yaml").read_text(), "config").value["oracle"]
    (folder / "oracle.yaml").write_text(yaml_text({"oracle": oracle}))
    shown = almlip(folder, "label", "oracle.yaml", "water.extxyz", "--dry-run").stdout
    assert "H2O, charge 0, multiplicity 1" in shown and "ase.calculators.emt:EMT" in shown
    checked = ["label", "oracle.yaml", "water.extxyz", "--check", "--json", "check.json"]
    almlip(folder, *checked)
    result = found(folder, "check.json")
    assert result["agrees"] and [len(result["compared"]), *result["compared"][0]] == [
        3, "atom", "axis", "force", "difference"
    ]  # fmt: skip
    assert result["stresses"] == []  # of a molecule
    code = '{kind: ase, code: orca, parameters: {orcasimpleinput: "PBE def2-SVP"}, command: /opt/orca}'
    shown = almlip(folder, "label", "config.yaml", "water.extxyz", "--dry-run", "--set", f"oracle={code}").stdout
    assert "Command: /opt/orca" in shown and "! PBE def2-SVP EnGrad" in shown and "*xyz 0 1" in shown
    assert "--out labelled.extxyz" in almlip(folder, "label", "config.yaml", "water.extxyz", code=1).stderr
    assert "give one of them" in almlip(folder, *checked, "--dry-run", code=1).stderr


@pytest.mark.usefixtures("labels_here")
def test_labelled_files_have_every_frame_with_all_it_had(folder):
    """Also those whose labels fail, as that of uranium, which the calculator here does not know."""
    water = molecule("H2O")
    water.set_tags([1, 2, 3])
    water.set_array("site", np.array(["a", "b", "c"]))
    water.set_masses([15.999, 2.014, 2.014])
    water.set_constraint(FixAtoms([0]))
    water.info = {"config_type": "monomer", "label_error": "of an earlier try", "REF_energy": 7.0}
    strange = Atoms("U", info={"config_type": "atom"})
    write_structures(folder / "mixed.extxyz", [water, strange, molecule("CH4")])
    done = almlip(folder, "label", "config.yaml", "mixed.extxyz", "--out", "out.extxyz", code=1)
    assert "1 of 3 labels failed; frame 1" in done.stderr
    first, second, third = read_structures(folder / "out.extxyz")
    assert first.info == {"config_type": "monomer", "charge": 0, "spin": 1}
    assert first.get_tags().tolist() == [1, 2, 3] and first.arrays["site"].tolist() == ["a", "b", "c"]
    np.testing.assert_array_equal(first.get_masses(), water.get_masses())
    assert first.constraints[0].todict() == FixAtoms([0]).todict()
    water.calc = EMT()
    np.testing.assert_allclose(first.calc.results["forces"], water.get_forces(apply_constraint=False), atol=1e-9)
    assert second.calc is None and second.info["config_type"] == "atom" and second.info["label_error"]
    assert str(third.symbols) == "CH4" and third.calc is not None
    with pytest.raises(InputError, match="frame 1 has no energy and no forces, since its label failed"):
        read_structures(folder / "out.extxyz", require_labels=True)


@pytest.mark.usefixtures("labels_here")
def test_a_campaign_from_beginning_to_a_larger_budget(folder):
    almlip(folder, "run", "config.yaml", "--run-dir", "run", "--json", "run.json")
    result = found(folder, "run.json")
    assert result["finished"] and result["rule"] == "max_labels" and result["labels"] == 11 and result["errors"] == {}
    refused = almlip(folder, "run", "config.yaml", "--run-dir", "run", code=1)
    assert "almlip resume run" in refused.stderr
    almlip(folder, "resume", "run", "--set", "stopping.max_labels=14", "--json", "run.json")
    assert found(folder, "run.json")["labels"] == 14
    almlip(folder, "status", "run", "--json", "status.json")
    status = found(folder, "status.json")
    assert status["round"] == 2 and {"stage", "labels", "converged", "reason", "diagnosis"} <= set(status)
    almlip(folder, "report", "run", "--json", "report.json")
    assert Path(found(folder, "report.json")["report"]).name == "report.html"
    assert (folder / "run" / "report.html").stat().st_size > 1e6


def test_the_end_of_a_campaign_tells_its_errors(tmp_path, capsys):
    errors = {"forces_rmse_300K": 0.0123, "forces_mae_300K": 0.01, "stress_rmse_300K": 0.00123}
    outcome = Outcome(tmp_path, True, True, "target_error", "it is good.", 3, 40, tmp_path / "potential", errors)
    show_outcome(outcome, tmp_path / "run.json")
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "rmse" in line]
    assert [line[1:-1] for line in lines] == [
        ["forces_rmse_300K", "│", "0.0123", "eV/A"],
        ["stress_rmse_300K", "│", "0.00123", "eV/A^3"],
    ]
    assert found(tmp_path, "run.json")["errors"] == errors


def test_init_and_schema(folder):
    almlip(folder, "init", "molecule", "--out", "mine.yaml")
    assert "Total charge" in (folder / "mine.yaml").read_text()
    assert "exists" in almlip(folder, "init", "molecule", "--out", "mine.yaml", code=1).stderr
    assert "there is no template 'nothing'" in almlip(folder, "init", "nothing", code=1).stderr
    almlip(folder, "schema", "--json", "schema.json")
    assert found(folder, "schema.json")["title"] == "ExperimentConfig"
    assert json.loads(almlip(folder, "schema").stdout) == found(folder, "schema.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["resume", "nowhere"], "holds no campaign"),
        (["status", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["evaluate", "nowhere", "data.extxyz"], "is not a potential"),
        (["evaluate", "data.extxyz", "data.extxyz"], "is no potential: neither a folder of one nor an .mtp file"),
        (["evaluate", "potential", "nowhere.xyz"], "nowhere.xyz"),
        (["evaluate", "potential", "gold.extxyz"], "atom 0 is Au"),
        (["score", "potential", "garbage.extxyz", "--out", "x.extxyz"], "garbage.extxyz"),
        (["train", "config.yaml", "--data", "water.extxyz", "--out", "p"], "water.extxyz"),
        (["train", "config.yaml", "--data", "nowhere.xyz", "--out", "data.extxyz"], "data.extxyz is a file"),
        (
            ["train", "config.yaml", "--data", "nowhere.xyz", "--out", "p", "--from", "potential"]
            + ["--set", "model.cutoff=4.0"],
            "model.cutoff 3.0, not 4.0",
        ),
    ],
)
def test_mistakes_are_one_sentence(folder, arguments, message):
    gold = Atoms("Au")
    gold.calc = SinglePointCalculator(gold, energy=-1.0, forces=np.zeros((1, 3)))
    write_structures(folder / "gold.extxyz", [gold])
    (folder / "garbage.extxyz").write_text("this is\nnot a structure\n")
    done = almlip(folder, *arguments, code=1)
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_process_of_its_own_runs_the_module(tmp_path):
    assert in_a_process_of_its_own(tmp_path, "--version").stdout == f"almlip {__version__}\n"


def test_usage_errors_exit_with_2(folder):
    almlip(folder, "run", code=2)
    almlip(folder, "no-such-command", code=2)


@pytest.mark.parametrize("width", [40, 10_000])
def test_tables_are_whole_however_wide_the_place_is(width, monkeypatch):
    page = Console(file=io.StringIO(), width=width)
    monkeypatch.setattr(output, "console", page)
    words = [f"word{n}" for n in range(60)]
    folder = "/a/very/long/folder/" * 8
    output.show(Group(Panel(" ".join(words), title="panel"), "a sentence"))
    output.print_pairs("Table", {folder: folder})
    text = page.file.getvalue()
    assert "…" not in text and all(word in text for word in words)
    assert "".join(text.split()).replace("│", "").count("folder/") >= 8
    widest = max(map(len, text.splitlines()))
    assert widest == 40 if width == 40 else 300 < widest < 500
