"""The learner: trains an ensemble again and again on growing data, with one program and arrays of one size.

What is compiled is compiled for a label budget: the first `Learner.fit` compiles, later ones do not.  Campaigns train
through it, and so can your own scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ase import Atoms

from almlip_jax.compilation import check_precision
from almlip_jax.ensembles import AnyEnsemble, build_ensemble
from almlip_jax.errors import CapacityError, InputError
from almlip_jax.fitting import check_start, each_once, states_before, with_kept_references
from almlip_jax.given import given_number, given_settings, given_structures
from almlip_jax.keys import named_key, numpy_generator
from almlip_jax.models import ModelSettings, Params
from almlip_jax.origins import NOTHING, Known, Origin, Split
from almlip_jax.potential import Potential
from almlip_jax.potential.compositions import compositions_note
from almlip_jax.potential.file_types import noted_file_types
from almlip_jax.potential.states import states_note
from almlip_jax.structures.packing import BatchShape
from almlip_jax.structures.remembered import remember
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import (
    Again,
    AnyTrainer,
    Capacity,
    EnsembleSettings,
    EpochReport,
    TrainingResult,
    TrainingSettings,
    build_trainer,
    doubts,
    find_references,
    given_references,
    isolated_atom_energies,
    params_for,
    plan_capacity,
    refuse_idle_judgement,
    refuse_idle_members,
    refuse_idle_warmth,
    training_part,
    untold_charges,
    validation_note,
    validation_part,
    without_isolated_atoms,
)

OnEpoch = Callable[[EpochReport], None]


@dataclass(frozen=True)
class Earlier:
    """What a training goes on from.

    Attributes:
        potential: whose parameters it begins with.
        elements: atomic numbers in the structures that this, and what it went on from, was trained on.
    """

    potential: Potential
    elements: frozenset[int]


class Learner:
    """Trains an ensemble on datasets of up to ``budget`` structures.

    Args:
        budget: structures that a dataset can have at most.
        typical: structures like those to come, from which elements and sizes of arrays follow; the first dataset, where
            none are given.
        model: settings of the architecture, a dict of them, or the name of a kind.
        ensemble: of the members, likewise.
        training: of the training, likewise.  With ``warm_start`` each training goes on from the potential before.
        seed: all random numbers follow from it, and from how many trainings came before.
        isolated: energies of isolated atoms, eV by atomic number, which the potential then gives exactly; those among
            the structures, or in the settings of the training, where not given.
        species: elements that the potential is to know; those of the typical structures where not given.
        precision: ``float32``, or ``float64`` after ``prepare_jax("float64")``.
        capacity: sizes of arrays that an earlier learner came to, so that this one computes the same bits.
        start: a potential that trainings begin with, each of them unless it goes on from the one before; what a teacher
            taught as an `origins.Taught`.  Model and ensemble are its own where not given.  Its reference energies
            stay, elements are added, and what it remembers is trained on again as ``training.replay`` says.
        say: is told about doubtful labels, models that diverged, and arrays that grow.
        mean_atoms: of a structure of the largest dataset, where that is more than the mean of the typical ones.
        most_atoms: of the largest dataset together, whatever it comes to hold.

    Raises:
        InputError: the settings are not valid, nothing would look at a key of them, jax does not compute in that
            precision here, or the potential to start from is of another architecture.

    >>> from almlip_jax import Learner
    >>> learner = Learner(100, model={"size": "tiny"}, ensemble={"size": 4}, training={"max_steps": 500})
    """

    def __init__(
        self,
        budget: int,
        *,
        typical: Sequence[Atoms] | Atoms = (),
        model: ModelSettings | Mapping[str, Any] | str | None = None,
        ensemble: EnsembleSettings | Mapping[str, Any] | None = None,
        training: TrainingSettings | Mapping[str, Any] | None = None,
        seed: int = 0,
        isolated: Mapping[int, float] | None = None,
        species: SpeciesTable | None = None,
        precision: str = "float32",
        capacity: Capacity | None = None,
        start: Potential | Origin | None = None,
        say: Callable[[str], None] | None = None,
        mean_atoms: float = 0.0,
        most_atoms: int = 0,
    ) -> None:
        check_precision(precision)
        self.budget = given_number(budget, "budget", 1)
        self.typical = given_structures(typical, "typical")
        self.training = given_settings(TrainingSettings, {} if training is None else training, "training")
        self.start = Known(start, bool(self.training.replay)) if isinstance(start, Potential) else start
        if self.start is not None:
            begun = self.start.potential
            model = begun.settings if model is None else model
            ensemble = begun.member_settings if ensemble is None else ensemble
        self.model = given_settings(ModelSettings, {} if model is None else model, "model")
        self.settings = given_settings(EnsembleSettings, {} if ensemble is None else ensemble, "ensemble")
        if self.start is None:
            refuse_idle_members(self.settings)
            refuse_idle_warmth(self.training)
        else:
            check_start(self.start.potential, self.model, self.settings)
        refuse_idle_judgement(self.training)
        self.seed = seed
        self.dtype = np.dtype(precision)
        self.say = say
        self.trainings = 0
        self._isolated = isolated
        self._species = species
        self._known = capacity
        self._mean_atoms = mean_atoms
        self._most_atoms = most_atoms
        self._last: Earlier | None = None
        self._said: set[str] = set()

    # -- what stays ---------------------------------------------------------------------------------------------------

    @cached_property
    def species(self) -> SpeciesTable:
        """Every element that can occur."""
        own = self._species or SpeciesTable.of(without_isolated_atoms(self.typical))
        if self.start is None:
            return own
        return SpeciesTable(tuple(sorted({*own.numbers, *self.start.potential.species.numbers})))

    @cached_property
    def isolated(self) -> dict[int, float]:
        """Energies of isolated atoms, eV by atomic number, of the elements that occur."""
        energies = self._isolated
        if energies is None:
            energies = isolated_atom_energies(self.typical) | given_references(self.training)
        if self.start is not None:
            energies = self.start.isolated(energies)
        return {z: energies[z] for z in self.species.numbers if z in energies}

    @cached_property
    def ensemble(self) -> AnyEnsemble:
        """Models and members."""
        return build_ensemble(self.model, self.settings, self.species, self.isolated)

    @cached_property
    def trainer(self) -> AnyTrainer:
        """The trainer, sized for the budget."""
        known = self._known
        if known is None or known.structures <= self._most:
            planned = self._planned(without_isolated_atoms(self.typical))
            known = planned if known is None else _larger(planned, known)
        return self._built(known)

    @property
    def capacity(self) -> Capacity | None:
        """Sizes of arrays, as far as they are known."""
        built: AnyTrainer | None = self.__dict__.get("trainer")
        return self._known if built is None else built.capacity

    @property
    def _again(self) -> Sequence[Atoms]:
        """Structures that may be trained on besides the data."""
        return () if self.start is None else self.start.typical

    @property
    def _most(self) -> int:
        """Structures in a pass over the data at most."""
        return self.budget + (0 if self.start is None else self.start.room(self.budget))

    @cached_property
    def _grown(self) -> Potential | None:
        """What trainings begin with, knowing all elements."""
        if self.start is None:
            return None
        return self.start.grown(self.species, self.isolated, named_key(self.seed, "species"), self.typical)

    def _planned(self, structures: Sequence[Atoms]) -> Capacity:
        room = self._most - self.budget
        return plan_capacity(
            structures,
            self.ensemble.cutoff,
            self.training,
            self.budget,
            self._again,
            room,
            self._mean_atoms,
            self._most_atoms,
        )

    def _built(self, capacity: Capacity) -> AnyTrainer:
        training = self.training
        if self._again:  # what validates is then named
            training = training.model_copy(update={"validation_fraction": 0.0})
        share = None if self.start is None else self.start.second
        return build_trainer(
            self.model, self.settings, self.species, capacity, training, self.dtype, self.isolated, share
        )

    # -- training -----------------------------------------------------------------------------------------------------

    def fit(
        self, data: Sequence[Atoms] | Atoms, *, on_epoch: OnEpoch | None = None, checkpoint: Path | None = None
    ) -> Potential:
        """A potential trained on labelled structures.

        Args:
            data: labelled.  Isolated atoms among the first ones, where no others are typical, give the reference
                energies of their elements; none is trained on.  A structure that comes again with the same label
                counts once.
            on_epoch: called after each validation.
            checkpoint: folder that keeps the state of the training; the same training goes on there after an
                interruption.

        Returns:
            the potential, calibrated on the structures that validated, remembering a sample of the others.

        Raises:
            InputError: nothing is labelled, there are more structures than the budget, an element is not among those
                of the typical structures, the loss is not finite, or settings of model, ensemble and training do not go
                together.
        """
        if self.training.final_steps is not None:
            raise InputError("training.final_steps is for campaigns, whose last training is known; leave it out.")
        data = given_structures(data, "data")
        bonded = without_isolated_atoms(each_once(data, "the data", self._tell))
        if not bonded:
            raise InputError("there is nothing to train on besides isolated atoms; give labelled structures.")
        if len(bonded) > self.budget:
            raise InputError(f"{len(bonded)} structures are more than the budget of {self.budget}; give a larger one.")
        if not self.typical:
            self.typical = bonded
            if self._isolated is None:
                self._isolated = isolated_atom_energies(data) | given_references(self.training)
        params, references = self.beginning(bonded, self._last if self.training.warm_start else None)
        key = named_key(self.seed, "train", self.trainings)
        result = self.train(bonded, params, key, references, on_epoch, checkpoint)
        stream = numpy_generator(self.seed, "replay", "train", self.trainings)
        potential = self.potential(result, bonded, references, stream, {"dataset_size": len(bonded), "seed": self.seed})
        self._last = self.earlier(potential, bonded)
        self.trainings += 1
        return potential

    def beginning(self, data: Sequence[Atoms], earlier: Earlier | None) -> tuple[Params | None, dict[int, float]]:
        """First parameters and reference energies of a training: fresh parameters go with a fresh fit.

        Where it goes on from an earlier potential, the reference energies of all elements that this has met stay.

        Args:
            data: labelled structures to train on.
            earlier: what it goes on from; None where it begins anew, or with the potential that trainings begin with.
        """
        if earlier is None and self._grown is not None:
            assert self.start is not None
            begun = self.start.begin(self._grown, data)
            return self._first(begun), dict(begun.reference_energies)
        if earlier is None:
            return None, self.references(data)
        previous = earlier.potential
        begun = with_kept_references(previous, data, earlier.elements | previous.isolated)
        return self._first(begun), dict(begun.reference_energies)

    def _first(self, begun: Potential) -> Params:
        """First parameters of the members, where trainings begin with a potential."""
        return params_for(self.settings, begun.member_settings, begun.params)

    def earlier(self, potential: Potential, data: Sequence[Atoms]) -> Earlier:
        """What a training goes on from that was given some structures."""
        before = frozenset[int]() if self.start is None else self.start.met
        return Earlier(potential, before | frozenset(SpeciesTable.of(data).numbers))

    def references(self, data: Sequence[Atoms]) -> dict[int, float]:
        """Reference energies of a training that begins anew, eV by atomic number."""
        references = find_references(data, self.species, isolated=self.isolated, charges=self.ensemble.sees_state)
        for doubt in (doubts(data, references), None if self.ensemble.sees_state else untold_charges(data)):
            if doubt is not None and self.say is not None:
                self.say(doubt)
        return references.energies

    def train(
        self,
        data: Sequence[Atoms],
        params: Params | None,
        key: jax.Array,
        references: Mapping[int, float],
        on_epoch: OnEpoch | None = None,
        checkpoint: Path | None = None,
        steps: int | None = None,
    ) -> TrainingResult:
        """Trains the members; where structures came that are denser or larger than any before, arrays grow.

        Args:
            data: labelled structures without isolated atoms.
            params: first parameters; drawn anew where there are none.
            key: of the random numbers of this training; bootstrap weights follow from the learner's seed.
            references: reference energies, eV by atomic number.
            on_epoch: as for `fit`.
            checkpoint: as for `fit`.
            steps: length of the training, in place of what the settings say.

        Raises:
            InputError: nothing is labelled, or the loss is not finite.
        """
        parts = self._parts(data, params, references)
        for grown in (False, True):
            try:
                return self.trainer.train(
                    parts.dataset,
                    params,
                    key,
                    reference_energies=dict(references),
                    on_epoch=on_epoch,
                    steps=steps,
                    validation=parts.held_out,
                    say=self.say,
                    weights_key=named_key(self.seed, "bootstrap"),
                    checkpoint=checkpoint,
                    again=parts.again,
                )
            except CapacityError as error:
                if grown:
                    raise
                if self.say is not None:
                    self.say(f"capacities of the training grow, since {error}")
                self.trainer = self._built(_larger(self._planned(data), self.trainer.capacity))
        raise AssertionError("unreachable")

    def _parts(self, data: Sequence[Atoms], params: Params | None, references: Mapping[int, float]) -> _Parts:
        """What the trainer is given; with structures that are trained on again, what validates is named."""
        if self.start is None:
            return _Parts(data)
        own = self._split(data)
        learned, judging = own.learned, own.judging
        again = NOTHING if params is None else self.start.again(own, params, references)
        self._tell(again.remark)
        if self.start.second is not None:
            assert self._grown is not None
            before = params_for(self.settings, self._grown.member_settings, self._grown.params)
            old = self.start.reminders(own)
            self._tell(old.remark)
            return _Parts([*learned, *old.structures * old.copies], judging, Again(again.structures, before))
        return _Parts([*learned, *again.structures * again.copies], judging) if self._again else _Parts(data)

    def replayed(self, data: Sequence[Atoms]) -> tuple[Atoms, ...]:
        """Structures of the data's source that are trained on besides the data, each once."""
        return () if self.start is None else self.start.kept(self._split(data))

    def _split(self, data: Sequence[Atoms]) -> Split:
        share = self.training.validation_fraction
        return Split(training_part(data, share), validation_part(data, share), self.ensemble.sees_state)

    def _tell(self, remark: str | None) -> None:
        """Says something once."""
        if self.say is not None and remark is not None and remark not in self._said:
            self._said.add(remark)
            self.say(remark)

    def potential(
        self,
        result: TrainingResult,
        data: Sequence[Atoms],
        references: Mapping[int, float],
        stream: np.random.Generator,
        metadata: Mapping[str, Any],
    ) -> Potential:
        """The potential that a training gave, calibrated on the structures that validated.

        Args:
            result: of the training.
            data: what it was given.
            references: its reference energies.
            stream: draws the sample of structures that the potential remembers.
            metadata: goes with it, and with its error on the structures that validated.
        """
        own = self._split(data)
        old = self.replayed(data)
        notes = compositions_note(data, () if self.start is None else self.start.compositions)
        sees_state = self.ensemble.sees_state
        before = states_before(None if self.start is None else self.start.potential, sees_state=sees_state)
        notes |= states_note(data, before, sees_state=sees_state)
        if self.start is not None:
            types = noted_file_types(self.start.potential.metadata)
            notes = types.extended(noted_file_types(metadata).numbers).note() | notes
        potential = Potential(
            settings=self.model,
            members=result.members(self.settings),
            species=self.species,
            params=result.params,
            reference_energies=references,
            isolated=frozenset(self.isolated),
            metadata={**metadata, **validation_note(result), **notes},
            remembered=remember(own.learned, self.training.replay, stream, old),
        )
        return potential.calibrated(own.judging, shape=potential.batch_shape(data))


@dataclass(frozen=True)
class _Parts:
    """What a trainer is given: a dataset, and structures besides it that validate; none where a share of it does.

    ``again`` are those of another source.
    """

    dataset: Sequence[Atoms]
    held_out: Sequence[Atoms] = ()
    again: Again | None = None


def _larger(a: Capacity, b: Capacity) -> Capacity:
    """Holds whatever either of two capacities holds."""

    def largest(one: Any, other: Any, *names: str) -> dict[str, int]:
        return {name: max(getattr(one, name), getattr(other, name)) for name in names}

    batch = BatchShape(**largest(a.batch, b.batch, "atoms", "neighbors", "structures"))
    return replace(a, batch=batch, **largest(a, b, "atoms", "structures", "steps", "largest"))
