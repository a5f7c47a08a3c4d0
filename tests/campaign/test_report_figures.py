"""What the figures of the report show: every group in one look, the course of a training, the cell, pressures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from almlip_jax.campaign.report_figures import (
    cell_edges,
    error_curve,
    force_parity,
    force_reliability,
    pressure_traces,
    score_traces,
    structure_parities,
    structure_view,
    training_figures,
)
from almlip_jax.campaign.rundir import RoundDirectory
from almlip_jax.campaign.state import CampaignState, FinalRecord, RoundRecord
from almlip_jax.files import write_npz
from almlip_jax.group_looks import COLORS, group_looks
from almlip_jax.units import GPA

GROUPS = [f"{t}K" for t in range(100, 1300, 100)]
"""Twelve, more than there are colours."""


def test_every_group_has_a_look_of_its_own_in_the_order_people_sort_them():
    looks = group_looks(reversed(GROUPS))
    assert list(looks) == GROUPS, "1000K comes after 900K"
    assert len(set(looks.values())) == len(GROUPS)
    assert len({look.color for look in looks.values()}) == len(COLORS)
    assert group_looks(GROUPS[:3]) == {name: looks[name] for name in GROUPS[:3]}


def test_all_groups_are_drawn_and_look_the_same_in_every_figure():
    looks = group_looks(GROUPS)
    errors = {f"forces_rmse_{group}": 0.1 * (n + 1) for n, group in enumerate(GROUPS)}
    record = RoundRecord(round=0, labels=10, errors=errors)
    state = CampaignState(
        history=(record,), final=FinalRecord(round=0, steps=1, errors={"forces_rmse_300K": 0.05}), labels=10
    )
    rng = np.random.default_rng(0)
    found = {
        "group": np.repeat(GROUPS, 5),
        "forces_true": rng.normal(size=(60, 3)),
        "forces_pred": rng.normal(size=(60, 3)),
        "force_total": np.ones(60),
        "structure_group": np.array(GROUPS),
        "stress_structure": np.array([0, 11]),
        "stress_true": np.ones((2, 6)),
        "stress_pred": np.zeros((2, 6)),
    }
    curve, parity = error_curve(state, looks, "forces_rmse"), force_parity(found, looks)
    shown = [trace.name for trace in curve.data if trace.mode == "lines+markers"]
    assert shown == GROUPS == [trace.name for trace in parity.data[:-1]]
    assert curve.layout.legend.orientation == "v", "twelve entries do not fit above a figure"
    (star,) = (trace for trace in curve.data if trace.mode == "markers")
    assert star.name.startswith("300K") and list(star.y) == [50.0] and star.marker.color == looks["300K"].color
    for figure in (curve, force_reliability(found, looks)):
        lines = {trace.name: (trace.line.color, trace.line.dash) for trace in figure.data if trace.name in looks}
        assert lines == {name: (look.color, look.dash) for name, look in looks.items()}
    assert {trace.name: trace.marker.color for trace in parity.data[:-1]} == {n: k.color for n, k in looks.items()}
    dipoles = {f"dipole_{part}": found[f"stress_{part}"][..., :3] for part in ("true", "pred")}
    parities = structure_parities(found | dipoles | {"dipole_structure": np.array([1, 2])}, looks)
    shown = {name: [trace.name for trace in figure.data[:-1]] for name, figure in parities.items()}
    assert shown == {"stress": ["100K", "1200K"], "dipole": ["200K", "300K"]}
    assert parities["dipole"].layout.xaxis.title.text == "true dipole component (e*Å)"
    assert error_curve(state, looks, "stress_rmse") is None
    assert structure_parities({"stress_true": np.zeros((0, 6))}, looks) == {}


@pytest.mark.parametrize(
    ("columns", "title", "values"),
    [
        ({"train_loss_0": [3.0, 2.0], "validation_forces_rmse_0": [0.2, 0.1]}, "validation force RMSE (meV/Å)", 200.0),
        ({"train_loss_0": [3.0, 2.0], "validation_forces_rmse_0": [float("nan")] * 2}, "training loss", 3.0),
        ({"train_loss_0": [3.0, 2.0], "validation_forces_rmse_0": [None, None]}, "training loss", 3.0),
    ],
)
def test_the_course_of_a_training_is_drawn_from_what_its_table_has(columns, title, values):
    rows = [{"epoch": n, "step": 50 * n, **{name: one[n] for name, one in columns.items()}} for n in range(2)]
    (figure,) = training_figures(rows).values()
    assert figure.layout.yaxis.title.text == title
    assert list(figure.data[0].x) == [0, 50] and figure.data[0].y[0] == pytest.approx(values)
    first, second = training_figures([row | {"validation_dipole_rmse_0": 0.03} for row in rows]).values()
    assert first == figure and second.layout.yaxis.title.text == "validation dipole RMSE (me*Å)"
    assert list(second.data[0].y) == [30.0, 30.0]
    assert training_figures([]) == training_figures([{"epoch": 1}]) == {}


def test_the_cell_is_drawn_where_a_structure_is_periodic():
    copper = bulk("Cu", cubic=True)
    copper.positions += 0.3 - 2 * copper.cell.array[0]  # two cells away from the one that is drawn
    copper.arrays["force_std"] = np.full(4, 0.1)
    view = {trace.name: trace for trace in structure_view(copper, "").data}
    corners = {tuple(p) for p in zip(view["cell"].x, view["cell"].y, view["cell"].z, strict=True) if None not in p}
    assert len(cell_edges(copper)) == 12 and len(corners) == 8
    assert np.max([*view["atoms"].x, *view["atoms"].y]) < 3.61 and np.min(view["atoms"].x) >= 0
    ends = np.array([p for p in zip(view["bonds"].x, view["bonds"].y, strict=True) if None not in p])
    assert len(ends) == 2 * (6 + 36), "6 of the 24 bonds lie in the cell, the others are halves at both of their ends"
    water = molecule("H2O")
    water.arrays["force_std"] = np.zeros(3)
    names = [trace.name for trace in structure_view(water, "").data]
    assert names == ["bonds", "atoms"]
    (bonds,) = (trace for trace in structure_view(water, "").data if trace.name == "bonds")
    assert len(bonds.x) == 2 * 3, "two O-H bonds, each with a gap behind it"
    assert len(cell_edges(Atoms("H", cell=np.eye(3), pbc=(True, True, False)))) == 4
    assert len(cell_edges(Atoms("H", cell=np.eye(3), pbc=(False, True, False)))) == 1


def test_pressures_are_drawn_where_there_are_any(tmp_path: Path):
    folder = RoundDirectory(tmp_path, 0).create()
    arrays = {
        "time_fs": np.array([5.0, 10.0]),
        "status": np.array(["completed", "stopped"]),
        "walker_temperature": np.array([300.0, 600.0]),
        "force_std_max": np.array([[0.1, 0.2], [0.3, np.nan]]),
        "pressure": np.array([[2 * GPA, np.nan], [4 * GPA, np.nan]]),
    }
    write_npz(folder.walkers, arrays)
    figure = pressure_traces(folder)
    assert list(figure.data[0].y) == pytest.approx([2.0, 4.0]) and not figure.data[1].y
    assert score_traces(folder).layout.yaxis.title.text == "force_std_max (eV/Å)"
    write_npz(folder.walkers, {**arrays, "pressure": np.full((2, 2), np.nan)})
    assert pressure_traces(folder) is None
    write_npz(folder.walkers, {"step": np.arange(3)})  # of no exploration
    assert score_traces(folder) is None and pressure_traces(folder) is None
