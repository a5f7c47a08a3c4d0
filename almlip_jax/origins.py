"""What trainings on growing data begin with again and again: a potential of their label source, or one that a teacher
taught, whose energies lie at another level.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from ase import Atoms

from almlip_jax.errors import InputError
from almlip_jax.fitting import references_of_the_rest, replayed, with_elements, with_kept_references
from almlip_jax.models import Params
from almlip_jax.models.anchored import binding_of, with_binding
from almlip_jax.models.charge_energy import charge_energy_of, with_charge_energy
from almlip_jax.potential import Potential
from almlip_jax.potential.evaluator import reference_energy
from almlip_jax.structures.electronic_state import total_charge
from almlip_jax.structures.replay import Replay, most_replayed
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.structures.validation import holding
from almlip_jax.targets import further_targets, label_names

NOTHING = Replay((), 0, None)
"""No structure is trained on again."""


@dataclass(frozen=True)
class Split:
    """The data of a training, as what it begins with sees them.

    Attributes:
        learned: structures that are trained on.
        judging: structures that validate.
        sees_state: whether the potential tells structures apart that differ in charge and spin alone.
    """

    learned: Sequence[Atoms]
    judging: Sequence[Atoms]
    sees_state: bool


class Origin(ABC):
    """A potential that trainings begin with."""

    potential: Potential

    def grown(
        self, species: SpeciesTable, isolated: Mapping[int, float], key: jax.Array, structures: Sequence[Atoms] = ()
    ) -> Potential:
        """The potential with all elements of a species table that holds its own.

        Arguments are those of `fitting.with_elements`.
        """
        known = self.potential.reference_energies
        common = float(np.mean(list(known.values())))
        energies = {z: isolated.get(z, known.get(z, common)) for z in species.numbers}
        return with_elements(self.potential, species, energies, frozenset(isolated), key, structures)

    @abstractmethod
    def isolated(self, energies: Mapping[int, float]) -> dict[int, float]:
        """Energies of isolated atoms, eV by atomic number, that trainings go by, of those of the data's source."""

    @abstractmethod
    def begin(self, grown: Potential, data: Sequence[Atoms]) -> Potential:
        """The potential whose parameters and reference energies a training on labelled structures begins with."""

    @property
    @abstractmethod
    def met(self) -> frozenset[int]:
        """Elements whose reference energies stay in trainings that go on from those which begin with it."""

    @property
    @abstractmethod
    def typical(self) -> Sequence[Atoms]:
        """Structures that trainings may see besides their data."""

    @abstractmethod
    def room(self, budget: int) -> int:
        """How many there may be of them, copies included, where the data are up to some number."""

    @property
    @abstractmethod
    def second(self) -> float | None:
        """Share of a pass over the data that is of them, where their labels are of a source other than the data's.

        They then have a last layer of their own.  None where all labels are of one source.
        """

    @abstractmethod
    def again(self, data: Split, params: Params, references: Mapping[int, float]) -> Replay:
        """What is trained on besides the data, in the energies of the training.

        Args:
            data: what the training has.
            params: first parameters.
            references: of the training, eV by atomic number.
        """

    def reminders(self, data: Split) -> Replay:
        """What of the data's own source is trained on besides, where `again` is of another; nothing by default."""
        return NOTHING

    @property
    def compositions(self) -> Sequence[Atoms]:
        """Structures of the compositions that its reference energies are known to hold for, in those of the data."""
        return self.potential.compositions if self.met else ()

    @abstractmethod
    def kept(self, data: Split) -> tuple[Atoms, ...]:
        """Structures besides the data that the new potential may remember."""


