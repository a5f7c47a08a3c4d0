"""Status and report of a real, tiny campaign, whole and with pieces missing; verdicts on histories made by hand."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, RenderableType

from almlip_jax.campaign import report
from almlip_jax.campaign.report import Drawn, write_report
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.status import campaign_status, render_status, trend
from almlip_jax.errors import InputError
from almlip_jax.files import read_csv, read_npz, write_csv, write_npz
from almlip_jax.units import GPA


@pytest.fixture
def run(reference: Path, tmp_path: Path) -> RunDirectory:
    """A copy of the finished tiny campaign."""
    shutil.copytree(reference / "run", tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def text_of(shown: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=300)
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("factor", "verdict"), [(0.8, "converging"), (1.0, "stalled"), (1.2, "diverging")])
def test_trends(factor, verdict):
    assert trend([(n, n * math.log(factor)) for n in range(5)]) == verdict
    assert trend([(0, 0.0), (1, 0.0)]) == "unknown"


def test_status_of_a_finished_campaign(run):
    found = campaign_status(run.path)
    state = json.loads(run.state.read_text())
    for name in ("round", "stage", "labels", "converged", "reason", "finished"):
        assert found[name] == state[name]
    assert found["errors"] == state["history"][-1]["errors"] and not found["running"]
    assert found["diagnosis"]["trend"].keys() >= found["errors"].keys()
    shares = [atom["share"] for atom in found["diagnosis"]["atoms"]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1 + 1e-9
    json.dumps(found)
    shown = text_of(render_status(found))
    assert "finished" in shown and state["reason"][:40] in shown
    assert found["units"]["forces_rmse_300K"] == "eV/A" and found["units"]["sigma_pool"] == "eV/A" and "eV/A" in shown
    assert found["calls"] == {"initial": 11, "test": 50, "train": 6}
    assert "67 (11 initial, 50 test, 6 train)" in shown
    assert all(name in shown and f"{value:.4g}" in shown for name, value in found["errors"].items())
    assert "at work" in text_of(render_status({**found, "finished": False, "running": True}))
    assert "at work on the final potential" in text_of(render_status({**found, "running": True}))


def test_status_names_what_ended_walkers(run):
    """A walker that an unphysical frame ended is listed with its check, temperature, step and atom."""
    folder = [one for one in run.rounds() if one.walkers.exists()][-1]
    arrays = read_npz(folder.walkers)
    arrays.update(
        status=np.array(["stopped", "unphysical"]),
        cause=np.array(["none", "dissociated"]),
        stop_step=np.array([12, 34]),
        stop_atom=np.array([0, 2]),
    )
    arrays.update(
        departed_step=np.array([-1, 20]),
        departed_atom=np.array([-1, 1]),
        departure=np.array([1.5, 3.25]),
        pressure=np.array([[np.nan, 2 * GPA], [np.nan, 4 * GPA]] * (len(arrays["step"]) // 2)),
    )
    write_npz(folder.walkers, arrays)
    status = campaign_status(run.path)
    diagnosis = status["diagnosis"]
    assert diagnosis["departures"] == [{"walker": 1, "temperature": 600.0, "atom": 1, "step": 20, "distance": 3.25}]
    (pressure,) = diagnosis["pressures"]
    assert (pressure["walker"], pressure["mean"], pressure["std"]) == (1, pytest.approx(3.0), pytest.approx(1.0))
    shown, page = text_of(render_status(status)), write_report(run.path).read_text()
    assert "atoms beyond the training distribution" in shown and "3.25" in shown and "(GPa)" in shown
    assert 'id="pressures"' in page and 'id="departures"' in page
    assert diagnosis["checks"] == {"stopped": 1, "dissociated": 1}
    assert diagnosis["walkers"][1] == {
        "walker": 1,
        "temperature": 600.0,
        "step": 34,
        "atom": 2,
        "check": "dissociated",
    }
    assert any("600 K" in sentence and "dissociated" in sentence for sentence in diagnosis["advice"])
    state = json.loads(run.state.read_text())
    for record in state["history"]:  # killed before the round knew of its walkers
        record["walkers"] = {}
    run.state.write_text(json.dumps(state))
    advice = campaign_status(run.path)["diagnosis"]["advice"]
    assert any("1 of 2 walkers ended early at 600 K" in sentence for sentence in advice)
    arrays |= {"walker_final_temperature": np.array([300.0, 900.0]), "stop_member": np.array([-1, 3])}
    write_npz(folder.walkers, arrays | {"cause": np.array(["none", "not_finite"])})
    status = campaign_status(run.path)
    shown, page = text_of(render_status(status)), write_report(run.path).read_text()
    assert status["diagnosis"]["walkers"][1]["member"] == 3 and "member" not in status["diagnosis"]["walkers"][0]
    assert "600 to 900" in shown and "not_finite (member 3)" in shown, "a ramp, and the member that broke"
    assert any("600 to 900 K" in one and "not finite (member 3)" in one for one in status["diagnosis"]["advice"])
    assert "1: 600 to 900 K, unphysical" in page and "<td>600 to 900</td>" in page


@pytest.mark.parametrize("missing", ["rounds", "labels.db", "test.extxyz", "metrics.csv", "versions.json"])
def test_status_and_report_bear_what_is_missing(run, missing):
    path = run.path / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    assert campaign_status(run.path)["labels"] > 0
    assert write_report(run.path).stat().st_size > 1e6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state.json", "test_predictions.npz", "walkers.npz", "training.csv", "pool.extxyz"])
def test_damaged_files_are_one_sentence_in_a_report_or_do_no_harm(run, damages, name):
    """Whatever of a run is damaged, the page is written without it, or a sentence names the file."""
    path = run.path / name if name == "state.json" else sorted(run.path.glob(f"rounds/*/{name}"))[-1]
    whole = path.read_bytes()
    for damage, content in damages(path).items():
        path.write_bytes(content)
        try:
            assert write_report(run.path).exists()
        except InputError as error:
            assert "\n" not in str(error) and str(run.path) in str(error), (name, damage)
    path.write_bytes(whole)
    assert write_report(run.path).stat().st_size > 1e6


def test_a_campaign_draws_a_round_once_and_again_where_its_files_have_changed(run, monkeypatch):
    drawn, drawings = Drawn(), []
    draw = report.score_traces
    monkeypatch.setattr(report, "score_traces", lambda folder: drawings.append(folder.index) or draw(folder))
    explored = [one.index for one in run.rounds() if one.walkers.exists()]
    assert explored
    page = write_report(run.path, drawn).read_text()
    assert drawings == explored
    assert write_report(run.path, drawn).read_text() == page and drawings == explored
    last = run.round(explored[-1])
    arrays = read_npz(last.walkers)
    assert " K, not_finite" not in page
    write_npz(last.walkers, {**arrays, "status": np.full(len(arrays["status"]), "not_finite")})
    page = write_report(run.path, drawn).read_text()
    assert drawings == [*explored, explored[-1]] and " K, not_finite" in page
    assert write_report(run.path).read_text() == page


def test_a_damaged_state_is_one_sentence(run, tmp_path):
    run.state.write_text(run.state.read_text()[:50])
    with pytest.raises(InputError, match=r"state\.json"):
        campaign_status(run.path)
    with pytest.raises(InputError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def test_the_report_needs_no_network(run):
    page = write_report(run.path).read_text()
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", own)
    assert page.count("<script src") == 0 and len(page) < 8e6
    for figure in ("learning_curve", "training", "walkers", "parity", "reliability", "structure"):
        assert f'id="{figure}"' in page
    state = json.loads(run.state.read_text())
    assert 'id="pressures"' not in page and "forces_rmse_300K (eV/Å)" in page and "<option>round 2</option>" in page
    assert state["reason"] in page and str(state["labels"]) in page
    assert "<b>50</b><span>calls for the test set</span>" in page


def test_a_script_cannot_be_ended_by_data(run):
    """A name in a config or a reason that looks like a tag stays text."""
    state = json.loads(run.state.read_text())
    state["reason"] = "</script><script>alert(1)</script>"
    run.state.write_text(json.dumps(state))
    page = write_report(run.path).read_text()
    assert "<script>alert(1)" not in page


def test_an_unfinished_first_round(run):
    """Before any round has been trained there is a report too."""
    state = json.loads(run.state.read_text())
    state.update(history=[], round=0, stage="train", finished=False, reason=None)
    run.state.write_text(json.dumps(state))
    shutil.rmtree(run.rounds_folder)
    assert campaign_status(run.path)["diagnosis"]["advice"] == ["No round has been trained yet."]
    assert "There is nothing to show yet" in write_report(run.path).read_text()


def test_the_unit_of_every_column_stands_beside_the_metrics(run):
    (first, *_), units = read_csv(run.metrics), {row["column"]: row["unit"] for row in read_csv(run.metrics_units)}
    assert list(units) == list(first)
    assert units["forces_rmse_600K"] == units["sigma_pool"] == "eV/A" and units["energy_mae_300K"] == "eV/atom"
    assert units["seconds_train"] == "s" and units["picoseconds"] == "ps" and units["labels"] is None


def test_errors_of_dipoles_stand_where_those_of_forces_do(run):
    """In status and page: curves, table, parity, the course of trainings; nothing of it without a dipole."""
    assert "dipole" not in write_report(run.path).read_text().split("<h2>Config")[0]
    state = json.loads(run.state.read_text())
    for n, record in enumerate(state["history"]):
        record["errors"] |= {"dipole_mae_300K": 0.01, "dipole_rmse_300K": 0.0625 / (1 + n)}
    run.state.write_text(json.dumps(state))
    folder = run.rounds()[-1]
    dipoles = {"dipole_true": np.ones((2, 3)), "dipole_pred": np.zeros((2, 3)), "dipole_structure": np.array([0, 1])}
    write_npz(folder.test_predictions, read_npz(folder.test_predictions) | dipoles)
    rows = [row | {f"validation_dipole_rmse_{m}": 0.25 for m in range(2)} for row in read_csv(folder.training)]
    write_csv(folder.training, rows)
    status = campaign_status(run.path)
    last = 0.0625 / len(state["history"])
    assert status["errors"]["dipole_rmse_300K"] == last and status["units"]["dipole_rmse_300K"] == "e*A"
    assert f"{last:.4g}" in text_of(render_status(status))
    page = write_report(run.path).read_text()
    text = page.split("<h2>Config")[0]
    assert "<option>dipole RMSE</option>" in text and "<th>dipole_rmse (e*Å)</th>" in text
    assert f"<b>{1e3 * last:.3f} me*Å</b><span>dipole RMSE 300K</span>" in text and 'id="dipole_parity"' in text
    assert f"<option>round {folder.index}, validation dipole RMSE</option>" in text
    assert "<th>dipole_rmse_300K (e*Å)</th>" in text, "in the table of rounds too"
    assert "true dipole component" in page


def test_a_final_potential_of_several_rounds_has_its_errors_in_the_page(run):
    """They stand in the last row only."""
    state = json.loads(run.state.read_text())
    state["final"] = {"round": 2, "steps": 5, "errors": {"forces_rmse_300K": 0.012345}, "seconds": {}}
    run.state.write_text(json.dumps(state))
    page = write_report(run.path).read_text()
    assert "final_forces_rmse_300K (eV/Å)" in page and "300K, final potential" in page and "0.01235" in page
