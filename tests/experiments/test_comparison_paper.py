"""The study of crystals with small networks: padding, descriptors, exports."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "comparison_paper"))
from crystals import DESCRIPTORS, descriptors
from networks import Runs, predictions
from sources import Labelled, read_export
from study import BUDGET, INITIAL, Cell, run_cell

from almlip_jax.errors import InputError


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
    (tmp_path / "b.json").write_text(json.dumps([{"structure": held}]))
    with pytest.raises(InputError, match="record 0 has no number"):
        read_export("salt", tmp_path / "b.json")


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
