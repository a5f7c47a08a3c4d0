"""The figures of the report, as plotly draws them in a browser: one function each, data of a run in, figure out.

Every group of the test set has one look on the whole page (`group_looks`).  A figure that has nothing to show is None.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Final

import numpy as np
import plotly.graph_objects as go
from ase import Atoms
from ase.data import covalent_radii
from ase.data.colors import jmol_colors
from ase.neighborlist import natural_cutoffs, neighbor_list

from almlip_jax.campaign.rundir import RoundDirectory
from almlip_jax.campaign.state import CampaignState
from almlip_jax.campaign.walkers import bath, called, of_walker
from almlip_jax.errors import InputError
from almlip_jax.evaluation.training_curves import TrainingCurves, training_curves
from almlip_jax.files import Cell, read_npz
from almlip_jax.group_looks import Look, group_looks
from almlip_jax.structures.io import read_structures
from almlip_jax.targets import further_targets
from almlip_jax.uncertainty import reliability
from almlip_jax.unit_names import spelt, unit_of
from almlip_jax.units import GPA

_ERRORS: Final[dict[str, tuple[str, str]]] = {
    "forces_rmse": ("force RMSE", "meV/Å"),
    "energy_rmse": ("energy RMSE", "meV/atom"),
    "stress_rmse": ("stress RMSE", "meV/Å³"),
}

_GREY = "#999999"
_MOST_POINTS = 4000  # of a scatter plot
_BOND = 1.25  # drawn where atoms are nearer than this multiple of the sum of their covalent radii
_SHORT_LEGEND = 6  # entries that fit above a figure
_ROW = 19  # pixels of an entry in a legend at the side


def error_curves() -> Mapping[str, tuple[str, str]]:
    """Errors that have learning curves, how people write them, and the unit of a thousandth of the number."""
    return _ERRORS | {f"{one.label}_rmse": (f"{one.label} RMSE", spelt(one.shown)) for one in further_targets()}


def error_curve(state: CampaignState, looks: Mapping[str, Look], metric: str) -> go.Figure | None:
    """An error of each test group against the number of labels; a star is the final potential's."""
    series: dict[str, list[tuple[int, float]]] = {}
    for record in state.history:
        for group, value in errors_of(record.errors, metric).items():
            series.setdefault(group, []).append((record.labels, 1e3 * value))
    if not series:
        return None
    figure = go.Figure()
    final = {} if state.final is None else errors_of(state.final.errors, metric)
    for group in (group for group in looks if group in series):
        x, y = zip(*series[group], strict=True)
        look = looks[group]
        line = {"color": look.color, "dash": look.dash}
        marker = {"symbol": look.marker}
        figure.add_scatter(x=x, y=y, mode="lines+markers", name=group, line=line, marker=marker, legendgroup=group)
        if group in final:
            figure.add_scatter(
                x=x[-1:],
                y=[1e3 * final[group]],
                mode="markers",
                name=f"{group}, final potential",
                marker={"symbol": "star", "size": 13, "color": look.color},
                showlegend=False,
                legendgroup=group,
            )
    name, unit = error_curves()[metric]
    return _styled(figure, "labels", f"{name} ({unit})", len(series), yaxis_type="log")


def errors_of(errors: Mapping[str, float], metric: str) -> dict[str, float]:
    """The error of each group, from names like ``forces_rmse_300K``."""
    prefix = f"{metric}_"
    return {name.removeprefix(prefix): value for name, value in errors.items() if name.startswith(prefix)}


def training_figures(rows: Sequence[Mapping[str, Cell]]) -> dict[str, go.Figure]:
    """The course of a training, from the lines of its ``training.csv``: name of what is shown -> its figure."""
    return {curves.name: _training_figure(curves) for curves in training_curves(rows)}


