"""The `Potential`: a trained ensemble with all it takes to use it again, and the faces it shows to other software."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from ase import Atoms

from almlip_jax.ensembles import AnyEnsemble, EnsembleSettings, build_ensemble
from almlip_jax.errors import InputError
from almlip_jax.features import FeatureRequest
from almlip_jax.given import given_settings, given_structures
from almlip_jax.models import ModelSettings, Params
from almlip_jax.potential import spanning, storage
from almlip_jax.potential.active_set import ActiveSetSettings, ActiveStructures
from almlip_jax.potential.calculator import PotentialCalculator
from almlip_jax.potential.compositions import noted_compositions
from almlip_jax.potential.energy_function import EnergyFunction, energy_function
from almlip_jax.potential.evaluator import Evaluated, Evaluator, joined, reference_energy
from almlip_jax.potential.file_types import noted_file_types
from almlip_jax.potential.fitted import TRAINING_ROWS, Calibration, Fitted, FittedKind, TrainingSet, params_digest
from almlip_jax.potential.novelty import FittedScore, fit_novelty, novelty_names
from almlip_jax.potential.spanning import Offer
from almlip_jax.potential.states import noted_states, strange_state
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.packing import BatchShape
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.structures.walkers import WalkerNeighbors
from almlip_jax.uncertainty import force_calibration

if TYPE_CHECKING:
    from almlip_jax.compilation import Precision
    from almlip_jax.dynamics import ExplorationSettings
    from almlip_jax.steps import PotentialExplorer

NO_FEATURES = FeatureRequest()
"""Asks for no feature map."""


@dataclass(frozen=True)
class Potential:
    """A trained ensemble.

    Attributes:
        settings: of the model.
        species: the elements it knows.
        params: parameters with leading member axis.
        reference_energies: eV by atomic number, added to what the ensemble predicts.
        fitted: name -> what was fitted to these parameters after the training: ``calibration`` (`calibrated`),
            ``active_set`` (`spanning`), novelty scores and ``training_set`` (`knowing`).  What was fitted to others is
            left out, with a warning.
        metadata: whatever the maker wants to keep (versions, dataset size, origin); JSON.
        members: settings of the ensemble; by default as many equal models as the parameters hold.
        isolated: elements whose reference energy is that of the isolated atom, which the potential then gives exactly.
        remembered: a sample of the labelled structures that it was trained on (`structures.remembered`); trainings
            that begin with the potential see them again.
    """

    settings: ModelSettings
    species: SpeciesTable
    params: Params
    reference_energies: Mapping[int, float]
    fitted: Mapping[str, Fitted] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    members: EnsembleSettings | None = None
    isolated: frozenset[int] = frozenset()
    remembered: tuple[Atoms, ...] = ()

    def __post_init__(self) -> None:
        own = params_digest(self.params) if self.fitted else ""
        stale = sorted(name for name, one in self.fitted.items() if one.params != own)
        if stale:
            message = f"left out, as fitted to other parameters than those of this potential: {', '.join(stale)}."
            warnings.warn(message, stacklevel=3)
            kept = {name: one for name, one in self.fitted.items() if name not in stale}
            object.__setattr__(self, "fitted", kept)

    def __repr__(self) -> str:
        symbols = "".join(self.species.symbols)
        parts = [self.settings.kind, symbols, f"cutoff {self.cutoff:g} A", f"{self.ensemble.members} members"]
        size = self.metadata.get("dataset_size")
        if size is not None:
            parts.append(f"trained on {size} structures")
        return f"Potential({', '.join(parts)})"

    @cached_property
    def ensemble(self) -> AnyEnsemble:
        """Models and members."""
        return build_ensemble(self.settings, self.member_settings, self.species, self.isolated)

    @cached_property
    def _evaluator(self) -> Evaluator:
        return Evaluator(self.ensemble, self.params, self.reference_energies, self.novelty, self.states_met)

    @property
    def states(self) -> frozenset[tuple[int, int]]:
        """Charges and multiplicities that it has learned of; none where it does not see them, or nothing is known."""
        return noted_states(self.metadata) if self.ensemble.sees_state else frozenset()

    @property
    def compositions(self) -> list[Atoms]:
        """Compositions and charges that it has learned of, as structures without places; none where nothing is known.

        They are independent of each other, and no more than are needed to tell of all.
        """
        return noted_compositions(self.metadata)

    @property
    def type_numbers(self) -> list[int]:
        """Atomic number of each type of files of MLIP-2 that go with it, from type 0 on.

        In the order of the file that it comes from, or that was given with the data it was trained on; elements that
        these do not name follow by atomic number.
        """
        return noted_file_types(self.metadata).order(self.species.numbers)

    def with_types(self, numbers: Sequence[int]) -> Potential:
        """The same potential, which remembers the order of types of files that it was trained on.

        An order that it remembers already stays, and goes on as a longer one does that begins with it.

        Args:
            numbers: atomic number of each type, from type 0 on; 0 for a type that no atom has.
        """
        known = noted_file_types(self.metadata).extended(numbers)
        return replace(self, metadata={**self.metadata, **known.note()})

    @property
    def states_met(self) -> frozenset[tuple[int, int]]:
        """Charges and multiplicities that it was trained on, told apart or not; none where nothing is known."""
        return noted_states(self.metadata)

    def strange_state(self, atoms: Atoms) -> str | None:
        """A sentence that nothing was learned of the charge and spin of a structure; None where it was."""
        return strange_state(atoms, self.states_met, sees_state=self.ensemble.sees_state)

    @property
    def precision(self) -> str:
        """``float32`` or ``float64``."""
        return str(np.dtype(jax.tree.leaves(self.params)[0].dtype))

    @property
    def member_settings(self) -> EnsembleSettings:
        """Settings of the ensemble; where none are known, as many equal models as the parameters hold."""
        return self.members or EnsembleSettings(size=jax.tree.leaves(self.params)[0].shape[0])

    @property
    def cutoff(self) -> float:
        """Angstrom."""
        return self.ensemble.cutoff

    def reference_energy(self, atoms: Atoms) -> float:
        """Sum of the reference energies of a structure's atoms, eV."""
        return reference_energy(self.reference_energies, atoms)

    def with_fitted(self, **values: FittedKind) -> Potential:
        """The same potential, which keeps some values, by name, as fitted to its parameters."""
        own = params_digest(self.params)
        return replace(self, fitted={**self.fitted, **{name: Fitted(one, own) for name, one in values.items()}})

    @property
    def calibration(self) -> Mapping[str, Any]:
        """Of the force uncertainty, by name (`calibrated`); empty where it is not known."""
        return self.fitted["calibration"].value.numbers() if "calibration" in self.fitted else {}

    @property
    def novelty(self) -> dict[str, FittedScore]:
        """Fitted scores by name; grades are among them where predictions give them, over the linear parameters."""
        found: dict[str, FittedScore] = {
            name: one.value for name, one in self.fitted.items() if isinstance(one.value, FittedScore)
        }
        active = self.active_set
        if active is not None and active.settings.parameters == "linear":
            found[active.settings.score] = active.grades_on_device(self.precision)
        return found

    @property
    def active_set(self) -> ActiveStructures | None:
        """The active set that grades are measured over; None where there is none (`spanning`)."""
        value = self.fitted["active_set"].value if "active_set" in self.fitted else None
        return value if isinstance(value, ActiveStructures) else None

    def spanning(
        self,
        training_set: Sequence[Atoms] | Atoms,
        settings: ActiveSetSettings | Mapping[str, Any] | None = None,
        *,
        earlier: ActiveStructures | None = None,
    ) -> Potential:
        """The same potential, with the active set of structures.

        Args:
            training_set: what it was trained on; labels are not looked at.
            settings: of the set; those of the earlier one, or defaults.
            earlier: set of the potential that this one was trained after: it is renewed with the present parameters,
                and the structures are offered to it (`spanning.renewed`).

        Raises:
            InputError: there is no structure, an element is not known, or there are more parameters than an active set
                is made for.
        """
        training_set = given_structures(training_set, "training_set")
        if not training_set:
            raise InputError("there is no structure in the training set.")
        asked = None if settings is None else given_settings(ActiveSetSettings, settings, "settings")
        if earlier is not None and asked in (None, earlier.settings):
            return self.with_fitted(active_set=spanning.renewed(self, earlier, training_set))
        return self.with_fitted(active_set=spanning.built_from(self, training_set, asked or ActiveSetSettings()))

    def offer(self, structures: Sequence[Atoms] | Atoms) -> Offer:
        """Offers structures to the active set; ``with_fitted(active_set=offer.active)`` keeps what comes of it.

        Raises:
            InputError: there is no active set, or an element is not known.
        """
        structures = given_structures(structures, "structures")
        if self.active_set is None:
            raise InputError("the potential has no active set; make one of its training set (`spanning`).")
        return spanning.offered(self, self.active_set, structures)

    @property
    def training_set(self) -> TrainingSet | None:
        """What comparisons with the training set need of it; None where the potential does not know it (`knowing`)."""
        value = self.fitted["training_set"].value if "training_set" in self.fitted else None
        return value if isinstance(value, TrainingSet) else None

    def knowing(self, training_set: Sequence[Atoms] | Atoms, *, shape: BatchShape | None = None) -> Potential:
        """The same potential, with all that comparisons with its training set need; an active set that it has stays.

        Its evaluations then hold novelty scores, and simulations need no training set for novelty scores,
        relative thresholds and admissions by features.

        Args:
            training_set: structures that it was trained on; labels are not looked at.
            shape: least room of a batch, as for `evaluate`.

        Raises:
            InputError: there is no structure, or one holds an element that the potential does not know.
        """
        training_set = given_structures(training_set, "training_set")
        if not training_set:
            raise InputError("there is no structure in the training set.")
        novelty = fit_novelty(novelty_names(), *self.atom_features(training_set), len(self.species))
        spanned = self if self.active_set is not None else self.spanning(training_set)
        knowing, rows = spanned.with_fitted(**novelty), FeatureRequest((TRAINING_ROWS,))
        evaluated = knowing.evaluate(training_set, features=rows, shape=shape)
        return knowing.with_fitted(training_set=TrainingSet(evaluated.scores, evaluated.features[TRAINING_ROWS]))

    def calibrated(self, held_out: Sequence[Atoms] | Atoms, *, shape: BatchShape | None = None) -> Potential:
        """The same potential, with a calibration of its force uncertainty.

        Args:
            held_out: structures with forces that it was not trained on; the calibration holds for structures
                like these.  Atoms alone in open space, which have no forces, are passed over.
            shape: least room of a batch, as for `evaluate`.

        Returns:
            with ``calibration`` the numbers of `uncertainty.force_calibration` of ``force_total``, and the number of
            ``structures``; without one where fewer than two structures are given, or nothing varies over them.
        """
        held_out = given_structures(held_out, "held_out")
        bound = [atoms for atoms in held_out if len(atoms) > 1 or atoms.pbc.any()]
        frames = [atoms for atoms in bound if atoms.calc is not None and "forces" in atoms.calc.results]
        if len(frames) < 2:
            return self._without_calibration()
        evaluated = self.evaluate(frames, shape=shape)
        errors = np.concatenate(
            [f - a.get_forces(apply_constraint=False) for f, a in zip(evaluated.forces, frames, strict=True)]
        )
        numbers = force_calibration(errors, np.concatenate(evaluated.atom_scores["force_total"]))
        known = {name: float(value) for name, value in numbers.items() if np.isfinite(value)}
        if "slope" not in known:
            return self._without_calibration()
        return self.with_fitted(calibration=Calibration(known | {"structures": len(frames)}))

    def _without_calibration(self) -> Potential:
        return replace(self, fitted={name: one for name, one in self.fitted.items() if name != "calibration"})

    def evaluate(
        self,
        structures: Sequence[Atoms] | Atoms,
        *,
        features: FeatureRequest = NO_FEATURES,
        on_batch: Callable[[int], None] | None = None,
        shape: BatchShape | None = None,
    ) -> Evaluated:
        """Committee mean and spread of structures of any size, in batches of one static shape.

        Args:
            structures: in any number; labels are not looked at.
            features: maps of the structures to be given too.
            on_batch: called with the number of structures of each finished batch.
            shape: least room of a batch, that of `batch_shape` for several sets that are to share a program.

        Raises:
            InputError: a structure holds an element that the potential does not know.
        """
        structures = given_structures(structures, "structures")
        if not structures:
            raise InputError("there is no structure to evaluate.")
        self.check_elements(structures)
        parts = []
        for batch, evaluated in self.evaluate_stream(structures, features=features, shape=shape):
            parts.append(evaluated)
            if on_batch is not None:
                on_batch(len(batch))
        return joined(parts)

    def evaluate_stream(
        self,
        frames: Iterable[Atoms],
        *,
        features: FeatureRequest = NO_FEATURES,
        source: str = "structures",
        shape: BatchShape | None = None,
    ) -> Iterator[tuple[list[Atoms], Evaluated]]:
        """What `evaluate` gives, batch after batch and in order, without keeping any of it: for pools of any length.

        Frames are taken up to 1024 at a time.  Batches have the shape that those seen so far need, so that nothing
        compiles again before a frame is larger, or has more neighbours, than there was room for.

        Args:
            frames: in any number; labels are not looked at.
            features: as for `evaluate`.
            source: what to call the frames in messages.
            shape: as for `evaluate`.

        Yields:
            the frames of a batch, and what the potential predicts for them; the same numbers as `evaluate` gives.

        Raises:
            InputError: a frame holds an element that the potential does not know.
        """
        found = self._evaluator.stream(frames, features, source, shape)
        active = self.active_set
        if active is None or active.settings.parameters == "linear":
            return found
        return ((batch, self._graded(active, batch, evaluated)) for batch, evaluated in found)

    def _graded(self, active: ActiveStructures, batch: Sequence[Atoms], evaluated: Evaluated) -> Evaluated:
        """An evaluation with grades over all parameters, which take derivatives of their own."""
        of_structures, of_atoms = spanning.grades_of(self, active, batch)
        name = active.settings.score
        atoms = {name: of_atoms} if of_atoms else {}
        scores = {**evaluated.scores, name: of_structures}
        return replace(evaluated, scores=scores, atom_scores={**evaluated.atom_scores, **atoms})

    def scored(self, structures: Sequence[Atoms], novelty: Mapping[str, FittedScore]) -> Evaluated:
        """What `evaluate` gives, with fitted scores that need not be those of the potential."""
        evaluator = replace(self._evaluator, novelty=novelty)
        return joined([one for _, one in evaluator.stream(structures, NO_FEATURES, "structures", None)])

    def check_elements(self, frames: Iterable[Atoms], source: str = "structures") -> None:
        """Whether all elements of some frames are known.

        Raises:
            InputError: one is not; source, frame and atom are named.
        """
        for _ in self._evaluator.of_known_elements(frames, source):
            pass

    def batch_shape(self, structures: Sequence[Atoms], before: BatchShape | None = None) -> BatchShape:
        """The room that batches of some structures need: given to `evaluate`, it serves for any part of them.

        Args:
            structures: at least one.
            before: shape of earlier batches; no room is given up, and what is not enough grows by buckets.
        """
        return self._evaluator.batch_shape(structures, before)

    def atom_features(self, structures: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
        """Invariant features of every atom, and its species index: what novelty is measured in.

        Args:
            structures: in any number.

        Returns:
            features [L, A, F] of the L models, and species [A] int; atoms of all structures in their order.

        Raises:
            InputError: a structure holds an element that the potential does not know.
        """
        features, _, species = self._evaluator.atom_rows(structures)
        return features, species

    def atom_rows(self, structures: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """What the last, linear layer sees of every atom, see `models.base.linear_rows`.

        Returns:
            features [L, A, F], codes [L, A, Q] of the species (None where they are told apart one by one) and species
            [A] int; errors as for `atom_features`.
        """
        return self._evaluator.atom_rows(structures)

    def graphs(self, structures: Sequence[Atoms]) -> Iterator[Graph]:
        """A graph of each structure alone, padded; errors as for `atom_features`."""
        return self._evaluator.graphs(structures)

    @property
    def says_errors(self) -> bool:
        """Whether members say something about their own errors, so that total deviations are not the spread."""
        return not self.member_settings.likelihood.silent

    def force_error(self, force_total: np.ndarray) -> np.ndarray | None:
        """Length of the error vector to be expected of each atom, eV/Angstrom; None where nothing was calibrated.

        Args:
            force_total: [N] eV/Angstrom.
        """
        slope = self.calibration.get("slope")
        return None if slope is None else float(slope) * np.asarray(force_total, np.float64)

    def explorer(self, settings: ExplorationSettings | Mapping[str, Any]) -> PotentialExplorer:
        """Exploration with this potential.

        Args:
            settings: of the exploration, or a dict of them, as in the section ``exploration`` of a config.

        >>> potential.explorer({"walkers": [{"temperature": 300, "count": 4}], "steps": 2000})  # doctest: +SKIP
        """
        from almlip_jax.steps import explorer_of  # it stands on potentials, and opens here for the user's sake

        return explorer_of(self, settings)

    def calculator(self, *, skin: float = 0.5, precision: Precision | None = None) -> PotentialCalculator:
        """An ASE calculator: energy, forces, stress, and the committee's spread as further results.

        Args:
            skin: Angstrom, by which lists of neighbours reach beyond the cutoff; it changes no result.
            precision: ``float32`` or ``float64``, whatever the process computes in otherwise; that of the potential
                where not given.

        Raises:
            InputError: the skin is negative or no number.
        """
        return PotentialCalculator(self, skin=skin, precision=precision)

    def energy_fn(
        self,
        atoms: Atoms,
        *,
        skin: float = 0.5,
        reference_energies: bool = False,
        members: bool = False,
        fractional_coordinates: bool = False,
        precision: Precision | None = None,
    ) -> tuple[WalkerNeighbors, EnergyFunction]:
        """Energy as a JAX function of positions, for jax-md.

        Args:
            atoms: fixes species, charge, spin, cell, periodic directions and the first neighbour list.
            skin: Angstrom, by which the list reaches beyond the cutoff.
            reference_energies: whether they are added, as the calculator does.  They are a constant, beside which the
                digits of float32 may not suffice for what changes.
            members: whether the energy is that of each member, [M], and not their mean.
            fractional_coordinates: whether positions are parts of the cell vectors, as in jax-md's
                ``space.periodic_general``; derivatives by them are those by positions in space there, and here.
            precision: ``float32`` or ``float64``, that of the potential where not given.

        Returns:
            neighbours for the given positions, to be kept up to date through
            ``neighbors.update(positions[None])`` (in space, whatever the energy takes), and
            ``energy(positions [N, 3], neighbors, *, box=None, perturbation=None, kT=None) -> eV`` (committee mean,
            differentiable; ``jax.grad`` of it is minus the forces).  It is not a number where the list lost edges
            (``neighbors.overflow``), or an atom went farther than the skin since it was built.  ``box`` takes the place
            of the cell: jax-md's matrix of columns, three lengths or one; ``perturbation`` strains positions and box;
            ``kT``, which thermostats hand on, changes nothing.

        Raises:
            InputError: an element is not known, the skin is negative, there is no such precision, or jax is not told to
                compute in it.

        Warns:
            UserWarning: the potential has learned nothing of the charge and spin of the structure.
        """
        return energy_function(
            self,
            atoms,
            skin=skin,
            reference_energies=reference_energies,
            members=members,
            fractional_coordinates=fractional_coordinates,
            precision=precision,
        )

    def save(self, directory: Path | str) -> None:
        """Writes the potential as a folder: ``potential.json`` to read, and next to it parameters, what was fitted to
        them, and remembered structures.

        At any moment the folder holds the old potential or the new one, whole.  Other files in it are left alone.

        Raises:
            InputError: the folder exists and holds something other than a potential, or cannot be written.
        """
        storage.save(self, directory)

    @classmethod
    def load(cls, directory: Path | str, types: Sequence[str] | None = None) -> Potential:
        """Reads what `save` wrote, or a file of MLIP-2 (``.mtp``); no training config is needed.

        Files of remembered structures and of what was fitted may have been taken out.

        Args:
            directory: the folder, or the file.
            types: element of each type of a file, from type 0 on; not looked at for a folder.

        Raises:
            InputError: the folder is missing, incomplete or damaged; or the file is, or its types are not known.
        """
        return storage.load(cls, directory, types)
