"""A student and its teacher: what is held out, what is compared with what, and that a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from pydantic import ValidationError
from typer.testing import CliRunner

from almlip_jax import cli
from almlip_jax.campaign.preparation import Source
from almlip_jax.distillation import DistilConfig, Distilled, run_distillation, teaching
from almlip_jax.distillation.comparison import Times
from almlip_jax.distillation.folder import DistilDirectory
from almlip_jax.distillation.teaching import check_distillation, not_trained_on, parted, teach
from almlip_jax.errors import InputError
from almlip_jax.evaluation import error_metrics
from almlip_jax.files import read_csv, read_json, write_json
from almlip_jax.oracles import LabelStore, PendingLabels, TBLiteSettings, rattle
from almlip_jax.oracles.base import obtain_label
from almlip_jax.potential import Potential
from almlip_jax.progress import SilentProgress
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.yaml_text import yaml_text

SECTIONS: dict[str, Any] = {
    "seed": 3,
    "teacher": {"kind": "tblite"},
    "executor": {"kind": "local", "workers": 1},
    "initial": {"rattle": {"count": 12, "stdev": 0.05}, "md": [{"temperature": 300, "steps": 20, "every": 2}]},
    "held_out": 0.25,
    "model": {"kind": "shared_density", "cutoff": 3.0, "radial": 4, "l_max": 0, "channels": 4, "hidden": [8]},
    "ensemble": {"size": 1},
    "training": {"batch_size": 4, "max_steps": 300, "validate_every": 50, "validation_fraction": 0.2},
}
WALKING = {
    "walkers": [{"temperature": 600, "count": 2}],
    "steps": 40,
    "chunk": 20,
    "record_every": 5,
    "trace_every": 5,
    "trajectory_every": 10,
    "thresholds": {"kind": "fixed", "record": 1e-6, "stop": 100.0},
}


def waters(count: int, seed: int) -> list[Atoms]:
    return rattle(molecule("H2O"), count, np.random.default_rng(seed), stdev=0.06)


def config(folder: Path, **sections: Any) -> DistilConfig:
    """Water taught by GFN2-xTB and tested on GFN1-xTB, the target; the files are written into a folder."""
    if not (folder / "water.extxyz").exists():
        target = TBLiteSettings(method="GFN1-xTB")
        frames = [obtain_label(target.build(), target, frame, "").attach(frame) for frame in waters(8, 1)]
        write_structures(folder / "target.extxyz", frames)
        write_structures(folder / "cells.extxyz", waters(8, 2))
        write_structures(folder / "water.extxyz", [molecule("H2O")])
    files = {"system": {"structures": str(folder / "water.extxyz")}}
    test = [{"path": str(folder / "target.extxyz"), "group": "target"}]
    return DistilConfig.model_validate({**files, "test": test, **SECTIONS, **sections})


@pytest.fixture(scope="module")
def distilled(
    tmp_path_factory: pytest.TempPathFactory, compiled_in: Callable[[Path], AbstractContextManager[None]]
) -> Distilled:
    """A student of one member, without rounds."""
    folder = tmp_path_factory.mktemp("distilled")
    return run_distillation(config(folder), folder / "out")


def moving(origin: str, steps: int) -> list[Atoms]:
    return [Atoms("H2", [[0, 0, 0], [0, 0, 0.7]], info={"origin": origin, "step": step}) for step in range(2, steps, 2)]


def test_ends_of_trajectories_and_draws_of_others_are_held_out() -> None:
    others = [Atoms("H2", [[0, 0, 0], [0, 0, 0.7 + 0.01 * n]], info={"origin": "rattle"}) for n in range(40)]
    lone = [Atoms("H"), Atoms("O")]
    frames = [*lone, *others, *moving("md-300K", 21), *moving("md-300K", 21), *moving("md-600K", 42)]
    train, held_out = parted(frames, 0.2, seed=0)
    assert len(held_out) == 16 and len(train) + len(held_out) == len(frames)
    assert [frame.info["step"] for frame in held_out if frame.info["origin"] == "md-300K"] == [18, 20, 18, 20]
    assert [frame.info["step"] for frame in held_out if frame.info["origin"] == "md-600K"] == [34, 36, 38, 40]
    assert sum(frame.info["origin"] == "rattle" for frame in held_out) == 8
    assert all(len(frame) == 2 for frame in held_out) and train[:2] == lone
    assert {id(frame) for frame in train}.isdisjoint(id(frame) for frame in held_out)
    again, other = parted(frames, 0.2, seed=0)[1], parted(frames, 0.2, seed=1)[1]
    assert again == held_out and other != held_out
    assert len(parted(frames[2:7], 0.2, seed=0)[1]) == 1
    with pytest.raises(InputError, match="held_out 0.1 of 5 structures is not a single one"):
        parted(frames[2:7], 0.1, seed=0)


def test_copies_of_what_is_trained_on_are_not_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file holds every structure twice, once turned: errors are of those alone that the student has not seen."""
    frames, said = waters(8, 2), list[str]()
    turned = [frame[[0, 2, 1]] for frame in frames[:7]]
    for frame in turned:
        frame.rotate(50, (1, 2, 3))
    for frame in (*frames, *turned):
        frame.calc = SinglePointCalculator(frame, energy=0.0, forces=np.zeros((3, 3)))
    monkeypatch.setattr(teaching, "parted", lambda *_: ([*frames[:5], *turned[5:]], [*frames[5:], *turned[:2]]))
    monkeypatch.setattr(Source, "label", lambda source, given, *_: given)
    write_structures(tmp_path / "water.extxyz", [molecule("H2O")])
    place = DistilDirectory(tmp_path / "out")
    place.path.mkdir()
    progress = SilentProgress()
    monkeypatch.setattr(progress, "message", said.append)
    with LabelStore(place.labels) as store:
        teach(config(tmp_path, initial={"structures": "cells.extxyz"}), [*frames, *turned], place, store, progress)
    (left,) = read_structures(place.held_out, require_labels=True)
    np.testing.assert_allclose(left.positions, frames[7].positions, atol=1e-8)
    assert read_json(place.taught) | {"made_with": None} == {"made_with": None, "train": 7, "held_out": 1}
    assert said == [
        "4 of 5 structures held out are trained on too, turned, shifted or with atoms in another order; they are left "
        "out."
    ]
    with pytest.raises(InputError, match="all 7 structures held out are trained on too, turned, shifted"):
        not_trained_on(turned, frames, print)