def _training_figure(curves: TrainingCurves) -> go.Figure:
    figure = go.Figure()
    for model, look in group_looks(curves.models).items():
        steps, values = curves.models[model]
        line = {"color": look.color, "dash": look.dash, "width": 1.3}
        figure.add_scatter(
            x=steps.tolist(),
            y=_rounded(values),
            mode="lines+markers",
            name=f"model {model}",
            line=line,
            marker={"size": 4},
        )
    return _styled(figure, "optimiser steps", curves.label, len(curves.models), yaxis_type="log")


# ------------------------------------------------------------------------------------------------------------- walkers


def score_traces(folder: RoundDirectory) -> go.Figure | None:
    """The gate's score along each walker, its thresholds, and the frames that were recorded and selected."""
    arrays = _walker_arrays(folder)
    score = str(arrays.get("gate_score", "force_std_max"))
    if score not in arrays:
        return None
    figure = _traces(arrays, arrays[score])
    _mark_recorded(figure, folder, score)
    for name, dash in (("gate_record", "dash"), ("gate_stop", "solid")):
        for level in np.unique(arrays.get(name, np.array(np.nan))).tolist():  # of systems: each has its own
            if math.isfinite(level) and level > 0:
                figure.add_hline(y=level, line_dash=dash, line_color="#555555", line_width=1)
    unit = spelt(unit_of(score))
    title = f"{score} ({unit})" if unit else score
    return _styled(figure, "time (fs)", title, len(arrays["status"]) + 2, yaxis_type="log")


def pressure_traces(folder: RoundDirectory) -> go.Figure | None:
    """The internal pressure along each walker, where it was asked for and the walker fills space."""
    arrays = _walker_arrays(folder)
    if "pressure" not in arrays or not np.isfinite(arrays["pressure"]).any():
        return None
    figure = _traces(arrays, arrays["pressure"] / GPA)
    return _styled(figure, "time (fs)", "internal pressure (GPa)", len(arrays["status"]))


def _walker_arrays(folder: RoundDirectory) -> dict[str, Any]:
    """What was traced; nothing where the file is damaged or is none of an exploration."""
    try:
        arrays = read_npz(folder.walkers)
    except InputError:
        return {}
    return arrays if {"time_fs", "status", "walker_temperature"} <= set(arrays) else {}


def _traces(arrays: Mapping[str, Any], values: np.ndarray) -> go.Figure:
    figure = go.Figure()
    looks = list(group_looks(str(walker) for walker in range(len(arrays["status"]))).values())
    for walker in range(len(arrays["walker_temperature"])):
        kept, one = np.isfinite(values[:, walker]), of_walker(arrays, walker)
        figure.add_scatter(
            x=arrays["time_fs"][kept].tolist(),
            y=_rounded(values[kept, walker]),
            mode="lines",
            name=f"{called(one)}: {bath(one)} K, {arrays['status'][walker]}",
            line={"color": looks[walker].color, "dash": looks[walker].dash, "width": 1},
        )
    return figure


def _mark_recorded(figure: go.Figure, folder: RoundDirectory, score: str) -> None:
    """Recorded frames, and those that were selected, as marks on the traces."""
    for path, name, symbol in ((folder.pool, "recorded", "circle-open"), (folder.batch, "selected", "star")):
        if not path.exists():
            continue
        frames = [frame for frame in read_structures(path) if score in frame.info and "time_fs" in frame.info]
        figure.add_scatter(
            x=[frame.info["time_fs"] for frame in frames],
            y=_rounded([frame.info[score] for frame in frames]),
            text=[f"walker {frame.info.get('walker')}" for frame in frames],
            mode="markers",
            name=name,
            marker={"symbol": symbol, "color": "#222222", "size": 9 if symbol == "star" else 5},
        )


# ------------------------------------------------------------------------------------------------------------ test set


def force_parity(predictions: Mapping[str, np.ndarray], looks: Mapping[str, Look]) -> go.Figure:
    """Predicted against true force components of the test set."""
    pair = (predictions["forces_true"], predictions["forces_pred"])
    return _parity(*pair, predictions["group"], looks, "true force component (eV/Å)", "predicted (eV/Å)")