@dataclass(frozen=True)
class Known(Origin):
    """A potential of the label source of the data: its reference energies stay, and what it remembers is seen again.

    Attributes:
        potential: the one.
        replays: whether what it remembers is trained on again.
    """

    potential: Potential
    replays: bool = True

    def isolated(self, energies: Mapping[int, float]) -> dict[int, float]:
        """Its own, and those of elements that it does not know."""
        known = self.potential.reference_energies
        new = {z: energy for z, energy in energies.items() if z not in known}
        return new | {z: known[z] for z in self.potential.isolated}

    def begin(self, grown: Potential, data: Sequence[Atoms]) -> Potential:
        """Its parameters; energies of new elements are fitted to what its predictions leave of the data's."""
        return with_kept_references(grown, data, {*self.potential.reference_energies, *grown.isolated})

    @property
    def met(self) -> frozenset[int]:
        """Those that it knows."""
        return frozenset(self.potential.species.numbers)

    @property
    def typical(self) -> Sequence[Atoms]:
        """What it remembers."""
        return self.potential.remembered if self.replays else ()

    def room(self, budget: int) -> int:
        """See `most_replayed`."""
        return most_replayed(len(self.typical), budget)

    @property
    def second(self) -> None:
        """There is one source."""
        return None

    def again(self, data: Split, params: Params, references: Mapping[int, float]) -> Replay:
        """What it remembers, unless the data contradict it."""
        return replayed(self.potential, self.replays, data.learned, data.judging, data.sees_state)

    def kept(self, data: Split) -> tuple[Atoms, ...]:
        """The same, each once."""
        return replayed(self.potential, self.replays, data.learned, data.judging, data.sees_state).structures


@dataclass(frozen=True)
class Taught(Origin):
    """A potential that learned from a teacher, whose energies have references of their own.

    A training on labels of another source takes the network as it is: what this does not give of the energies goes into
    reference energies of the data's own, by a robust fit, so that no difference of composition or charge between the
    sources has to be learned.  Where those are energies of isolated atoms, it goes into what binds an atom on the
    average.

    Attributes:
        potential: that learned from the teacher.
        frames: labelled by the teacher, in the order in which they are taken.
        weight: of each of them in the loss, where a structure of the data has 1; 0 trains on none of them.
        share: of them among the structures of each pass over the data, which draws them at random.  They have a last
            layer of their own: they hold the features to what was learned from them, and leave the last layer of the
            potential to the data.
    """

    potential: Potential
    frames: tuple[Atoms, ...] = ()
    weight: float = 0.0
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InputError(
                f"a share of {self.share:g} of a teacher's frames leaves no room; give one between 0 and 1."
            )

    def isolated(self, energies: Mapping[int, float]) -> dict[int, float]:
        """Those of the data's source."""
        return dict(energies)

    def begin(self, grown: Potential, data: Sequence[Atoms]) -> Potential:
        """Its parameters, and reference energies fitted to what the network leaves of the data's energies."""
        network = replace(grown, reference_energies=dict.fromkeys(grown.species.numbers, 0.0))
        found = references_of_the_rest(network, data, {}, charges=grown.ensemble.sees_state)
        params = with_charge_energy(grown.params, np.array(found.costs), added=True)
        held = {z: grown.reference_energies[z] for z in grown.isolated}
        shift = np.array([found.energies[z] - held[z] if z in held else 0.0 for z in grown.species.numbers])
        params = with_binding(params, shift, added=True) if held else params
        return replace(grown, params=params, reference_energies=found.energies | held)

    @property
    def met(self) -> frozenset[int]:
        """None: its energies are those of another source."""
        return frozenset()

    @property
    def typical(self) -> Sequence[Atoms]:
        """The teacher's frames."""
        return self.replayed_frames

    @property
    def replayed_frames(self) -> tuple[Atoms, ...]:
        """Those of the teacher's frames that are trained on again: all, or none where they have no weight."""
        return self.frames if self.weight else ()

    def room(self, budget: int) -> int:
        """All of them."""
        return len(self.replayed_frames)

    @property
    def second(self) -> float | None:
        """The share, where any are trained on."""
        return self.share if self.replayed_frames else None

    def again(self, data: Split, params: Params, references: Mapping[int, float]) -> Replay:
        """The teacher's frames with energies, forces and stresses, energies moved to the references of the data."""
        frames = self.aligned(self.replayed_frames, params, references)
        other = {target.label for target in further_targets()}
        for frame in frames:
            frame.info["weight"] = self.weight
            for label in other & set(frame.calc.results):  # the last layer of energies is told apart, and no other
                del frame.calc.results[label]
        return Replay(tuple(frames), 1, None)

    def aligned(self, frames: Sequence[Atoms], params: Params, references: Mapping[int, float]) -> list[Atoms]:
        """Copies of structures with the teacher's labels, their energies at the level of another source.

        Args:
            frames: labelled by the teacher.
            params: of a potential of the other source that goes on from this one.
            references: its reference energies, eV by atomic number.
        """
        numbers, grown = self.potential.species.numbers, sorted(references)
        before, now = binding_of(self.potential.params, len(numbers)), binding_of(params, len(grown))
        moved = {z: references[z] + now[grown.index(z)] - before[n] for n, z in enumerate(numbers)}
        costs = charge_energy_of(params) - charge_energy_of(self.potential.params)
        found = []
        for frame in frames:
            other = frame.copy()
            energy = frame.calc.results["energy"] - self.potential.reference_energy(frame)
            results = {name: frame.calc.results[name] for name in label_names() if name in frame.calc.results}
            charge = total_charge(frame)
            energy += reference_energy(moved, frame) + costs @ [max(charge, 0), max(-charge, 0)]
            other.calc = holding(other, results | {"energy": float(energy)})
            found.append(other)
        return found

    def kept(self, data: Split) -> tuple[Atoms, ...]:
        """None: its labels are of another source."""
        return ()


