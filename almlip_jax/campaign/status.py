"""Status: where a campaign stands, whether it converges, and if not, which walkers, atoms and checks hold it back.

Reads the run directory only, also while a campaign is at work and after it was killed; needs no jax.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table

from almlip_jax.campaign.rundir import RoundDirectory, RunDirectory
from almlip_jax.campaign.state import CampaignState, RoundRecord, metric_units, read_state
from almlip_jax.campaign.walkers import bath, called, ended_by, of_walker
from almlip_jax.errors import InputError
from almlip_jax.files import read_npz, understood
from almlip_jax.oracles import LabelStore
from almlip_jax.structures.carried import system_of
from almlip_jax.structures.io import read_structures
from almlip_jax.targets import target_errors
from almlip_jax.units import GPA
from almlip_jax.yaml_text import read_yaml

_WINDOW = 4  # rounds over which a trend is judged
_FALLING, _RISING = -0.03, 0.03  # change of log(error) a round that counts as a trend


def campaign_status(run_dir: Path | str) -> dict[str, Any]:
    """What a run directory tells about its campaign.

    Returns:
        ``round``, ``stage``, ``labels`` (label-source calls but the test set's), ``calls`` (all of them, by purpose),
        ``systems`` (of each named system the ``calls`` by purpose, the number of ``structures`` that are trained on,
        the ``errors`` of its groups of the test set, and ``record`` and ``stop`` thresholds of its walkers in the last
        exploration, None before),
        ``under_way`` (with `campaign.overlap`: the ``round`` whose labels are being made while the campaign goes on,
        how many it ``asked`` for, and how many have ``arrived``; else None),
        ``costs`` (with a teacher: ``label_seconds``, ``teacher_calls``, ``teacher_seconds``),
        ``finished``, ``converged``, ``rule``, ``reason``, ``running``; ``errors`` of
        the last evaluated round; ``final``, None or ``potential``, ``steps`` and ``errors`` of the final potential;
        ``units`` of errors and sigmas; ``diagnosis`` with ``trend`` (of each error and of the pool's sigma: converging,
        stalled, diverging or unknown), ``walkers`` that ended early in the last exploration (with the ``member`` that
        gave no finite numbers, if one did, and the ``final_temperature`` of a ramp), ``departures`` (walkers in
        which an atom left the training distribution there: first ``step`` and ``atom``, and the largest latent
        ``distance`` of any atom), ``pressures`` (mean and standard deviation over the time of each walker of that
        exploration, GPa, where they were asked for), ``atoms`` that most often carry the largest spread, ``checks``
        that ended walkers, ``failed_labels`` by reason, and ``advice``, sentences for people.

    Raises:
        InputError: there is no campaign in the folder, or its state is damaged.
    """
    run = RunDirectory(run_dir).require()
    state = read_state(run)
    explored = _last_exploration(run)
    diagnosis = _of_exploration(explored)
    walkers, atoms = diagnosis["walkers"], diagnosis["atoms"]
    failures = _failed_labels(run)
    trend = _trends(state.history)
    evaluated = [record for record in state.history if record.errors]
    return {
        "run_dir": str(run.path),
        "running": run.is_running(),
        "round": state.round,
        "stage": str(state.stage),
        "labels": state.labels,
        "calls": calls_by_purpose(run),
        "systems": _systems(run, state, explored),
        "under_way": under_way(run, state),
        "costs": state.costs,
        "finished": state.finished,
        "converged": state.converged,
        "rule": state.rule,
        "reason": state.reason,
        "errors": dict(evaluated[-1].errors) if evaluated else {},
        "final": _final(run, state),
        "units": metric_units(run, [*_all_errors(state), "sigma_pool", "sigma_batch"]),
        "diagnosis": {
            "trend": trend,
            "share_below": _last(record.share_below for record in state.history),
            "walkers": walkers,
            "departures": diagnosis["departures"],
            "pressures": diagnosis["pressures"],
            "atoms": atoms,
            "checks": dict(Counter(walker["check"] for walker in walkers)),
            "failed_labels": failures,
            "advice": _advice(state, trend, walkers, _number_of_walkers(explored), atoms, failures),
        },
    }


def render_status(status: Mapping[str, Any]) -> RenderableType:
    """A status as tables for a terminal."""
    head = Table(show_header=False, box=None)
    where = "finished" if status["finished"] else ("at work" if status["running"] else "not running")
    if status["finished"] and status["running"]:
        where = "finished, at work on the final potential"
    head.add_row("round", f"{status['round']}, next stage: {status['stage']} ({where})")
    head.add_row("labels", str(status["labels"]))
    if status["calls"]:
        parts_of_it = ", ".join(f"{calls} {purpose}" for purpose, calls in status["calls"].items())
        head.add_row("label-source calls", f"{sum(status['calls'].values())} ({parts_of_it})")
    if waiting := status["under_way"]:
        head.add_row("under way", told_under_way(waiting))
    if status["costs"]:
        head.add_row("cost", told_costs(status["costs"]))
    head.add_row("converged", "yes" if status["converged"] else "no")
    if status["reason"]:
        head.add_row("reason", status["reason"])
    parts: list[RenderableType] = [Panel(head, title=status["run_dir"])]
    diagnosis = status["diagnosis"]
    if status["systems"]:
        table = Table("system", "structures trained on", "record threshold", "label-source calls", title="systems")
        for name, one in status["systems"].items():
            record = "-" if one["record"] is None else f"{one['record']:.4g}"
            table.add_row(name, str(one["structures"]), record, told_calls(one["calls"]))
        parts.append(table)
    if status["errors"]:
        parts.append(_error_table(status))
    if diagnosis["walkers"]:
        table = Table("walker", "T (K)", "ended at step", "because of", "atom", title="walkers that ended early")
        for walker in diagnosis["walkers"]:
            step, atom = str(walker["step"]), str(walker["atom"])
            table.add_row(called(walker), bath(walker), step, ended_by(walker), atom)
        parts.append(table)
    if diagnosis["departures"]:
        parts.append(_departure_table(diagnosis["departures"]))
    if diagnosis["pressures"]:
        table = Table("walker", "T (K)", "mean (GPa)", "std (GPa)", title="internal pressure")
        for one in diagnosis["pressures"]:
            table.add_row(called(one), bath(one), f"{one['mean']:.4g}", f"{one['std']:.4g}")
        parts.append(table)
    parts.extend(f"- {sentence}" for sentence in diagnosis["advice"])
    return Group(*parts)


def _departure_table(departures: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        "walker",
        "T (K)",
        "first atom",
        "at step",
        "farthest (99 % quantiles)",
        title="atoms beyond the training distribution",
    )
    for one in departures:
        row = [called(one), bath(one), str(one["atom"]), str(one["step"])]
        table.add_row(*row, f"{one['distance']:.4g}")
    return table


def _all_errors(state: CampaignState) -> list[str]:
    """Names of the errors of every round and of the final potential."""
    found = [record.errors for record in state.history] + ([] if state.final is None else [state.final.errors])
    return list(dict.fromkeys(name for errors in found for name in errors))


def _final(run: RunDirectory, state: CampaignState) -> dict[str, Any] | None:
    if state.final is None:
        return None
    return {"potential": str(run.final.potential), "steps": state.final.steps, "errors": dict(state.final.errors)}


def _error_table(status: Mapping[str, Any]) -> Table:
    """Errors of the last round with their trends, and those of the final potential where there is one."""
    final = status["final"]
    table = Table("quantity", "value", "unit", "trend", *([] if final is None else ["final potential"]))
    for name, value in status["errors"].items():
        row = [name, f"{value:.4g}", status["units"].get(name, ""), status["diagnosis"]["trend"].get(name, "-")]
        if final is not None:
            row.append(f"{final['errors'][name]:.4g}" if name in final["errors"] else "-")
        table.add_row(*row)
    return table


def _last(values: Any) -> Any:
    known = [value for value in values if value is not None]
    return known[-1] if known else None


def _trends(history: Sequence[RoundRecord]) -> dict[str, str]:
    """Verdict on each error and on the pool's sigma, from the slope of its logarithm over the last rounds."""
    series: dict[str, list[tuple[int, float]]] = {}
    for record in history:
        named = dict(record.errors)
        if record.sigma_pool is not None:
            named["sigma_pool"] = record.sigma_pool
        for name, value in named.items():
            if value > 0 and math.isfinite(value):
                series.setdefault(name, []).append((record.round, math.log(value)))
    return {name: trend(points[-_WINDOW:]) for name, points in series.items()}


def trend(points: Sequence[tuple[int, float]]) -> str:
    """Converging, stalled or diverging, by the least-squares slope of (round, log value); unknown below 3 points."""
    if len(points) < 3:
        return "unknown"
    rounds, values = np.transpose(np.asarray(points, np.float64))
    slope = float(np.polyfit(rounds, values, 1)[0])
    if slope < _FALLING:
        return "converging"
    return "diverging" if slope > _RISING else "stalled"


def _last_exploration(run: RunDirectory) -> tuple[RoundDirectory, dict[str, Any]] | None:
    """The newest round with traces of walkers; one that is damaged is passed over."""
    for folder in reversed(run.rounds()):
        if not folder.walkers.exists():
            continue
        try:
            return folder, read_npz(folder.walkers)
        except InputError:
            continue
    return None


def _of_exploration(explored: tuple[RoundDirectory, dict[str, Any]] | None) -> dict[str, list[dict[str, Any]]]:
    """What the newest exploration says."""
    if explored is None:
        return {"walkers": [], "departures": [], "pressures": [], "atoms": []}
    folder, _ = explored
    with understood(folder.walkers):
        found = {"walkers": _ended_walkers(explored), "departures": _departures(explored)}
        found["pressures"] = _pressures(explored)
    with understood(folder.pool):
        return {**found, "atoms": _uncertain_atoms(explored)}


def _number_of_walkers(explored: tuple[RoundDirectory, dict[str, Any]] | None) -> int:
    """Walkers of the newest exploration, whose round need not have been recorded yet."""
    return 0 if explored is None else len(explored[1]["status"])


def _ended_walkers(explored: tuple[RoundDirectory, dict[str, Any]]) -> list[dict[str, Any]]:
    _, arrays = explored
    causes = arrays.get("cause", np.full(len(arrays["status"]), "none"))
    ended = []
    for walker, status in enumerate(arrays["status"].tolist()):
        if status in ("completed", "running"):
            continue
        member = int(arrays["stop_member"][walker]) if "stop_member" in arrays else -1
        ended.append(
            {
                **of_walker(arrays, walker),
                "step": int(arrays["stop_step"][walker]),
                "atom": int(arrays["stop_atom"][walker]) if "stop_atom" in arrays else -1,
                "check": str(causes[walker]) if status == "unphysical" else status,
                **({"member": member} if member >= 0 else {}),
            }
        )
    return ended


def _departures(explored: tuple[RoundDirectory, dict[str, Any]]) -> list[dict[str, Any]]:
    """Walkers in which an atom left the training distribution; explorations of earlier versions do not say."""
    _, arrays = explored
    if not {"departed_step", "departed_atom", "departure"} <= set(arrays):
        return []
    return [
        {
            **of_walker(arrays, walker),
            "atom": int(arrays["departed_atom"][walker]),
            "step": int(step),
            "distance": float(arrays["departure"][walker]),
        }
        for walker, step in enumerate(arrays["departed_step"].tolist())
        if step >= 0
    ]


def _pressures(explored: tuple[RoundDirectory, dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean internal pressure of each walker that has one, and how much it varies in time, GPa."""
    _, arrays = explored
    pressures = []
    for walker, trace in enumerate(np.transpose(arrays.get("pressure", np.empty((0, 0))))):
        known = trace[np.isfinite(trace)].astype(np.float64) / GPA
        if known.size:
            pressures.append({**of_walker(arrays, walker), "mean": float(known.mean()), "std": float(known.std())})
    return pressures


def _uncertain_atoms(explored: tuple[RoundDirectory, dict[str, Any]]) -> list[dict[str, Any]]:
    """How often each atom carries the largest spread of a recorded frame, most often first."""
    folder, _ = explored
    if not folder.pool.exists():
        return []
    counts: Counter[tuple[int, str]] = Counter()
    frames = read_structures(folder.pool)
    for frame in frames:
        if "force_std" in frame.arrays:
            atom = int(np.argmax(frame.arrays["force_std"]))
            counts[atom, frame.get_chemical_symbols()[atom]] += 1
    return [
        {"atom": atom, "symbol": symbol, "share": count / len(frames)}
        for (atom, symbol), count in counts.most_common(5)
    ]


def _systems(
    run: RunDirectory, state: CampaignState, explored: tuple[RoundDirectory, dict[str, Any]] | None
) -> dict[str, dict[str, Any]]:
    """What is known of each named system; nothing where systems have no names."""
    names = _names(run)
    if not names:
        return {}
    datasets = [folder.dataset for folder in run.rounds() if folder.dataset.exists()]
    counts = Counter(system_of(frame) for frame in (read_structures(datasets[-1]) if datasets else []))
    calls = _read_store(run, LabelStore.calls_by_system)
    evaluated = [record.errors for record in state.history if record.errors]
    errors, known = evaluated[-1] if evaluated else {}, target_errors()
    return {
        name: {
            "calls": dict(sorted(calls.get(name, {}).items())),
            "structures": counts[name],
            "errors": {key: errors[key] for key in errors if key.startswith(tuple(f"{one}_{name} " for one in known))},
            **_thresholds(name, {} if explored is None else explored[1]),
        }
        for name in names
    }


def _thresholds(name: str, arrays: Mapping[str, Any]) -> dict[str, float | None]:
    """Record and stop threshold of the walkers of a system."""
    mine = np.asarray(arrays.get("walker_system", [])) == name
    if not mine.any():
        return {"record": None, "stop": None}
    return {level: float(arrays[f"gate_{level}"][mine][0]) for level in ("record", "stop")}


def _names(run: RunDirectory) -> tuple[str, ...]:
    """Names of the systems of a campaign, as its config has them; none where systems have no names."""
    try:
        given = read_yaml(run.config).value["system"]["structures"]
    except (InputError, KeyError, TypeError):
        return ()
    return tuple(map(str, given)) if isinstance(given, dict) else ()


def told_calls(calls: Mapping[str, int]) -> str:
    """Calls by purpose, in words."""
    return ", ".join(f"{number} {purpose}" for purpose, number in calls.items()) or "0"


def told_costs(costs: Mapping[str, float]) -> str:
    """What labels and a teacher have cost, in words."""
    return (
        f"{costs['label_seconds']:.4g} s of the label source, {costs['teacher_seconds']:.4g} s of the teacher "
        f"({costs['teacher_calls']} calls)"
    )


def calls_by_purpose(run: RunDirectory) -> dict[str, int]:
    """Label-source calls that have been paid, by what they were for; those of dynamics once they have ended."""
    return {purpose: int(entry["calls"]) for purpose, entry in sorted(_read_store(run, LabelStore.summary).items())}


def _read_store(run: RunDirectory, ask: Callable[[LabelStore], Mapping[str, Any]]) -> dict[str, Any]:
    """What the label store says; nothing where there is none, or it cannot be read."""
    if not run.labels.exists():
        return {}
    try:
        with LabelStore(run.labels, readonly=True) as store:
            return dict(ask(store))
    except InputError:
        return {}


def under_way(run: RunDirectory, state: CampaignState) -> dict[str, int] | None:
    """The labels that are being made while the campaign goes on: of which round, how many, and how many are there.

    Those in the spool count, which the campaign takes over between two stages.
    """
    if state.under_way is None:
        return None
    index, folder = state.under_way, run.round(state.under_way)
    try:
        files = [file for file in (folder.batch, folder.drawn) if file.exists()]
        asked = sum(len(read_structures(file)) for file in files)
        with LabelStore(run.labels, readonly=True) as store:
            rows = [row for row in store.select(round=index) if row.provenance["purpose"] in ("train", "calibration")]
            arrived = len(rows) + len(list(store.spool.glob("*.json")))
    except InputError:
        return None
    return {"round": index, "asked": asked, "arrived": min(arrived, asked)}


def told_under_way(waiting: Mapping[str, int]) -> str:
    """The same in words."""
    return f"labels of round {waiting['round']}: {waiting['arrived']} of {waiting['asked']} are there"


def _failed_labels(run: RunDirectory) -> dict[str, int]:
    if not run.labels.exists():
        return {}
    try:
        with LabelStore(run.labels, readonly=True) as store:
            return dict(Counter(row.label.error or "" for row in store.labelled(failed=True) if row.label.error))
    except InputError:
        return {}


def _advice(
    state: CampaignState,
    trends: Mapping[str, str],
    walkers: Sequence[Mapping[str, Any]],
    total: int,
    atoms: Sequence[Mapping[str, Any]],
    failures: Mapping[str, int],
) -> list[str]:
    said = []
    force_trends = {name: verdict for name, verdict in trends.items() if name.startswith("forces_rmse")}
    for name, verdict in force_trends.items():
        if verdict == "converging":
            said.append(f"{name} still falls from round to round: more labels help.")
        elif verdict == "stalled":
            said.append(
                f"{name} has stalled over the last rounds: train longer, take a larger model, or explore further."
            )
        elif verdict == "diverging":
            said.append(f"{name} rises: look at training.csv of the last round and at the labels of its batch.")
    by_check = Counter((ended_by(walker), bath(walker)) for walker in walkers)
    for (check, temperature), count in sorted(by_check.items()):
        steps = [walker["step"] for walker in walkers if (ended_by(walker), bath(walker)) == (check, temperature)]
        said.append(
            f"{count} of {total} walkers ended early at {temperature} K, after {int(np.median(steps))} steps in "
            f"the median, because of: {check.replace('_', ' ')}."
        )
    if atoms and atoms[0]["share"] > 0.4:
        first = atoms[0]
        said.append(
            f"Atom {first['atom']} ({first['symbol']}) carries the largest spread in {first['share']:.0%} of the "
            "recorded frames."
        )
    for reason, count in failures.items():
        said.append(f"{count} labels failed: {reason}")
    if not said and not state.history:
        said.append("No round has been trained yet.")
    return said
