"""The study of crystals with small networks: padding, descriptors, exports."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from ase import Atoms
from ase.build import bulk
from ase.data import chemical_symbols

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "comparison_paper"))
from crystals import DESCRIPTORS, descriptors, electronegativity
from networks import Runs, predictions
from sources import Labelled, read_export
from study import BUDGET, INITIAL, KEY, Cell, run_cell

from almlip_jax.errors import InputError

HERE = Path(__file__).parents[2] / "experiments" / "comparison_paper"


def committees(room: int, rubbish: float) -> Runs:
    """Two runs of three members that know 9 and 12 rows, in arrays with room for more."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 12, 4)), rng.normal(size=(2, 12))
    count = np.array([9, 12], np.int32)
    known = np.arange(room) < count[:, None]
    wide = np.full((2, room, 4), rubbish), np.full((2, room), rubbish)
    wide[0][:, :12], wide[1][:, :12] = x, y
    rows, labels = np.where(known[..., None], wide[0], rubbish), np.where(known, wide[1], rubbish)
    keys = jax.random.split(jax.random.key(3), (2, 3))
    asked = rng.normal(size=(2, 5, 4)).astype(np.float32)
    return Runs(rows.astype(np.float32), labels.astype(np.float32), count, keys, asked)


def test_padding_is_never_looked_at():
    padded = predictions(committees(20, 1e3), steps=40)
    run = jax.tree.map(lambda leaf: leaf[:1], committees(20, 0.0))
    own = replace(run, x=run.x[:, :9], y=run.y[:, :9])
    np.testing.assert_allclose(predictions(own, steps=40)[0], padded[0], rtol=2e-4, atol=2e-4)
    assert np.ptp(np.asarray(padded), axis=1).min() > 1e-3  # members differ


def test_descriptors_of_rock_salt():
    salt = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    row = dict(zip(DESCRIPTORS["structural"], descriptors([salt], "structural")[0], strict=True))
    assert len(DESCRIPTORS["paper"]) == 17
    assert row["elements"] == 2 and row["atomic_number_mean"] == 14 and row["atomic_number_std"] == 3
    assert row["electronegativity_std"] == pytest.approx((3.16 - 0.93) / 2)
    assert row["density"] == pytest.approx(2.164, abs=0.01)  # g/cm^3
    assert row["coordination_mean"] == 6 and row["nearest_min"] == pytest.approx(2.82 / (1.66 + 1.02))


def test_descriptors_do_not_depend_on_pose_or_order():
    salt = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    salt.rattle(0.1, seed=1)
    moved = salt[::-1]
    moved.rotate(40, (1, 2, 3), rotate_cell=True)
    moved.translate((0.3, 0.2, 0.9))
    first, second = descriptors([salt, moved], "structural")
    np.testing.assert_allclose(first, second, rtol=1e-6, atol=1e-9)


def test_exports_are_read(tmp_path):
    salt = bulk("NaCl", "rocksalt", a=5.64)
    sites = [f"{s} @ {' '.join(map(str, p))}" for s, p in zip(salt.symbols, salt.get_scaled_positions(), strict=True)]
    oqmd = {"unit_cell": salt.cell.tolist(), "sites": sites, "delta_e": -2.1}
    lattice = {"matrix": salt.cell.tolist()}
    places = zip(salt.symbols, salt.get_scaled_positions().tolist(), strict=True)
    held = {
        "@module": "pymatgen.core.structure",
        "@class": "Structure",
        "lattice": lattice,
        "sites": [{"species": [{"element": s, "occu": 1}], "abc": p} for s, p in places],
    }
    project = {"structure": held, "formation_energy_per_atom": -2.0}
    (tmp_path / "a.json").write_text(json.dumps({"data": [oqmd, project]}))
    found = read_export("salt", tmp_path / "a.json")
    assert found.labels.tolist() == [-2.1, -2.0]
    for atoms in found.frames:
        np.testing.assert_allclose(*(descriptors([a], "structural") for a in (atoms, salt)), rtol=1e-6, atol=1e-9)
    shared = json.loads(json.dumps(project))
    shared["structure"]["sites"][0]["species"][0]["occu"] = 0.5
    (tmp_path / "c.json").write_text(json.dumps([shared]))
    with pytest.raises(InputError, match="record 0 has no structure that can be read .*empty in part"):
        read_export("salt", tmp_path / "c.json")
    (tmp_path / "b.json").write_text(json.dumps([{"structure": held}]))
    with pytest.raises(InputError, match="record 0 has no number"):
        read_export("salt", tmp_path / "b.json")
    for text, why in (('{"data": 3}', "holds no list of records"), ("[1]", "holds no list"), ("{", "is not JSON")):
        (tmp_path / "d.json").write_text(text)
        with pytest.raises(InputError, match=why):
            read_export("salt", tmp_path / "d.json")