@dataclass(frozen=True)
class TaughtOn(Taught):
    """A potential of the data's source that went on to learn from a teacher.

    Its network is what the teacher left, as of any `Taught`; what the potential before remembers, labels of the data's
    own source, is trained on with the data, as where trainings begin with that potential itself (`Known`).

    Attributes:
        before: the potential before, see `Known`; one of these has to be given.
    """

    before: Known | None = None

    @property
    def _before(self) -> Known:
        if self.before is None:
            raise InputError("TaughtOn goes on from a potential; give it as before=Known(potential).")
        return self.before

    def isolated(self, energies: Mapping[int, float]) -> dict[int, float]:
        """Those of the potential before, and of elements that it does not know."""
        return self._before.isolated(energies)

    def begin(self, grown: Potential, data: Sequence[Atoms]) -> Potential:
        """As `Taught.begin`, by the data and what is seen again with them."""
        again = self.reminders(Split(data, (), grown.ensemble.sees_state))
        return super().begin(grown, [*data, *again.structures])

    @property
    def met(self) -> frozenset[int]:
        """Elements of what is seen again."""
        return frozenset(int(z) for atoms in self._before.typical for z in atoms.numbers)

    @property
    def compositions(self) -> Sequence[Atoms]:
        """Those of the potential before."""
        return self._before.compositions

    @property
    def typical(self) -> Sequence[Atoms]:
        """The teacher's frames, and what the potential before remembers."""
        return [*self.replayed_frames, *self._before.typical]

    def room(self, budget: int) -> int:
        """That of both."""
        return super().room(budget) + self._before.room(budget)

    def again(self, data: Split, params: Params, references: Mapping[int, float]) -> Replay:
        """The teacher's frames; where none is trained on, what the potential before remembers."""
        if self.second is None:
            return self.reminders(data)
        return super().again(data, params, references)

    def reminders(self, data: Split) -> Replay:
        """What the potential before remembers, unless the data contradict it."""
        before = self._before
        return replayed(before.potential, before.replays, data.learned, data.judging, data.sees_state)

    def kept(self, data: Split) -> tuple[Atoms, ...]:
        """The same, each once."""
        return self._before.kept(data)
