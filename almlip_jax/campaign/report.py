"""The report: one HTML page of a campaign, finished or not, that opens without a network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from ase.data import covalent_radii
from ase.data.colors import jmol_colors
from jinja2 import Environment, PackageLoader, select_autoescape
from plotly.offline import get_plotlyjs

from almlip_jax.campaign.rundir import RoundDirectory, RunDirectory
from almlip_jax.campaign.state import CampaignState, read_state
from almlip_jax.campaign.status import campaign_status
from almlip_jax.errors import InputError
from almlip_jax.files import read_json, read_npz, write_text
from almlip_jax.oracles import LabelStore
from almlip_jax.structures.io import read_structures
from almlip_jax.uncertainty import reliability

_COLORS = ("#3366aa", "#cc5544", "#338855", "#8855aa", "#cc8833", "#448899", "#777777", "#aa4477")
_MOST_POINTS = 4000  # of a scatter plot
_BOND = 1.25  # drawn where atoms are nearer than this multiple of the sum of their covalent radii


def write_report(run_dir: Path | str) -> Path:
    """Writes ``report.html`` from what the run directory holds so far.

    Returns:
        the page.

    Raises:
        InputError: there is no campaign in the folder, or it cannot be written to.
    """
    run = RunDirectory(run_dir).require()
    state = read_state(run)
    environment = Environment(loader=PackageLoader("almlip_jax.campaign", "."), autoescape=select_autoescape(["jinja"]))
    template = environment.get_template("report.html.jinja")
    explored = [folder for folder in run.rounds() if folder.walkers.exists()]
    page = template.render(
        title=run.path.name,
        status=campaign_status(run.path),
        headline=_headline(state),
        plotly=get_plotlyjs(),
        learning_curve=_json(_learning_curve(state)),
        walkers={str(folder.index): _json(_walkers(folder)) for folder in explored},
        **_test_figures(run, state),
        labels=_label_table(run),
        structure=_json(_most_uncertain(explored)),
        rounds=state.rows(),
        config=run.config.read_text() if run.config.exists() else "",
        versions=json.dumps(read_json(run.versions), indent=2) if run.versions.exists() else "",
    )
    write_text(run.report, page)
    return run.report


def _json(figure: go.Figure | None) -> str:
    """A figure as JSON that may stand inside a script element; ``null`` where there is nothing to show."""
    text = "null" if figure is None else figure.to_json()
    return text.replace("</", "<\\/")


def _styled(figure: go.Figure, x: str, y: str, **changes: Any) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        margin={"l": 65, "r": 15, "t": 30, "b": 50},
        height=380,
        font={"family": "system-ui, sans-serif", "size": 13},
        xaxis_title=x,
        yaxis_title=y,
        legend={"orientation": "h", "y": 1.12},
        **changes,
    )
    return figure


def _headline(state: CampaignState) -> list[tuple[str, str]]:
    rows = [("labels", str(state.labels)), ("rounds", str(state.round))]
    evaluated = [record for record in state.history if record.errors]
    rows += _force_errors(evaluated[-1].errors, "force RMSE") if evaluated else []
    seconds = sum(sum(record.seconds.values()) for record in state.history)
    if state.final is not None:
        rows += _force_errors(state.final.errors, "final force RMSE")
        seconds += sum(state.final.seconds.values())
    return [*rows, ("time", f"{seconds / 60:.1f} min")]


def _force_errors(errors: Mapping[str, float], title: str) -> list[tuple[str, str]]:
    prefix = "forces_rmse_"
    found = {name.removeprefix(prefix): value for name, value in errors.items() if name.startswith(prefix)}
    return [(f"{title} {group}", f"{1e3 * value:.1f} meV/Å") for group, value in found.items()]


def _learning_curve(state: CampaignState) -> go.Figure | None:
    series: dict[str, list[tuple[int, float]]] = {}
    for record in state.history:
        for name, value in record.errors.items():
            if name.startswith("forces_rmse_"):
                series.setdefault(name.removeprefix("forces_rmse_"), []).append((record.labels, 1e3 * value))
    if not series:
        return None
    figure = go.Figure()
    for color, (group, points) in zip(_COLORS, series.items(), strict=False):
        x, y = zip(*points, strict=True)
        figure.add_scatter(x=x, y=y, mode="lines+markers", name=group, line={"color": color})
    return _styled(figure, "labels", "force RMSE (meV/Å)", yaxis_type="log")


def _walkers(folder: RoundDirectory) -> go.Figure | None:
    try:
        arrays = read_npz(folder.walkers)
    except InputError:
        return None
    score = str(arrays["gate_score"]) if "gate_score" in arrays else "force_std_max"
    figure = go.Figure()
    traces, time = arrays[score], arrays["time_fs"]
    for walker, temperature in enumerate(arrays["walker_temperature"]):
        color = _COLORS[walker % len(_COLORS)]
        name = f"{walker}: {temperature:g} K, {arrays['status'][walker]}"
        kept = np.isfinite(traces[:, walker])
        figure.add_scatter(
            x=time[kept].tolist(),
            y=_rounded(traces[kept, walker]),
            mode="lines",
            name=name,
            line={"color": color, "width": 1},
        )
    _mark_recorded(figure, folder, arrays, score)
    for name in ("gate_record", "gate_stop"):
        level = float(arrays[name])
        figure.add_hline(
            y=level, line_dash="dash" if name == "gate_record" else "solid", line_color="#555555", line_width=1
        )
    return _styled(figure, "time (fs)", f"{score} (eV/Å)" if "force" in score else score, yaxis_type="log")


def _mark_recorded(figure: go.Figure, folder: RoundDirectory, arrays: Mapping[str, Any], score: str) -> None:
    """Recorded frames, and those that were selected, as marks on the traces."""
    for path, name, symbol in ((folder.pool, "recorded", "circle-open"), (folder.batch, "selected", "star")):
        if not path.exists():
            continue
        frames = [frame for frame in read_structures(path) if score in frame.info and "time_fs" in frame.info]
        figure.add_scatter(
            x=[frame.info["time_fs"] for frame in frames],
            y=_rounded(np.array([frame.info[score] for frame in frames])),
            text=[f"walker {frame.info.get('walker')}" for frame in frames],
            mode="markers",
            name=name,
            marker={"symbol": symbol, "color": "#222222", "size": 9 if symbol == "star" else 5},
        )


def _test_figures(run: RunDirectory, state: CampaignState) -> dict[str, str]:
    """Parity and reliability of the final potential, or of the last round that was evaluated."""
    files = [folder.test_predictions for folder in run.rounds()]
    files += [run.final.test_predictions] if state.final is not None and state.final.errors else []
    done = [file for file in files if file.exists()]
    if not done:
        return {"parity": "null", "reliability": "null"}
    found = read_npz(done[-1])
    return {"parity": _json(_parity(found)), "reliability": _json(_reliability(found))}


def _parity(found: Mapping[str, np.ndarray]) -> go.Figure:
    figure = go.Figure()
    draw = np.random.default_rng(0)
    limit = 1.05 * float(np.abs(found["forces_true"]).max())
    for color, group in zip(_COLORS, sorted(set(found["group"].tolist())), strict=False):
        rows = np.flatnonzero(found["group"] == group)
        true, predicted = found["forces_true"][rows].ravel(), found["forces_pred"][rows].ravel()
        some = draw.permutation(len(true))[:_MOST_POINTS]
        figure.add_scattergl(
            x=_rounded(true[some]),
            y=_rounded(predicted[some]),
            mode="markers",
            name=group,
            marker={"size": 3, "color": color},
        )
    figure.add_scatter(x=[-limit, limit], y=[-limit, limit], mode="lines", line={"color": "#999999"}, showlegend=False)
    return _styled(figure, "true force component (eV/Å)", "predicted (eV/Å)")


def _reliability(found: Mapping[str, np.ndarray]) -> go.Figure:
    figure = go.Figure()
    errors = found["forces_pred"] - found["forces_true"]
    sigma = np.maximum(found["force_total"], 1e-12) / np.sqrt(3.0)
    for color, group in zip(_COLORS, sorted(set(found["group"].tolist())), strict=False):
        rows = found["group"] == group
        expected, observed = reliability(errors[rows].ravel(), np.repeat(sigma[rows], 3))
        figure.add_scatter(x=_rounded(expected), y=_rounded(observed), mode="lines", name=group, line={"color": color})
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line={"color": "#999999"}, showlegend=False)
    return _styled(figure, "expected share within the interval", "observed share")


def _label_table(run: RunDirectory) -> list[dict[str, Any]]:
    if not run.labels.exists():
        return []
    try:
        with LabelStore(run.labels, readonly=True) as store:
            return [{"purpose": purpose, **counts} for purpose, counts in store.summary().items()]
    except InputError:
        return []


def _most_uncertain(explored: Sequence[RoundDirectory]) -> go.Figure | None:
    """The recorded frame with the largest spread of the newest exploration, its atoms coloured by it."""
    for folder in reversed(explored):
        frames = read_structures(folder.pool) if folder.pool.exists() else []
        if frames:
            return _molecule(max(frames, key=lambda frame: frame.info["force_std_max"]), folder.index)
    return None


def _molecule(frame: Any, round_index: int) -> go.Figure:
    positions, numbers, spread = frame.positions, frame.numbers, frame.arrays["force_std"]
    figure = go.Figure()
    for i in range(len(frame)):
        for j in range(i):
            if frame.get_distance(i, j) < _BOND * (covalent_radii[numbers[i]] + covalent_radii[numbers[j]]):
                x, y, z = np.stack([positions[i], positions[j]], axis=1)
                line = {"color": "#999999", "width": 8}
                figure.add_scatter3d(x=x, y=y, z=z, mode="lines", line=line, showlegend=False, hoverinfo="skip")
    names = [
        f"{symbol}{n}: {1e3 * s:.0f} meV/Å" for n, (symbol, s) in enumerate(zip(frame.symbols, spread, strict=True))
    ]
    outline = ["#{:02x}{:02x}{:02x}".format(*(int(255 * c) for c in jmol_colors[z])) for z in numbers]
    figure.add_scatter3d(
        x=positions[:, 0],
        y=positions[:, 1],
        z=positions[:, 2],
        mode="markers",
        hovertext=names,
        hoverinfo="text",
        showlegend=False,
        marker={
            "size": (38 * covalent_radii[numbers] ** 0.5).tolist(),
            "color": _rounded(1e3 * spread),
            "colorscale": "YlOrRd",
            "colorbar": {"title": "meV/Å"},
            "line": {"color": outline, "width": 4},
        },
    )
    axis = {"visible": False}
    title = f"round {round_index}, walker {frame.info.get('walker')}, step {frame.info.get('step')}"
    figure.update_layout(
        scene={"xaxis": axis, "yaxis": axis, "zaxis": axis, "aspectmode": "data"},
        margin={"l": 0, "r": 0, "t": 30, "b": 0},
        height=440,
        title={"text": html.escape(title), "font": {"size": 13}},
    )
    return figure


def _rounded(values: np.ndarray) -> list[float]:
    """Four digits are more than a figure shows, and a page is no archive."""
    return [float(f"{value:.4g}") for value in np.asarray(values, np.float64)]
