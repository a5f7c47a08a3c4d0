"""Where walkers start: at labelled structures, relaxed ones, those of a file, or where the last round left them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from ase import Atoms
from pydantic import Field

from almlip_jax.campaign.rundir import RoundDirectory, RunDirectory
from almlip_jax.dynamics import Explorer, Knowledge, RelaxationSettings, Status, begins_alike, relax, relaxation_summary
from almlip_jax.errors import InputError
from almlip_jax.keys import numpy_generator
from almlip_jax.kinds import Spec
from almlip_jax.models import Params
from almlip_jax.progress import Progress, reaching
from almlip_jax.structures.carried import carried, carrying, system_of
from almlip_jax.structures.electronic_state import electronic_state
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.units import KB

_SAME_PLACE = 1e-6  # Angstrom; largest distance of a fixed atom from its place in the start geometry


@dataclass(frozen=True)
class Beginnings:
    """What walkers may begin at in a round.

    Attributes:
        geometries: start geometries of the system.
        listed: structures of the file that `StartSettings.file` names.
        dataset: the labelled structures of the round.
        temperatures: of the baths of the walkers, K.
        seed: of the campaign.
        round_index: the round, from 0.
        systems: of the walkers, where systems have names.
        draw: 0 for where walkers begin, then 1, 2, ... for where they may begin again in the same round.
    """

    geometries: Sequence[Atoms]
    listed: Sequence[Atoms]
    dataset: Sequence[Atoms]
    temperatures: Sequence[float]
    seed: int
    round_index: int
    systems: Sequence[str | None] = ()
    draw: int = 0

    def among(self, frames: Sequence[Atoms], walker: int) -> tuple[list[Atoms], int, int]:
        """Structures of the system of a walker, which of its walkers it is, and how many it has."""
        if not self.systems:
            return [*frames], walker, len(self.temperatures)
        mine = self.systems[walker]
        number, walkers = self.systems[:walker].count(mine), self.systems.count(mine)
        return [frame for frame in frames if system_of(frame) == mine], number, walkers


class StartSettings(Spec):
    """Where walkers begin anew."""

    at_labelled: ClassVar[bool] = False
    """Whether that is at labelled structures whose atoms stand in the order of a start geometry."""

    @property
    def file(self) -> Path | None:
        """A file whose structures walkers begin at."""
        return None

    @property
    def relaxation(self) -> RelaxationSettings | None:
        """How starts are relaxed with the ensemble before walkers leave them; None where they are not."""
        return None

    @abstractmethod
    def begin(self, given: Beginnings) -> list[Atoms]:
        """A start for each walker, not relaxed.

        Raises:
            InputError: there is nothing to begin at.
        """


class LabelledStarts(StartSettings):
    """Walkers start at labelled structures of the composition of a start geometry, drawn at random in each round."""

    at_labelled: ClassVar[bool] = True

    kind: Literal["labelled"] = "labelled"
    energy: float = Field(default=2.0, gt=0, le=1000.0)
    """Labelled structures serve as starts up to this many times the thermal energy 3/2 N kB T above the lowest."""

    def begin(self, given: Beginnings) -> list[Atoms]:
        """Labelled structures."""
        return _labelled(given, self.energy)


class RelaxedStarts(RelaxationSettings, StartSettings):
    """Labelled structures, drawn in the same way, are first relaxed with the ensemble, all walkers at once.

    A relaxation that goes beyond the stop threshold or is unphysical ends, and the frame before is the start.
    """

    at_labelled: ClassVar[bool] = True

    kind: Literal["relaxed"] = "relaxed"
    energy: float = Field(default=2.0, gt=0, le=1000.0)
    """Labelled structures are relaxed up to this many times the thermal energy 3/2 N kB T above the lowest."""

    @property
    def relaxation(self) -> RelaxationSettings:
        """These settings."""
        return self

    def begin(self, given: Beginnings) -> list[Atoms]:
        """Labelled structures."""
        return _labelled(given, self.energy)


class FileStarts(StartSettings):
    """The structures of a file, dealt out to the walkers in turn; each round goes on where the one before ended.

    Where a walker begins again is what the next rounds would begin at.
    """

    kind: Literal["file"] = "file"
    path: Path
    """Labelled or unlabelled structures; labels are ignored."""

    @property
    def file(self) -> Path:
        """The one."""
        return self.path

    def begin(self, given: Beginnings) -> list[Atoms]:
        """The next ones of the file."""
        starts = []
        for walker in range(len(given.temperatures)):
            listed, number, walkers = given.among(given.listed, walker)
            starts.append(listed[((given.round_index + given.draw) * walkers + number) % len(listed)])
        return starts


def walker_starts(starts: StartSettings, given: Beginnings, final: Mapping[int, Atoms]) -> list[Atoms]:
    """A start structure for each walker, not relaxed.

    Args:
        starts: where walkers begin anew.
        given: what they may begin at.
        final: last frames of the walkers that go on, see `going_on`; one of another system begins anew.
    """
    begun = starts.begin(given)
    same = {n for n, frame in final.items() if n < len(begun) and system_of(frame) == system_of(begun[n])}
    return [final[walker] if walker in same else start for walker, start in enumerate(begun)]


def further_starts(starts: StartSettings, given: Beginnings, count: int, first: Sequence[Atoms]) -> list[list[Atoms]]:
    """Structures that each walker may begin again at, not relaxed; without those whose atoms are not the walker's.

    A walker that finds none of its own atoms begins again where it began.

    Args:
        starts: where walkers begin anew.
        given: what they may begin at.
        count: how many each gets.
        first: where each begins.
    """
    if not count:
        return []
    draws = [starts.begin(replace(given, draw=draw)) for draw in range(1, count + 1)]
    further = []
    for walker, own in enumerate(first):
        alike = [draw[walker] for draw in draws if begins_alike(own, draw[walker])] or [own]
        further.append([alike[number % len(alike)] for number in range(count)])
    return further


def relaxed_starts(
    relaxer: Explorer,
    params: Params,
    starts: Sequence[Atoms],
    stops: np.ndarray,
    knowledge: Knowledge,
    progress: Progress,
) -> list[Atoms]:
    """Start structures relaxed with the potential of a round; a walker that goes on from the round before does so.

    ``info["relaxation"]`` says what became of it: ``converged``, ``completed``, ``stopped`` or ``unphysical``.

    Args:
        relaxer: runs the relaxations.
        params: of the potential of the round.
        starts: of the walkers.
        stops: [W] stop threshold of the gate, and minus infinity, which nothing is below, where a walker goes on.
        knowledge: of the training set.
        progress: tells the user.
    """
    with progress.stage("relax", relaxer.settings.steps, unit="steps") as advance:
        reached = reaching(advance)

        def on_chunk(step: int, running: int) -> None:
            reached(step, running=running)

        found = relax(relaxer, params, starts, stops, knowledge, on_chunk)
    moves = ~np.isneginf(stops)
    ended_early = relaxation_summary([status for status, moved in zip(found.status, moves, strict=True) if moved])
    if ended_early:
        progress.message(ended_early)
    relaxed = []
    for start, structure, status, moved in zip(starts, found.structures, found.status, moves, strict=True):
        structure.info["relaxation"] = status.name.lower()
        relaxed.append(structure if moved else start)
    return relaxed


def going_on(run: RunDirectory, round_index: int) -> dict[int, Atoms]:
    """Last frames of the walkers that completed the round before one."""
    return {} if round_index == 0 else _completed(run.round(round_index - 1))


def write_starts(folder: RoundDirectory, starts: Sequence[Atoms], further: Sequence[Sequence[Atoms]] = ()) -> None:
    """Writes the start structures of a round, and those that walkers may begin again at into a file of their own.

    ``info["walker"]`` numbers them, and ``info["turn"]`` the further ones of a walker.
    """
    write_structures(folder.starts, [_numbered(start, walker=walker) for walker, start in enumerate(starts)])
    again = [
        _numbered(start, walker=walker, turn=turn)
        for walker, own in enumerate(further)
        for turn, start in enumerate(own, start=1)
    ]
    folder.further_starts.unlink(missing_ok=True)
    if again:
        write_structures(folder.further_starts, again)


def _numbered(start: Atoms, **numbers: int) -> Atoms:
    frame = carried(start)
    kept = ("relaxation",) if "relaxation" in start.info else ()
    frame.info = {**numbers, **frame.info, **{name: start.info[name] for name in kept}}
    return frame


def _labelled(given: Beginnings, most: float) -> list[Atoms]:
    """Labelled structures, one for each walker.

    Walkers are dealt out to the start geometries in turn.  Each gets a structure of the same composition with the same
    atoms fixed in the same places, drawn among those whose energy is no higher than a walker of its temperature may
    have, or the geometry where there is none; masses and constraints are those of the geometry.
    """
    if not given.geometries:
        raise InputError("system.structures names no start geometry, which exploration by molecular dynamics needs.")
    starts = []
    for walker, temperature in enumerate(given.temperatures):
        geometries, number, _ = given.among(given.geometries, walker)
        geometry = geometries[number % len(geometries)]
        eligible = _reasonable(given.dataset, geometry, temperature, most)
        again = () if given.draw == 0 else (given.draw,)
        generator = numpy_generator(given.seed, "start", given.round_index, walker, *again)
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
    return (tuple(atoms.numbers), tuple(atoms.pbc), *electronic_state(atoms), system_of(atoms))


def _completed(folder: RoundDirectory) -> dict[int, Atoms]:
    """Last frames of the walkers that ran to their end."""
    frames = read_structures(folder.last_frames) if folder.last_frames.exists() else []
    return {n: frame for n, frame in enumerate(frames) if frame.info["status"] == Status.COMPLETED.name.lower()}