def structure_parities(predictions: Mapping[str, np.ndarray], looks: Mapping[str, Look]) -> dict[str, go.Figure]:
    """Predicted against true components of stresses, dipoles and the like, by name, where test structures have them."""
    units = {"stress": unit_of("stress_rmse")} | {one.label: one.unit for one in further_targets()}
    figures = {}
    for name, unit in units.items():
        if len(predictions.get(f"{name}_true", ())):
            pair = predictions[f"{name}_true"], predictions[f"{name}_pred"]
            groups = predictions["structure_group"][predictions[f"{name}_structure"]]
            shown = f" ({spelt(unit)})" if unit else ""
            axes = f"true {name}{' component' * (pair[0].ndim > 1)}{shown}", f"predicted{shown}"
            figures[name] = _parity(*pair, groups, looks, *axes)
    return figures


def _parity(
    true: np.ndarray, predicted: np.ndarray, groups: np.ndarray, looks: Mapping[str, Look], x: str, y: str
) -> go.Figure:
    figure = go.Figure()
    draw = np.random.default_rng(0)
    limit = 1.05 * float(np.abs(true).max())
    for group, look in looks.items():
        rows = np.flatnonzero(groups == group)
        own = true[rows].ravel(), predicted[rows].ravel()
        some = draw.permutation(len(own[0]))[:_MOST_POINTS]
        if not len(some):
            continue
        figure.add_scattergl(
            x=_rounded(own[0][some]),
            y=_rounded(own[1][some]),
            mode="markers",
            name=group,
            marker={"size": 3, "color": look.color, "symbol": look.marker},
        )
    shown = len(figure.data)
    figure.add_scatter(x=[-limit, limit], y=[-limit, limit], mode="lines", line={"color": _GREY}, showlegend=False)
    return _styled(figure, x, y, shown)


def force_reliability(predictions: Mapping[str, np.ndarray], looks: Mapping[str, Look]) -> go.Figure:
    """Observed against expected shares of force errors within intervals of the total uncertainty."""
    figure = go.Figure()
    errors = predictions["forces_pred"] - predictions["forces_true"]
    sigma = np.maximum(predictions["force_total"], 1e-12) / np.sqrt(3.0)
    for group, look in looks.items():
        rows = predictions["group"] == group
        if not rows.any():
            continue
        expected, observed = reliability(errors[rows].ravel(), np.repeat(sigma[rows], 3))
        line = {"color": look.color, "dash": look.dash}
        figure.add_scatter(x=_rounded(expected), y=_rounded(observed), mode="lines", name=group, line=line)
    shown = len(figure.data)
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line={"color": _GREY}, showlegend=False)
    return _styled(figure, "expected share within the interval", "observed share", shown)


# ----------------------------------------------------------------------------------------------------------- structure


def most_uncertain(folder: RoundDirectory) -> go.Figure | None:
    """The recorded frame with the largest spread of an exploration, its atoms coloured by it."""
    frames = read_structures(folder.pool) if folder.pool.exists() else []
    frames = [frame for frame in frames if "force_std" in frame.arrays]
    if not frames:
        return None
    frame = max(frames, key=lambda one: float(np.max(one.arrays["force_std"])))
    title = f"round {folder.index}, walker {frame.info.get('walker')}, step {frame.info.get('step')}"
    return structure_view(frame, title)


