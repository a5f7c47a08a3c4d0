"""The report: one HTML page of a campaign, finished or not, that opens without a network."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, select_autoescape
from plotly.offline import get_plotlyjs

from almlip_jax.campaign.report_figures import (
    error_curve,
    error_curves,
    errors_of,
    force_parity,
    force_reliability,
    most_uncertain,
    pressure_traces,
    score_traces,
    structure_parities,
    training_figures,
)
from almlip_jax.campaign.rundir import PotentialDirectory, RoundDirectory, RunDirectory
from almlip_jax.campaign.state import CampaignState, metric_units, read_state
from almlip_jax.campaign.status import calls_by_purpose, campaign_status, told_calls, told_under_way
from almlip_jax.campaign.walkers import bath, called
from almlip_jax.errors import InputError
from almlip_jax.files import read_csv, read_json, read_npz, understood, write_text
from almlip_jax.group_looks import Look, group_looks
from almlip_jax.oracles import LabelStore
from almlip_jax.targets import further_targets, target_errors
from almlip_jax.unit_names import spelt, unit_of


class Drawn:
    """What was drawn before, for as long as the files that it shows stay as they are.

    A campaign that writes its report after every round draws each of the rounds before once.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, Path], tuple[list[tuple[int, int] | None], dict[str, str]]] = {}

    def figures(self, what: str, files: Sequence[Path], draw: Callable[[], dict[str, str]]) -> dict[str, str]:
        """Names and JSON of figures of some files, which are drawn where one of the files is another than before."""
        key, now = (what, files[0]), [_written(file) for file in files]
        before, figures = self._kept.get(key, (None, {}))
        if now != before:
            figures = draw()
            self._kept[key] = now, figures
        return figures

    def figure(self, draw: Callable[[RoundDirectory], go.Figure | None], folder: RoundDirectory) -> str:
        """JSON of the figure that a function draws of what an exploration left."""

        def drawn() -> dict[str, str]:
            with understood(folder.walkers):
                return {"": _json(draw(folder))}

        return self.figures(draw.__name__, [folder.walkers, folder.pool, folder.batch], drawn)[""]


