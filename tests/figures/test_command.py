"""``almlip figure``: everything from the table alone, the same bytes each time, text as text."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
from matplotlib import pyplot as plt
from power_law_sweep import SAVING, sweep, written
from typer.testing import CliRunner

from almlip_jax.cli import app
from almlip_jax.errors import InputError
from almlip_jax.evaluation.comparison import evolution, shared_seeds
from almlip_jax.evaluation.comparison import learning_curves as curves_of
from almlip_jax.evaluation.pairs import Pairs
from almlip_jax.evaluation.tidy import CALIBRATION, monitors, read_tables
from almlip_jax.figures.command import MAKERS, make
from almlip_jax.figures.errors import calibration, parity
from almlip_jax.figures.evolution import calibration_evolution, uncertainty_evolution
from almlip_jax.figures.learning_curves import learning_curves
from almlip_jax.figures.style import SELECTOR_COLORS, selector_lines
from almlip_jax.files import write_csv


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("table") / "results.csv", sweep(seeds=3, rounds=3))


@pytest.fixture(scope="module")
def made(table, tmp_path_factory) -> dict[str, Any]:
    """What the command says of everything, as JSON."""
    folder = tmp_path_factory.mktemp("figures")
    told = folder / "all.json"
    result = CliRunner().invoke(app, ["figure", "all", str(table), "--out", str(folder / "out"), "--json", str(told)])
    assert result.exit_code == 0, result.output
    return json.loads(told.read_text())


def test_all_figures_and_tables_come_from_one_command(made):
    assert made["skipped"] == {} and all(Path(path).stat().st_size > 0 for path in made["written"])
    assert len({Path(path).stem for path in made["written"]}) == len(MAKERS)
    assert len(made["rows"]) == 4 * 3 and {row["selector"] for row in made["rows"]} == {"random", "lcmd", "top_k"}
    assert any("3 seeds Wilcoxon's test cannot" in note for note in made["notes"])


def test_the_same_table_gives_the_same_bytes(table, made, tmp_path):
    before = {Path(path).name: Path(path) for path in made["written"]}
    for name in ("profiles", "tables"):
        for path in map(Path, make(name, [table], tmp_path)["written"]):
            assert path.read_bytes() == before[path.name].read_bytes(), path


def test_text_in_vector_files_is_text(made):
    (path,) = (path for path in made["written"] if path.endswith("learning_curves_forces_rmse.pdf"))
    content = Path(path).read_bytes()
    assert b"/Type0" in content or b"/TrueType" in content  # type 42: fonts that programs can edit
    assert b"/Type3" not in content


def test_selectors_look_the_same_everywhere_and_not_like_each_other():
    names = ["random", "lcmd", "top_k", "my_own", "top_k (energy_std)", "plain", "gate", "bias", "in_loop"]
    lines = selector_lines(names)
    assert lines["top_k (energy_std)"]["color"] == lines["top_k"]["color"] == SELECTOR_COLORS["top_k"]
    assert len({line["color"] for line in lines.values()}) == len(lines) - 1
    again = selector_lines(names[::-1])
    assert all(again[name]["color"] == lines[name]["color"] for name in names)
    looks = {(line["color"], line["marker"], str(line["linestyle"])) for line in lines.values()}
    assert len(looks) == len(lines)
    named = {
        name: color for name, color in SELECTOR_COLORS.items() if name not in ("chain", "threshold", "top_fraction")
    }
    for one, other in combinations(named.values(), 2):
        assert np.linalg.norm(np.subtract(matplotlib.colors.to_rgb(one), matplotlib.colors.to_rgb(other))) > 0.1


def test_what_a_table_lacks_is_skipped_or_one_sentence(tmp_path):
    bare = sweep(systems=("water",), tests=("300K",), seeds=2, rounds=2)
    bare[[*CALIBRATION, "sigma_batch"]] = np.nan
    path = written(tmp_path / "bare.csv", bare)
    found = make("all", [path], tmp_path / "out")
    assert set(found["skipped"]) == {"uncertainty_evolution", "calibration_evolution", "ranking_evolution"}
    with pytest.raises(InputError, match="sigma_batch"):
        make("uncertainty_evolution", [path], tmp_path / "out")
    mixed = sweep(systems=("water",), tests=("300K",), seeds=2, rounds=2)
    mixed.loc[mixed["seed"] == 1, "monitor"] = "energy_std"
    with pytest.raises(InputError, match="water: uncertainties are of energy_std in some rows and of force_std_mean"):
        make("uncertainty_evolution", [written(tmp_path / "mixed.csv", mixed)], tmp_path / "out")
    with pytest.raises(InputError, match="no figure 'pie'"):
        make("pie", [path], tmp_path / "out")


def test_metrics_of_calibration_are_drawn_in_their_units_as_means_over_seeds(tmp_path):
    table = sweep(seeds=3, rounds=4)
    table["crps"] = 0.01 * (1 + table["round"]) * (1 + table["seed"])
    figure = calibration_evolution({name: evolution(table, name) for name in ("crps", "auroc")})
    crps, auroc = figure.axes[:2]
    assert crps.get_ylabel() == "CRPS (meV/Å) ↓" and auroc.get_ylabel() == "AUROC ↑"
    line = crps.lines[0]
    np.testing.assert_allclose(line.get_ydata(), 20.0 * (1 + np.asarray(line.get_xdata())), rtol=1e-12)
    plt.close(figure)
    found = make("ranking_evolution", [written(tmp_path / "table.csv", table)], tmp_path / "out")
    assert {Path(path).name for path in found["written"]} == {"ranking_evolution.pdf", "ranking_evolution.png"}


@pytest.mark.parametrize(
    ("monitor", "label"), [("energy_std", "energy_std (eV)"), ("force_std_rel", "force_std_rel"), (None, "uncertainty")]
)
def test_uncertainty_is_drawn_in_the_unit_of_the_score_that_was_monitored(monitor, label, tmp_path):
    table = sweep(systems=("water",), seeds=2, rounds=2, saving={"random": 1.0}).assign(monitor=monitor)
    table = read_tables([written(tmp_path / "results.csv", table if monitor else table.drop(columns="monitor"))])
    batch, pool = (evolution(table, f"sigma_{of}", by_test=False) for of in ("batch", "pool"))
    figure = uncertainty_evolution(batch, pool, monitors=monitors(table))
    assert [axes.get_ylabel() for axes in figure.axes] == [label]
    plt.close(figure)


def test_only_seeds_that_all_selectors_share_are_drawn():
    """A selector that lacks the hard seed would look better than it is."""
    table = sweep(systems=("water",), tests=("300K",), seeds=5, rounds=3)
    table.loc[table["seed"] == 4, "forces_rmse"] *= 100
    table = table[(table["selector"] != "lcmd") | (table["seed"] != 4)]
    shared, notes = shared_seeds(curves_of(table))
    (selectors,) = shared.values()
    assert {name: one.seeds for name, one in selectors.items()} == dict.fromkeys(SAVING, (0, 1, 2, 3))
    assert notes == ["water: only the 4 of 5 seeds that all share are drawn."]
    apart = table[(table["selector"] != "top_k") | (table["seed"] == 4)]
    (selectors,) = shared_seeds(curves_of(apart))[0].values()
    assert set(selectors) == {"random", "lcmd"} and selectors["lcmd"].seeds == (0, 1, 2, 3)
    assert "top_k is not drawn" in shared_seeds(curves_of(apart))[1][0]
    batch, pool = (evolution(part, "sigma_pool") for part in (table, table[table["seed"] > 1]))
    (selectors,) = shared_seeds(batch, pool)[0].values()
    assert selectors["random"].seeds == (2, 3) and selectors["random"].values.shape == (2, 3)


@pytest.mark.parametrize(("seeds", "bands", "points"), [(1, 0, 0), (2, 0, 2), (3, 0, 3), (4, 1, 0)])
def test_few_seeds_are_points_and_more_a_band(seeds, bands, points):
    table = sweep(systems=("water",), tests=("300K",), seeds=seeds, rounds=3, noise=0.5, saving={"random": 1.0})
    last = (table["seed"] == 0) & (table["round"] == 2)
    curves = curves_of(table[~last] if seeds > 1 else table)
    figure = learning_curves(curves)
    (axes,) = figure.axes
    assert len(axes.collections) == bands and len(axes.lines) == 1 + points
    (one,) = next(iter(curves.values())).values()
    mean = 1e3 * np.exp(np.log(one.errors).mean(axis=0))
    known = np.isfinite(mean)  # the mean ends where the first seed does
    assert known.sum() == (3 if seeds == 1 else 2)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), mean[known])
    for line, errors in zip(axes.lines[1:], one.errors, strict=False):
        np.testing.assert_allclose(line.get_ydata(), 1e3 * errors)
    plt.close(figure)


def test_a_training_is_drawn_or_refused_in_a_sentence(tmp_path):
    write_csv(
        tmp_path / "003" / "training.csv", [{"step": 50 * n, "validation_forces_rmse_0": 0.1 / n} for n in (1, 2)]
    )
    found = make("training", [tmp_path / "003" / "training.csv"], tmp_path / "out")
    assert [Path(path).name for path in found["written"]] == ["training.pdf", "training.png"]
    write_csv(tmp_path / "none.csv", [{"step": 1, "validation_forces_rmse_0": None}])
    with pytest.raises(InputError, match=r"none\.csv has no validation error"):
        make("training", [tmp_path / "none.csv"], tmp_path / "out")


def test_many_groups_are_drawn_each_in_its_look(tmp_path):
    """Twelve groups in parity and calibration, with a name in the legend each."""
    rng = np.random.default_rng(0)
    names = np.repeat([f"{n}00K" for n in range(1, 13)], 30)
    labels, sigma = rng.normal(size=(360, 3)), rng.uniform(0.05, 0.2, size=360)
    errors = rng.normal(size=(360, 3)) * sigma[:, None] / np.sqrt(3)
    pairs = {"forces": Pairs(names, labels, labels + errors, sigma)}
    for draw in (parity, calibration):
        figure = draw(pairs)
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [f"{n}00K" for n in range(1, 13)]
        looks = {(line.get_color(), line.get_marker()) for line in legend.get_lines()}
        assert len(looks) == 12
        plt.close(figure)