def structure_view(frame: Atoms, title: str) -> go.Figure:
    """A structure in three dimensions: atoms coloured by ``force_std``, bonds, and the cell where it is periodic.

    Atoms are moved into the cell; a bond that leaves it is drawn to its middle at both ends.
    """
    shown = frame.copy()
    shown.wrap()
    positions, numbers, spread = shown.positions, shown.numbers, shown.arrays["force_std"]
    figure = go.Figure()
    _lines(figure, _bonds(shown), "bonds", {"color": _GREY, "width": 8})
    _lines(figure, cell_edges(shown), "cell", {"color": "#555555", "width": 3})
    names = [
        f"{symbol}{n}: {1e3 * s:.0f} meV/Å" for n, (symbol, s) in enumerate(zip(shown.symbols, spread, strict=True))
    ]
    outline = ["#{:02x}{:02x}{:02x}".format(*(int(255 * c) for c in jmol_colors[z])) for z in numbers]
    figure.add_scatter3d(
        x=positions[:, 0].tolist(),
        y=positions[:, 1].tolist(),
        z=positions[:, 2].tolist(),
        mode="markers",
        name="atoms",
        hovertext=names,
        hoverinfo="text",
        showlegend=False,
        marker={
            "size": (38 * covalent_radii[numbers] ** 0.5).tolist(),
            "color": _rounded(1e3 * spread),
            "colorscale": "YlOrRd",
            "colorbar": {"title": "force_std (meV/Å)"},
            "line": {"color": outline, "width": 4},
        },
    )
    axis = {"visible": False}
    figure.update_layout(
        scene={"xaxis": axis, "yaxis": axis, "zaxis": axis, "aspectmode": "data"},
        margin={"l": 0, "r": 0, "t": 30, "b": 0},
        height=440,
        title={"text": html.escape(title), "font": {"size": 13}},
    )
    return figure


def _bonds(atoms: Atoms) -> list[tuple[np.ndarray, np.ndarray]]:
    i, j, shift, vector = neighbor_list("ijSD", atoms, natural_cutoffs(atoms, mult=_BOND))
    inside = ~shift.any(axis=1)
    reach = np.where(inside[:, None], vector, 0.5 * vector)
    once = ~inside | (i < j)
    starts = atoms.positions[i[once]]
    return list(zip(starts, starts + reach[once], strict=True))


def cell_edges(atoms: Atoms) -> list[tuple[np.ndarray, np.ndarray]]:
    """The edges of the cell as pairs of points: 12 of a crystal, 4 of a film, 1 of a chain, none of a molecule."""
    vectors = atoms.cell.array[atoms.pbc]
    edges = []
    for n, vector in enumerate(vectors):
        others = [v for m, v in enumerate(vectors) if m != n]
        for count in range(len(others) + 1):
            for some in combinations(others, count):
                corner = np.sum(some, axis=0) if some else np.zeros(3)
                edges.append((corner, corner + vector))
    return edges


def _lines(figure: go.Figure, pairs: Sequence[tuple[np.ndarray, np.ndarray]], name: str, line: dict[str, Any]) -> None:
    """Many separate lines as one trace, with gaps between them."""
    if not pairs:
        return
    x, y, z = ([value for begin, end in pairs for value in (float(begin[n]), float(end[n]), None)] for n in range(3))
    figure.add_scatter3d(x=x, y=y, z=z, mode="lines", name=name, line=line, showlegend=False, hoverinfo="skip")


# ---------------------------------------------------------------------------------------------------------------- look


def _styled(figure: go.Figure, x: str, y: str, entries: int, **changes: Any) -> go.Figure:
    """The look of the page; a legend of many entries stands at the side, where it can be scrolled."""
    aside = entries > _SHORT_LEGEND
    legend: dict[str, Any] = {"orientation": "h", "y": 1.12}
    if aside:
        legend = {"orientation": "v", "x": 1.02, "y": 1, "font": {"size": 11}}
    figure.update_layout(
        template="plotly_white",
        margin={"l": 65, "r": 15, "t": 30, "b": 50},
        height=max(380, min(_ROW * entries + 80, 620)) if aside else 380,
        font={"family": "system-ui, sans-serif", "size": 13},
        xaxis_title=x,
        yaxis_title=y,
        legend=legend,
        **changes,
    )
    return figure


def _rounded(values: np.ndarray | Sequence[float]) -> list[float]:
    """Rounded to four digits: more than a figure shows, and a page is not an archive."""
    return [float(f"{value:.4g}") for value in np.asarray(values, np.float64)]
