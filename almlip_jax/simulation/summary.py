"""How a run ended, for people and for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from almlip_jax.dynamics import Exploration, ExplorationSettings, Status
from almlip_jax.dynamics.settings import WalkerGroup
from almlip_jax.evaluation.tables import aligned, number
from almlip_jax.files import read_json, understood
from almlip_jax.simulation.averages import Averages
from almlip_jax.unit_names import with_unit

_SHOWN = 4  # walkers whose averages go into the table


def summarise(
    command: str,
    exploration: Exploration,
    folder: Path,
    settings: ExplorationSettings,
    *,
    gated: bool,
    averages: Sequence[Averages] = (),
) -> dict[str, Any]:
    """The result of a run as plain data.

    Args:
        command: ``explore`` or ``md``.
        exploration: what the run found; its traces are not looked at.
        folder: of the run.
        settings: of its dynamics.
        gated: whether there were thresholds.
        averages: of each walker, where there are any.

    Returns:
        ``command``, ``out``, ``steps``, ``picoseconds`` of all walkers together, ``walkers`` (a list; ``walker``,
        ``temperature``, of a ramp ``final_temperature`` or ``pressure`` and ``final_pressure``, ``status``, ``cause``,
        ``end_step``, ``end_atom``, ``restarts``, and with a gate ``recorded``); with a gate also ``score``, ``record``,
        ``stop``, ``share_below``, ``recorded``, ``offered``; and where the latent distance is computed each walker's
        ``departed_step``, ``departed_atom`` and ``departure``.  Each walker has its ``averages``: mean, fluctuation and
        drift of its quantities over the whole run.
    """
    groups = [group for group in settings.walkers for _ in range(group.count)]
    recorded = Counter(int(frame.info["walker"]) for frame in exploration.recorded)
    walkers = []
    for w, status in enumerate(exploration.status):
        ended = int(exploration.end_step[w])
        walker: dict[str, Any] = {
            "walker": w,
            "temperature": float(exploration.walker_temperature[w]),
            **_ramps(groups[w]),
            "status": status.name.lower(),
            "cause": exploration.ended_because(w),
            "end_step": ended if ended >= 0 else None,
            "end_atom": int(exploration.end_atom[w]) if ended >= 0 else None,
            "restarts": int(exploration.restarts[w]),
        }
        if gated:
            walker["recorded"] = recorded[w]
        if "latent_distance" in settings.novelty:
            left = int(exploration.departed_step[w]) >= 0
            walker["departed_step"] = int(exploration.departed_step[w]) if left else None
            walker["departed_atom"] = int(exploration.departed_atom[w]) if left else None
            walker["departure"] = float(exploration.departure[w])
        if averages:
            walker["averages"] = averages[w]
        walkers.append(walker)
    summary: dict[str, Any] = {
        "command": command,
        "out": str(folder),
        "steps": exploration.steps,
        "picoseconds": exploration.picoseconds,
        "walkers": walkers,
    }
    if gated:
        summary |= {
            "score": settings.gate.score,
            "record": float(exploration.thresholds.record[0]),
            "stop": float(exploration.thresholds.stop[0]),
            "share_below": exploration.share_below,
            "recorded": len(exploration.recorded),
            "offered": exploration.offered,
        }
    return summary


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of a run that is over.

    Raises:
        InputError: the file does not hold one.
    """
    summary = read_json(path)
    with understood(path):
        failure(summary)
        render_summary(summary)
    return summary


def failure(summary: Mapping[str, Any]) -> str | None:
    """Why a run did not do its work, in a sentence; None where it did.

    It did where a walker reached its last step, relaxed, or was ended by the gate or a full buffer, as it was told to;
    not where every walker met an unphysical frame.

    Args:
        summary: as `summarise` makes it.
    """
    walkers = summary["walkers"]
    if any(walker["status"] != Status.UNPHYSICAL.name.lower() for walker in walkers):
        return None
    first = min(walkers, key=lambda walker: walker["end_step"])
    who = "the walker" if len(walkers) == 1 else f"each of the {len(walkers)} walkers"
    named = "" if len(walkers) == 1 else f", walker {first['walker']} first"
    return (
        f"{who} met an unphysical frame before its {summary['steps']} steps were done{named}, at step "
        f"{first['end_step']}: {first['cause']}; look at the potential, the start structures, the timestep or `sanity`."
    )


def render_summary(summary: Mapping[str, Any]) -> Group:
    """A summary as tables for a terminal: how walkers fared, and averages of the first of them."""
    tables = [_fates(summary)]
    if any(walker.get("averages") for walker in summary["walkers"]):
        tables.append(_averages(summary["walkers"]))
    return Group(*tables)


def _averages(walkers: Sequence[Mapping[str, Any]]) -> Table:
    more = f" (first {_SHOWN} of {len(walkers)} walkers; all in summary.json)" if len(walkers) > _SHOWN else ""
    columns = ("walker", "quantity", "mean", "fluctuation", "drift per ps", "unit")
    table = aligned(f"Averages over the whole run{more}", columns, ("quantity", "unit"))
    for walker in walkers[:_SHOWN]:
        for name, found in walker.get("averages", {}).items():
            mean = "-" if found["mean"] is None else f"{found['mean']:.8g}"
            row = (mean, number(found["fluctuation"]), number(found["drift"]), found["unit"])
            table.add_row(str(walker["walker"]), name, *row)
    return table


def _ramps(group: WalkerGroup) -> dict[str, Any]:
    """Where the bath of a walker goes, if it does not stay as it began."""
    ramps: dict[str, Any] = {}
    if group.temperatures[1] != group.temperatures[0]:
        ramps["final_temperature"] = group.temperatures[1]
    if group.pressures[1] != group.pressures[0]:
        ramps |= {"pressure": group.pressures[0], "final_pressure": group.pressures[1]}
    return ramps


def _bath(walker: Mapping[str, Any]) -> str:
    """Temperature of the bath, and the ramps there are."""
    text = f"{walker['temperature']:g}"
    if "final_temperature" in walker:
        text += f" to {walker['final_temperature']:g}"
    if "final_pressure" in walker:
        text += f"; {walker['pressure']:g} to {walker['final_pressure']:g} GPa"
    return text


def _fates(summary: Mapping[str, Any]) -> Table:
    gated = "score" in summary
    title = f"{summary['picoseconds']:.4g} ps in {summary['out']}"
    if gated:
        score = summary["score"]
        bounds = ", ".join(f"{name} {with_unit(number(summary[name]), score)}" for name in ("record", "stop"))
        title += f"; {summary['score']}: {bounds}; {100 * summary['share_below']:.3g} % below"
    departs = any("departure" in walker for walker in summary["walkers"])
    columns = ["walker", "T (K)", "status", "cause", "end step", "restarts"]
    columns += ["recorded"] * gated + ["first departure", "farthest (99 % quantiles)"] * departs
    table = aligned(title, columns, ("status", "cause", "first departure"))
    for walker in summary["walkers"]:
        row = [str(walker["walker"]), _bath(walker), walker["status"], walker["cause"] or "-"]
        row += [number(walker["end_step"]), str(walker["restarts"])]
        if gated:
            row.append(str(walker["recorded"]))
        if departs:
            left = walker["departed_step"] is not None
            row.append(f"atom {walker['departed_atom']}, step {walker['departed_step']}" if left else "-")
            row.append(number(walker["departure"]))
        table.add_row(*row)
    return table
