"""The free energy from the hills of a metadynamics run, on a grid, with the spread over its walkers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from almlip_jax.dynamics.biases import BiasSettings, Hills, free_energy
from almlip_jax.errors import InputError
from almlip_jax.files import read_npz, replacing, understood
from almlip_jax.simulation.folder import SimulationDirectory
from almlip_jax.simulation.settings import ProductionDynamics
from almlip_jax.yaml_text import read_yaml

_POINTS = (300, 100, 40)  # along each axis, for one, two and three variables
_MOST_POINTS = 3 * 10**7  # of a grid: a table of gigabytes
_DRAWN = 2  # variables of a figure, at most
_MARGIN = 2.0  # widths of a hill by which a grid reaches beyond the outermost ones


@dataclass(frozen=True)
class FreeEnergy:
    """A free energy surface of D variables.

    Attributes:
        names: of the variables.
        units: of the variables.
        axes: points along each variable, in its unit.
        mean: [n_1, .., n_D] eV, mean over the sets that have hills, least value 0.
        error: the same shape, eV: standard error of the mean over independent walkers; NaN where there is one set.
        hills: hills of all sets.
        missed: hills that found no room; where there are any, the free energy is that of the hills with room.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    axes: tuple[np.ndarray, ...]
    mean: np.ndarray
    error: np.ndarray
    hills: int
    missed: int


def hills_of(biases: Sequence[BiasSettings], states: Sequence[Any]) -> dict[int, Hills]:
    """The hills in the state of a run by the position of their bias.

    Args:
        biases: of the run.
        states: of these biases.
    """
    hills = {}
    for number, (settings, state) in enumerate(zip(biases, states, strict=True)):
        if settings.leaves_hills:
            hills[number] = settings.build().hills(state)
    return hills


def run_free_energy(
    run: Path,
    *,
    bias: int | None = None,
    points: int | None = None,
    ranges: Sequence[tuple[float, float]] = (),
    drawn: bool = False,
) -> FreeEnergy:
    """The free energy from the hills of a run of ``almlip md`` or ``almlip explore``, running or finished.

    Args:
        run: folder of the run.
        bias: position of the metadynamics among the biases; may be left out where there is one.
        points: along each variable; by default 300, 100 or 40 for one, two or three variables.
        ranges: first and last value of each variable; by default a period, or as far as hills reach.
        drawn: whether it is to be drawn (`draw`).

    Raises:
        InputError: the folder holds no such run, no hill was left yet, no free energy follows from the hills (a ramp
            or a factor on the bias, or walkers of different temperatures), ``bias`` or ``ranges`` do not fit, the grid
            has too many points, or there are too many variables to draw.
    """
    place = SimulationDirectory(run)
    number = _metadynamics(place, bias)
    path = place.hills(number)
    held = read_npz(path) if path.exists() else {}
    if held and held.keys() != Hills.__annotations__.keys():
        raise InputError(f"{path} does not hold the hills of a run; repeat the run in another folder.")
    hills = Hills(**held) if held else None
    if hills is None or not np.any(hills.count):
        raise InputError(f"{place.path} has left no hills yet; they are written with every state that a run keeps.")
    with understood(path):
        if drawn and len(hills.widths) > _DRAWN:
            raise InputError("a free energy of three variables cannot be drawn; leave --figure out, and use the table.")
        axes = _axes(hills, ranges, points)
        surfaces = free_energy(hills, axes)[hills.count > 0]  # of walkers that have left any
        mean = np.mean(surfaces, axis=0)
        spread = np.full(mean.shape, np.nan)
        if len(surfaces) > 1:
            spread = np.std(surfaces, axis=0, ddof=1) / np.sqrt(len(surfaces))
    return FreeEnergy(
        names=tuple(map(str, hills.names)),
        units=tuple(map(str, hills.units)),
        axes=axes,
        mean=mean - mean.min(),
        error=spread,
        hills=int(np.sum(hills.count)),
        missed=int(np.sum(hills.missed)),
    )