def test_electronegativities_are_those_of_the_periodic_table():
    table = pytest.importorskip("pymatgen.core.periodic_table")
    for number, symbol in enumerate(chemical_symbols[1:], 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert electronegativity(number) == np.nan_to_num(table.Element(symbol).X)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch):
    """The program of the study, whose cells come to made-up numbers, and the list of what it computed."""
    spec = importlib.util.spec_from_file_location("comparison_paper_run", HERE / "run.py")
    run: Any = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, run)
    spec.loader.exec_module(run)
    run.computed = []

    def made_up(cell, source, other, wanted, steps):
        run.computed.append((cell.set, cell.test or cell.set, cell.descriptors, cell.batch, len(source.labels)))
        for strategy, seed in wanted:
            for labels in (INITIAL, BUDGET):
                names = dict(zip(KEY, cell.key, strict=True)) | {"steps": steps, "strategy": strategy, "seed": seed}
                said = {"mae": (1 + 0.1 * seed + 0.01 * len(strategy)) / labels, "r2": 0.1 + 0.1 * seed}
                yield names | {"labels": labels} | said | {"offset_free_mae": 0.1, "spearman": 0.2}

    monkeypatch.setattr(run, "run_cell", made_up)
    monkeypatch.setattr(run, "prepare_jax", lambda: None)
    monkeypatch.delenv("ALMLIP_DATA_DIR", raising=False)
    return run


def export(path: Path, energies: list[float]) -> Path:
    salt = bulk("NaCl", "rocksalt", a=5.64)
    record = {"unit_cell": salt.cell.tolist(), "sites": ["Na @ 0 0 0", "Cl @ 0.5 0.5 0.5"]}
    path.write_text(json.dumps([record | {"delta_e": energy, "gap": 1.0} for energy in energies]))
    return path


def test_an_export_is_known_by_what_it_holds(tmp_path: Path, program: Any, capsys: pytest.CaptureFixture[str]):
    file, out = export(tmp_path / "mine.json", [-1.0, -2.0]), tmp_path / "results.csv"
    known = [row for row in (HERE / "results.csv").read_text().splitlines() if row.startswith(("set,", "gap,"))]
    out.write_text("\n".join(known) + "\n")
    given = ["--export", f"mine={file}", "--sets", "mine", "--out", str(out), "--seeds", "2"]
    program.main(given)
    program.main(given)
    assert len(program.computed) == 1 and program.computed[0][0].startswith("mine@")
    assert "mine@" in capsys.readouterr().out and out.read_text().startswith("\n".join(known))
    export(file, [-1.0, -2.5, -3.0])
    program.main(given)
    program.main([*given, "--label", "gap"])
    assert len({name for name, *_ in program.computed}) == 3 and program.computed[1][-1] == 3
    with pytest.raises(SystemExit):
        program.main(["--export", f"carbon={file}", "--sets", "carbon", "--out", str(out)])
    assert "carbon: there is a set of that name already" in capsys.readouterr().err


def test_checks_are_on_the_sets_that_are_asked_for(tmp_path: Path, program: Any, capsys: pytest.CaptureFixture[str]):
    one, two = export(tmp_path / "a.json", [-1.0]), export(tmp_path / "b.json", [-2.0])
    given = ["--export", f"a={one}", f"b={two}", "--out", str(tmp_path / "r.csv"), "--seeds", "2", "--sets", "a", "b"]
    program.main([*given, "--check", "structural", "batches", "transfer"])
    told = [(name[0], test[0], kind, batch) for name, test, kind, batch, _ in program.computed]
    of_each = [(name, name, "structural", 15) for name in "ab"]
    of_each += [(name, name, "paper", batch) for name in "ab" for batch in (5, 10, 20)]
    assert told == [*of_each, ("a", "b", "paper", 15), ("b", "a", "paper", 15)]
    for arguments, why in (
        (["--check", "structural"], "give the folder of the reference data"),
        (["--check", "all", "--export", f"a={one}"], "give the folder of the reference data"),
        ([*given[:-1], "--check", "transfer"], "transfer is from one set to another"),
        (["--export", "a", "--sets", "a"], "is not of the form NAME=FILE"),
        (["--export", f"a={tmp_path / 'none'}", "--sets", "a"], "there is no file"),
        (["--sets", "c"], "there is no set c"),
    ):
        with pytest.raises(SystemExit):
            program.main(arguments)
        assert why in capsys.readouterr().err
    with pytest.raises(InputError, match=r"has no carbon24/carbon24\.extxyz"):
        program.main(["--sets", "carbon", "--data", str(tmp_path), "--out", str(tmp_path / "r.csv")])
    default = [cell for check in program.CHECKS.values() for cell in check.on([])]
    known = pd.read_csv(HERE / "results.csv").groupby(list(KEY)).groups
    assert {cell.key for cell in default} <= set(known)


@pytest.mark.slow
def test_strategies_learn_on_a_made_up_set():
    """Energies that follow from the volume are learned; all strategies begin alike and label without repetition."""
    rng = np.random.default_rng(0)
    frames = [Atoms("CO", [(0, 0, 0), (1.5, 1.5, 1.5)], cell=[a, a, a], pbc=True) for a in rng.uniform(3, 5, 180)]
    made = Labelled("made", frames, np.array([(a.get_volume() / 64 - 1) ** 2 for a in frames]), "eV/atom")
    wanted = [(one, 0) for one in ("random", "top_k", "kmeans_fps", "hybrid", "switch")]
    rows = list(run_cell(Cell("made", (), batch=20), made, made, wanted, steps=200))
    first, last = ([r["mae"] for r in rows if r["labels"] == n] for n in (INITIAL, BUDGET))
    assert len(first) == len(last) == len(wanted) and np.ptp(first) < 1e-6
    assert all(r["r2"] > 0.9 for r in rows if r["labels"] == BUDGET) and max(last) < max(first)
