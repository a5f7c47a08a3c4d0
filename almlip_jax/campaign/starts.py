"""Where walkers start: at labelled structures, relaxed ones, those of a file, or where the last round left them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.campaign.rundir import RoundDirectory
from almlip_jax.campaign.settings import FileStarts, MdExploration
from almlip_jax.campaign.workshop import Workshop
from almlip_jax.dynamics import Knowledge, Status, relax, relaxation_summary
from almlip_jax.errors import InputError
from almlip_jax.keys import numpy_generator
from almlip_jax.potential import Potential
from almlip_jax.progress import reaching
from almlip_jax.structures.carried import carried, carrying
from almlip_jax.structures.electronic_state import electronic_state
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.units import KB

_SAME_PLACE = 1e-6  # Angstrom; fixed atoms that are no farther from where the start geometry has them


def walker_starts(shop: Workshop, settings: MdExploration, round_index: int, dataset: Sequence[Atoms]) -> list[Atoms]:
    """A start structure for each walker, not relaxed.

    With ``continue_walkers`` a walker that completed the round before goes on where it ended.  Others begin at a
    structure of the file that names starts, or at a labelled one.
    """
    walkers = len(settings.temperatures)
    final = going_on(shop, settings, round_index)
    if isinstance(settings.starts, FileStarts):
        listed = shop.start_list
        begun = [listed[(round_index * walkers + walker) % len(listed)] for walker in range(walkers)]
    else:
        begun = _labelled(shop, settings, settings.starts.energy, round_index, dataset)
    return [final.get(walker, start) for walker, start in enumerate(begun)]


def relaxed_starts(
    shop: Workshop,
    settings: MdExploration,
    round_index: int,
    starts: Sequence[Atoms],
    potential: Potential,
    stop: float,
    knowledge: Knowledge,
) -> list[Atoms]:
    """Start structures relaxed with the potential of a round; a walker that goes on from the round before does so.

    ``info["relaxation"]`` says what became of it: ``converged``, ``completed``, ``stopped`` or ``unphysical``.

    Args:
        shop: of the campaign.
        settings: of the exploration, with relaxed starts.
        round_index: the round.
        starts: of the walkers.
        potential: of the round.
        stop: stop threshold of the gate.
        knowledge: of the training set.
    """
    final = going_on(shop, settings, round_index)
    # nothing is below this threshold: who goes on does not move
    stops = np.array([-np.inf if walker in final else stop for walker in range(len(starts))])
    relaxer = shop.relaxer(potential)
    with shop.progress.stage("relax", relaxer.settings.steps, unit="steps") as advance:
        reached = reaching(advance)

        def on_chunk(step: int, running: int) -> None:
            reached(step, running=running)

        found = relax(relaxer, potential.params, starts, stops, knowledge, on_chunk)
    ended_early = relaxation_summary([s for walker, s in enumerate(found.status) if walker not in final])
    if ended_early:
        shop.progress.message(ended_early)
    relaxed = []
    for walker, (structure, status) in enumerate(zip(found.structures, found.status, strict=True)):
        structure.info["relaxation"] = status.name.lower()
        relaxed.append(final.get(walker, structure))
    return relaxed


def going_on(shop: Workshop, settings: MdExploration, round_index: int) -> dict[int, Atoms]:
    """Last frames of the walkers that go on in a round."""
    if not settings.continue_walkers or round_index == 0:
        return {}
    return _completed(shop.run.round(round_index - 1))


def write_starts(folder: RoundDirectory, starts: Sequence[Atoms]) -> None:
    """Writes the start structures of a round; ``info["walker"]`` numbers them."""
    frames = []
    for walker, start in enumerate(starts):
        frame = carried(start)
        kept = ("relaxation",) if "relaxation" in start.info else ()
        frame.info = {"walker": walker, **frame.info, **{name: start.info[name] for name in kept}}
        frames.append(frame)
    write_structures(folder.starts, frames)


def _labelled(
    shop: Workshop, settings: MdExploration, most: float, round_index: int, dataset: Sequence[Atoms]
) -> list[Atoms]:
    """Labelled structures, one for each walker.

    Walkers are dealt out to the start geometries in turn.  Each gets a structure of the same composition with the same
    atoms fixed in the same places, drawn among those whose energy is no higher than a walker of its temperature may
    have, or the geometry where there is none; masses and constraints are those of the geometry.
    """
    geometries = shop.geometries
    if not geometries:
        raise InputError("system.structures names no start geometry, which exploration by molecular dynamics needs.")
    starts = []
    for walker, temperature in enumerate(settings.temperatures):
        geometry = geometries[walker % len(geometries)]
        eligible = _reasonable(dataset, geometry, temperature, most)
        generator = numpy_generator(shop.config.seed, "start", round_index, walker)
        chosen = eligible[int(generator.integers(len(eligible)))] if eligible else geometry
        starts.append(carrying(chosen, geometry))
    return starts


def _reasonable(dataset: Sequence[Atoms], geometry: Atoms, temperature: float, most: float) -> list[Atoms]:
    """Labelled structures like a start geometry, up to ``most`` times 3/2 N kB T above the lowest of them."""
    held = [index for constraint in geometry.constraints for index in constraint.get_indices()]
    alike = [
        frame
        for frame in dataset
        if _kind(frame) == _kind(geometry)
        and np.allclose(frame.positions[held], geometry.positions[held], rtol=0, atol=_SAME_PLACE)
    ]
    if not alike:
        return []
    energies = np.array([frame.get_potential_energy() for frame in alike])
    highest = energies.min() + most * 1.5 * len(geometry) * KB * temperature
    return [frame for frame, energy in zip(alike, energies, strict=True) if energy <= highest]


def _kind(atoms: Atoms) -> tuple[Any, ...]:
    return (tuple(atoms.numbers), tuple(atoms.pbc), *electronic_state(atoms))


def _completed(folder: RoundDirectory) -> dict[int, Atoms]:
    """Last frames of the walkers that ran to their end."""
    frames = read_structures(folder.last_frames) if folder.last_frames.exists() else []
    return {n: frame for n, frame in enumerate(frames) if frame.info["status"] == Status.COMPLETED.name.lower()}