def write_table(path: Path, surface: FreeEnergy) -> None:
    """A CSV table: a column for each variable, ``free_energy_eV``, and ``error_eV`` (empty where there is none).

    Raises:
        InputError: the file cannot be written.
    """
    grids = np.meshgrid(*surface.axes, indexing="ij")
    titles = [f"{name}_{unit}" if unit else name for name, unit in zip(surface.names, surface.units, strict=True)]
    columns = {title: grid.ravel() for title, grid in zip(titles, grids, strict=True)}
    table = pd.DataFrame(columns | {"free_energy_eV": surface.mean.ravel(), "error_eV": surface.error.ravel()})
    with replacing(path) as building:
        table.to_csv(building, index=False)


def draw(path: Path, surface: FreeEnergy) -> None:
    """Draws a surface of one or two variables into a file.

    Raises:
        InputError: there are three variables, or the file cannot be written or has no known kind of figure.
    """
    from matplotlib import pyplot as plt

    from almlip_jax.figures.free_energy import free_energy_figure

    named = zip(surface.names, surface.units, strict=True)
    labels = [f"{name} ({unit})" if unit else name for name, unit in named]
    try:
        figure = free_energy_figure(labels, surface.axes, surface.mean, surface.error)
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be drawn: {error}") from error
    plt.close(figure)


def _metadynamics(place: SimulationDirectory, bias: int | None) -> int:
    """The position of the metadynamics that is meant."""
    try:
        settings = ProductionDynamics.model_validate(read_yaml(place.config).value["exploration"])
    except (InputError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{place.path} holds no run of almlip md or almlip explore that can be read.") from error
    biases = {n: one for n, one in enumerate(settings.biases) if one.leaves_hills}
    if not biases:
        raise InputError(f"{place.path} holds a run without the bias 'metadynamics', which a free energy needs.")
    known = " or ".join(map(str, biases))
    if bias is None and len(biases) > 1:
        raise InputError(f"{place.path} holds a run with several metadynamics; choose one with --bias {known}.")
    number = next(iter(biases)) if bias is None else bias
    if number not in biases:
        raise InputError(f"bias {number} of {place.path} is not a metadynamics; choose {known}.")
    if biases[number].ramp is not None:
        raise InputError(f"bias {number} of {place.path} had a ramp on its strength: its hills give no free energy.")
    biased = [group for group in settings.walkers if group.bias > 0]  # others leave no hills
    if any(group.bias != 1 for group in biased):
        raise InputError(f"walkers of {place.path} had a factor on their biases: its hills give no free energy.")
    temperatures = {group.temperatures for group in biased}
    if len(temperatures) > 1 or any(first != last for first, last in temperatures):
        raise InputError(f"walkers of {place.path} had several temperatures: their hills give no single free energy.")
    return number


def _axes(hills: Hills, ranges: Sequence[tuple[float, float]], points: int | None) -> tuple[np.ndarray, ...]:
    """The grid."""
    dimensions = len(hills.widths)
    if ranges and len(ranges) != dimensions:
        raise InputError(f"{len(ranges)} ranges are given for {dimensions} variables; give one for each, in order.")
    each = points or _POINTS[dimensions - 1]
    if each**dimensions > _MOST_POINTS:
        most = int(_MOST_POINTS ** (1 / dimensions))
        raise InputError(f"{each} points along each of {dimensions} variables are too many; take {most} at most.")
    centres = np.concatenate([own[:count] for own, count in zip(hills.centres, hills.count, strict=True)])
    axes = []
    for d in range(dimensions):
        low, high = centres[:, d].min(), centres[:, d].max()
        margin = _MARGIN * hills.widths[d]
        natural = (low - margin, high + margin)
        if hills.periods[d]:
            natural = (-hills.periods[d] / 2, hills.periods[d] / 2)
        first, last = ranges[d] if ranges else natural
        if not first < last:
            raise InputError(f"the range {first:g} to {last:g} of {hills.names[d]} is empty; give the lower end first.")
        axes.append(np.linspace(first, last, each))
    return tuple(axes)