def _written(file: Path) -> tuple[int, int] | None:
    """When a file was written, and its size; None where there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


_NOTHING = "null"  # JSON of a figure that shows nothing


def write_report(run_dir: Path | str, drawn: Drawn | None = None) -> Path:
    """Writes ``report.html`` from what the run directory holds so far.

    Args:
        run_dir: of the campaign.
        drawn: what the report before drew, which is told of what is new; by default all is drawn.

    Returns:
        the page.

    Raises:
        InputError: there is no campaign in the folder, or it cannot be written to.
    """
    run = RunDirectory(run_dir).require()
    state, drawn = read_state(run), drawn or Drawn()
    environment = Environment(loader=PackageLoader("almlip_jax.campaign", "."), autoescape=select_autoescape(["jinja"]))
    template = environment.get_template("report.html.jinja")
    explored = [folder for folder in run.rounds() if folder.walkers.exists()]
    predicted = _predicted(run, state)
    predictions = {} if predicted is None else read_npz(predicted)
    with understood(predicted or run.state):
        looks = group_looks(_groups(state, predictions))
    pressures = {str(folder.index): drawn.figure(pressure_traces, folder) for folder in explored}
    status = campaign_status(run.path)
    rounds = state.rows()
    columns = list(dict.fromkeys(name for row in rounds for name in row))
    page = template.render(
        title=run.path.name,
        bath=bath,
        called=called,
        told_calls=told_calls,
        status=status,
        headline=_headline(state, max(state.test_calls, calls_by_purpose(run).get("test", 0)), status["under_way"]),
        errors=_error_rows(status, looks),
        error_columns={metric: spelt(unit_of(metric)) for metric in _shown_errors(status)},
        plotly=get_plotlyjs(),
        curves={error_curves()[metric][0]: _json(error_curve(state, looks, metric)) for metric in _curves(state)},
        walkers={str(folder.index): drawn.figure(score_traces, folder) for folder in explored},
        pressures=pressures,
        has_pressures=any(figure != "null" for figure in pressures.values()),
        trainings=_trainings(run, drawn),
        **_test_figures(predicted, predictions, looks),
        labels=_label_table(run),
        structure=_most_uncertain(explored, drawn),
        rounds=rounds,
        columns={name: spelt(unit) for name, unit in metric_units(run, columns).items()},
        config=run.config.read_text(errors="replace") if run.config.is_file() else "",
        versions=json.dumps(read_json(run.versions), indent=2) if run.versions.exists() else "",
    )
    write_text(run.report, page)
    return run.report


def _json(figure: go.Figure | None) -> str:
    """A figure as JSON that may stand inside a script element; ``null`` where there is nothing to show."""
    text = _NOTHING if figure is None else figure.to_json()
    return text.replace("</", "<\\/")


def _headline(state: CampaignState, test_calls: int, waiting: Mapping[str, int] | None = None) -> list[tuple[str, str]]:
    rows = [("labels", str(state.labels))]
    rows += [] if waiting is None else [("under way", told_under_way(waiting))]
    rows += [("calls for the test set", str(test_calls))] if test_calls else []
    if state.costs:
        rows += [("calls of the teacher", str(state.teacher_calls))]
        rows += [
            ("time of labels", f"{state.label_seconds:.4g} s"),
            ("time of the teacher", f"{state.teacher_seconds:.4g} s"),
        ]
    rows += [("rounds", str(state.round))]
    evaluated = [record for record in state.history if record.errors]
    rows += _told(evaluated[-1].errors, "") if evaluated else []
    seconds = sum(sum(record.seconds.values()) for record in state.history)
    if state.final is not None:
        rows += _told(state.final.errors, "final ")
        seconds += sum(state.final.seconds.values())
    return [*rows, ("time", f"{seconds / 60:.1f} min")]


def _told(errors: Mapping[str, float], which: str) -> list[tuple[str, str]]:
    """Errors of the forces and, where there are any, of the stresses, dipoles and the like of each group."""
    rows = []
    for metric in ("forces_rmse", "stress_rmse", *(f"{target.label}_rmse" for target in further_targets())):
        name, unit = error_curves()[metric]
        digits = 1 if metric == "forces_rmse" else 3
        for group, value in errors_of(errors, metric).items():
            rows.append((f"{which}{name} {group}", f"{1e3 * value:.{digits}f} {unit}"))
    return rows


def _groups(state: CampaignState, predictions: Mapping[str, np.ndarray]) -> set[str]:
    """Every group that the page shows."""
    errors = [record.errors for record in state.history] + ([] if state.final is None else [state.final.errors])
    groups = {group for one in errors for metric in error_curves() for group in errors_of(one, metric)}
    return groups | set(predictions.get("group", np.array([], str)).tolist())


def _curves(state: CampaignState) -> list[str]:
    """Errors that some round has; forces are asked for in any case."""
    known = [metric for metric in error_curves() if any(errors_of(r.errors, metric) for r in state.history)]
    return known or ["forces_rmse"]


def _shown_errors(status: Mapping[str, Any]) -> list[str]:
    """Errors that the table has columns for: those of what not every model gives only where there are some."""
    known = {**status["errors"], **({} if status["final"] is None else status["final"]["errors"])}
    return [name for name, target in target_errors().items() if target.basic or errors_of(known, name)]


def _error_rows(status: Mapping[str, Any], looks: Mapping[str, Look]) -> list[dict[str, Any]]:
    """Errors of the last round that was evaluated, and of the final potential: a row for each group."""
    final = {} if status["final"] is None else status["final"]["errors"]
    rows = []
    for group, look in looks.items():
        for which, errors in (("", status["errors"]), (", final potential", final)):
            values = {metric: errors.get(f"{metric}_{group}") for metric in target_errors()}
            if any(value is not None for value in values.values()):
                rows.append({"name": f"{group}{which}", "color": look.color, "values": values})
    return rows


def _most_uncertain(explored: Sequence[RoundDirectory], drawn: Drawn) -> str:
    """The figure of the newest exploration that recorded something."""
    found = (drawn.figure(most_uncertain, folder) for folder in reversed(explored))
    return next((figure for figure in found if figure != _NOTHING), _NOTHING)


def _trainings(run: RunDirectory, drawn: Drawn) -> dict[str, str]:
    """Name of each training, and of what else it shows -> the figure of its course, the newest first."""
    folders: dict[str, PotentialDirectory] = {"final": run.final}
    folders |= {f"round {one.index}": one for one in reversed(run.rounds())} | {"teacher": run.teacher}
    figures: dict[str, str] = {}
    for name, folder in folders.items():
        courses = drawn.figures("training", [folder.training], partial(_course, folder.training))
        figures |= {f"{name}, {shown}" if shown else name: figure for shown, figure in courses.items()}
    return figures


def _course(training: Path) -> dict[str, str]:
    """What each figure of a training shows, nothing for the first, and the figure; none of a table that is damaged."""
    if not training.exists():
        return {}
    with contextlib.suppress(InputError), understood(training):
        curves = [(name, _json(figure)) for name, figure in training_figures(read_csv(training)).items()]
        return {"": _NOTHING} if not curves else {"": curves[0][1], **dict(curves[1:])}
    return {}


def _predicted(run: RunDirectory, state: CampaignState) -> Path | None:
    """The predictions of the final potential, or the last one evaluated, for the test set; None without one."""
    files = [folder.test_predictions for folder in run.rounds()]
    files += [run.final.test_predictions] if state.final is not None and state.final.errors else []
    done = [file for file in files if file.exists()]
    return done[-1] if done else None


def _test_figures(
    path: Path | None, predictions: Mapping[str, np.ndarray], looks: Mapping[str, Look]
) -> dict[str, Any]:
    if path is None:
        return {"parity": "null", "reliability": "null", "parities": {}}
    with understood(path):
        return {
            "parity": _json(force_parity(predictions, looks)),
            "reliability": _json(force_reliability(predictions, looks)),
            "parities": {name: _json(figure) for name, figure in structure_parities(predictions, looks).items()},
        }


def _label_table(run: RunDirectory) -> list[dict[str, Any]]:
    """Labels by what they are for, those of a teacher last."""
    rows = [{"purpose": purpose, **counts} for purpose, counts in _summary(run.labels).items()]
    taught = [*_summary(run.driver_labels).items(), *_summary(run.teacher_labels).items()]
    return rows + [
        {"purpose": _PURPOSES.get(purpose, f"{purpose}, by the teacher"), **counts} for purpose, counts in taught
    ]


_PURPOSES = {"teacher": "dynamics for the teacher"}


def _summary(store: Path) -> dict[str, dict[str, float]]:
    """That of a label store; empty where there is none, or it cannot be read."""
    if not store.exists():
        return {}
    try:
        with LabelStore(store, readonly=True) as opened:
            return opened.summary()
    except InputError:
        return {}