@pytest.mark.parametrize(
    "sections, why",
    [
        ({"initial": {}}, "nothing to learn from"),
        ({"test": [{"path": "a.extxyz", "group": "held_out"}]}, "name the test otherwise"),
        ({"rounds": 1, "exploration": WALKING}, "ensemble of one member; raise ensemble.size"),
    ],
)
def test_what_cannot_be_is_refused(sections: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises((ValidationError, InputError), match=why):
        config(tmp_path, **sections)


def test_what_the_teacher_cannot_label_is_refused_before_it_labels(tmp_path: Path) -> None:
    given = config(tmp_path, initial={"structures": str(tmp_path / "slab.extxyz")})
    write_structures(tmp_path / "slab.extxyz", [Atoms("O", cell=[5, 5, 5], pbc=[True, True, False])])
    with pytest.raises(InputError, match=r"slab\.extxyz, frame 0 cannot be labelled: tblite labels"):
        run_distillation(given, tmp_path / "out")
    assert not (tmp_path / "out" / "labels.db").exists()


@pytest.mark.parametrize("rounds", [0, 1])
def test_what_only_rounds_look_at_is_told_of_where_there_are_none(rounds: int, tmp_path: Path) -> None:
    said, two = list[str](), {"ensemble": {"size": 2}, "selection": {"batch": 2}}
    write_structures(tmp_path / "water.extxyz", [molecule("H2O")])
    check_distillation(config(tmp_path, rounds=rounds, exploration=WALKING, test=(), **two), said.append)
    assert [text[:48] for text in said] == ["rounds is 0: exploration and selection, which on"][rounds:]


def test_a_teacher_that_answers_elsewhere_is_waited_for(tmp_path: Path) -> None:
    teacher = {"kind": "external", "folder": str(tmp_path / "elsewhere"), "method": "dft"}
    given = config(tmp_path, teacher=teacher, initial={"structures": str(tmp_path / "cells.extxyz")})
    for _ in range(2):
        with pytest.raises(PendingLabels, match="8 structure"):
            run_distillation(given, tmp_path / "out")
    assert not (tmp_path / "out" / "taught.json").exists()


@pytest.mark.slow
def test_both_are_held_against_the_target_and_against_each_other(distilled: Distilled) -> None:
    out = distilled.out
    tests, taught = read_structures(out.parent / "target.extxyz"), read_structures(out / "taught_tests.extxyz")
    difference = np.concatenate([a.get_forces() - b.get_forces() for a, b in zip(tests, taught, strict=True)])
    errors = distilled.errors["target"]
    assert errors["teacher_against_labels"]["forces_rmse"] == pytest.approx(np.sqrt(np.mean(difference**2)))
    student = Potential.load(out / "potential")
    for which, frames in [("student_against_labels", tests), ("student_against_teacher", taught)]:
        direct = error_metrics(frames, student.evaluate(frames))
        for name in ("energy_rmse", "energy_offset_free_rmse", "forces_mae", "forces_rmse"):
            assert errors[which][name] == pytest.approx(direct[name], rel=1e-5)
    # the methods' energies lie some eV apart, which is no error of the teacher's
    assert errors["teacher_against_labels"]["energy_rmse"] > 0.5
    assert errors["teacher_against_labels"]["energy_offset_free_rmse"] < 0.05


@pytest.mark.slow
def test_the_student_learns_from_its_teacher_alone_and_not_from_what_is_held_out(distilled: Distilled) -> None:
    train, held_out = (read_structures(distilled.out / f"{name}.extxyz") for name in ("train", "held_out"))
    assert len(held_out) == 5 and len(train) + len(held_out) == 12 + 10
    seen = read_structures(distilled.out / "campaign" / "rounds" / "000" / "dataset.extxyz")
    assert {frame.positions.tobytes() for frame in seen} == {frame.positions.tobytes() for frame in train}
    label = TBLiteSettings().build()
    for frame in (train[0], held_out[-1], seen[-1]):
        np.testing.assert_allclose(frame.get_forces(), label(frame).forces, atol=1e-5)
    errors = distilled.errors["held_out"]["student_against_teacher"]
    spread = np.std(np.concatenate([frame.get_forces() for frame in held_out]))
    assert errors["num_structures"] == 5 and errors["forces_rmse"] < 0.5 * spread


@pytest.mark.slow
def test_times_and_files_are_there(distilled: Distilled) -> None:
    assert distilled.times is not None and 0 < distilled.times.teacher < 5
    assert Times(10.0, 2, 0.01, 4).times_faster == pytest.approx(500)
    said = json.loads((distilled.out / "errors.json").read_text())
    assert said["errors"]["target"].keys() == distilled.errors["target"].keys()
    assert said["calls"] == 12 + 1 + 20 + 8  # rattled, the start of the dynamics, its steps, the tests
    rows = read_csv(distilled.out / "errors.csv")
    assert [(row["group"], row["compared"]) for row in rows] == [
        ("held_out", "student_against_teacher"),
        ("target", "student_against_labels"),
        ("target", "teacher_against_labels"),
        ("target", "student_against_teacher"),
    ]
    assert (distilled.out / "training.csv").read_text().startswith("epoch")


@pytest.mark.slow
def test_generators_take_what_suits_them(tmp_path: Path) -> None:
    """Of start geometries without names too; and a folder of a version that knew fewer keys goes on."""
    write_structures(tmp_path / "metal.extxyz", [bulk("Cu", cubic=True)])
    given = config(
        tmp_path,
        system={"structures": [str(tmp_path / "water.extxyz"), str(tmp_path / "metal.extxyz")]},
        teacher={"kind": "ase", "calculator": "ase.calculators.emt:EMT"},
        initial={"generated": [{"kind": "strained", "count": 3}, {"kind": "clusters", "count": 3}]},
        test=(),
    )
    said: list[str] = []
    assert check_distillation(given, said.append) == []
    assert [text[:41] for text in said] == [
        "'strained' leaves out 1 of 2 start geomet",
        "'clusters' leaves out 1 of 2 start geomet",
    ]
    place = DistilDirectory(tmp_path / "out")
    place.path.mkdir()
    with LabelStore(place.labels) as store:
        teach(given, [], place, store, SilentProgress())
        made = [*read_structures(place.train), *read_structures(place.held_out)]
        assert sorted(int(frame.pbc.all()) for frame in made) == [0, 0, 0, 1, 1, 1]
        before = read_json(place.taught)
        for one in before["made_with"]["initial"]["generated"]:
            del one["systems"]
        write_json(place.taught, before)
        teach(given, [], place, store, SilentProgress())
        before["made_with"]["initial"]["generated"][0]["count"] = 4
        write_json(place.taught, before)
        with pytest.raises(InputError, match="holds a distillation with another initial"):
            teach(given, [], place, store, SilentProgress())
    with pytest.raises(ValidationError, match=r"generated\.0\.systems names 'water', but the systems have no names"):
        config(tmp_path, initial={"generated": [{"kind": "rattled", "systems": ["water"]}]})


def test_the_same_call_makes_nothing_again_and_another_one_is_refused(distilled: Distilled) -> None:
    folder, trained = distilled.out.parent, distilled.out / "potential" / "potential.json"
    before = trained.read_bytes()
    again = run_distillation(config(folder), distilled.out)
    assert again.calls == distilled.calls
    assert json.dumps(again.errors) == json.dumps(distilled.errors)  # to which NaN equals NaN
    assert trained.read_bytes() == before
    other = {"kind": "tblite", "accuracy": 0.5}
    for changes in ({"held_out": 0.1}, {"teacher": other}, {"training": {"max_steps": 7}}):
        with pytest.raises(InputError, match=f"holds a distillation with another {next(iter(changes))}; choose"):
            run_distillation(config(folder, **changes), distilled.out)


@pytest.mark.slow
def test_a_student_goes_on_where_its_members_disagree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From structures of a file, through the program, killed after the teacher's first labels and taken up again."""
    given = {
        "system": {},
        "initial": {
            "structures": str(tmp_path / "cells.extxyz"),
            "generated": [{"kind": "rattled", "count": 4, "stdev": 0.05}],
        },
        "ensemble": {"size": 2},
        "exploration": WALKING,
        "selection": {"batch": 3},
        "rounds": 1,
    }
    settings, out = config(tmp_path, **given), tmp_path / "out"
    (tmp_path / "config.yaml").write_text(yaml_text(settings.model_dump(mode="json")))

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    command = ["distil", str(tmp_path / "config.yaml"), "--out", str(out), "--json", str(tmp_path / "said.json")]
    with monkeypatch.context() as patch:
        patch.setattr("almlip_jax.distillation.run.run_campaign", killed)
        stopped = CliRunner().invoke(cli.app, command)
    assert stopped.exit_code == 130 and (out / "train.extxyz").exists()
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["calls"] == 8 + 4 + 3 + 8  # structures, generated ones, a batch, tests: none of them twice
    grown = read_structures(out / "campaign" / "rounds" / "001" / "dataset.extxyz")
    assert len(grown) == 9 + 3
    label = TBLiteSettings().build()
    np.testing.assert_allclose(grown[-1].get_forces(), label(grown[-1]).forces, atol=1e-5)
    more = CliRunner().invoke(cli.app, [*command, "--set", "rounds=2"])
    assert more.exit_code == 0, more.output
    assert json.loads((tmp_path / "said.json").read_text())["calls"] == said["calls"] + 3
