"""Fitting: one training outside of a campaign, from labelled structures to a `Potential`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols

from almlip_jax.ensembles import Ensemble, EnsembleSettings, build_ensemble
from almlip_jax.errors import InputError
from almlip_jax.keys import named_key, numpy_generator
from almlip_jax.models import ModelSettings, Params
from almlip_jax.models.charge_energy import with_charge_energy
from almlip_jax.models.constants import with_constants_of
from almlip_jax.potential import ActiveSetSettings, Potential
from almlip_jax.potential.compositions import compositions_note
from almlip_jax.potential.file_types import noted_file_types
from almlip_jax.potential.spanning import check_spannable
from almlip_jax.potential.states import states_note
from almlip_jax.structures.electronic_state import electronic_state, total_charge
from almlip_jax.structures.remembered import remember
from almlip_jax.structures.repeats import geometry_key, without_repeats
from almlip_jax.structures.replay import FORGETS, Replay, replay
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import (
    AnyTrainer,
    EpochReport,
    References,
    TrainingResult,
    TrainingSettings,
    build_trainer,
    charge_columns,
    check_training,
    doubts,
    find_references,
    fitted_references,
    given_references,
    plan_capacity,
    proportions_left_open,
    refuse_idle_judgement,
    refuse_idle_members,
    refuse_idle_warmth,
    robust_fit,
    training_part,
    untold_charges,
    validation_part,
    without_isolated_atoms,
)

Say = Callable[[str], None]

_SURVEYED = 64  # structures from which the scale of densities is taken


def fit_potential(
    structures: Sequence[Atoms],
    model: ModelSettings,
    ensemble: EnsembleSettings,
    training: TrainingSettings,
    seed: int,
    on_epoch: Callable[[EpochReport], None] | None = None,
    checkpoint: Path | None = None,
    start: Potential | None = None,
    say: Say | None = None,
    validation: Sequence[Atoms] = (),
    know_training_set: bool = False,
    spanned: ActiveSetSettings | None = None,
) -> tuple[Potential, TrainingResult]:
    """Trains an ensemble on labelled structures; its species are those that occur in them.

    Args:
        structures: labelled.  Isolated atoms among them give the reference energies of their elements and are not
            trained on: the potential meets their energies exactly.  One that comes again with the same label counts
            once.
        model: settings of the architecture.
        ensemble: settings of the members.
        training: settings of the training.
        seed: decides the first parameters and the order of batches.
        on_epoch: called after each validation.
        checkpoint: folder that keeps the state of the training; the same training goes on there after an interruption.
        start: potential to begin from, of the same architecture.  Its reference energies stay.  Elements that it does
            not know are added, without changing its predictions for the others; elements that do not occur in the
            structures are kept.  What it remembers of its own training is trained on too, where `training.replay` is
            not 0 (`structures.replay`).
        say: is told about doubtful labels, what is trained on again, and models that diverged.
        validation: labelled structures to validate on, in place of a share of ``structures``.  Those that are trained
            on are left out.
        know_training_set: whether the potential keeps what comparisons with all that it is trained on need
            (`Potential.knowing`).
        spanned: the active set that the potential is to have, of the structures and of what it remembers and is
            trained on again.  The one that ``start`` has is renewed (`Potential.spanning`), with its settings where
            none are given.

    Returns:
        the potential, in float64 where jax is set to it, calibrated on its validation structures, and remembering a
        sample of what it was trained on; and the history of its training.

    Raises:
        InputError: nothing is labelled, the loss is not finite, ``start`` is of another architecture, or structures to
            validate on are all trained on, or hold an element that those which are trained on do not.
    """
    if start is not None:
        check_start(start, model, ensemble)
    else:
        check_training(model, ensemble, training)
        refuse_idle_members(ensemble)
        refuse_idle_warmth(training, switch="a potential to begin from (--from), or with warm_start of a campaign,")
    bonded = without_isolated_atoms(each_once(structures, "the data", say))
    held_out = _held_out(without_isolated_atoms(validation), bonded, say)
    if not held_out:
        refuse_idle_judgement(training)
    if not bonded:
        raise InputError("there is nothing to train on besides isolated atoms; give labelled structures.")
    if spanned is not None:
        check_spannable(build_ensemble(model, ensemble, SpeciesTable.of(structures)), spanned)
    task = _Task(model, ensemble, training, seed, start)
    prepared = _prepare(task, structures, bonded, held_out, say)
    result = _train(task, prepared, on_epoch, checkpoint, say)
    potential = _calibrated(task, prepared, result, len(bonded))
    standing = None if start is None else start.active_set
    whole = [*bonded, *prepared.parts.again]
    if spanned is not None or standing is not None:
        potential = potential.spanning(whole, spanned, earlier=standing)
    return potential.knowing(whole) if know_training_set else potential, result


@dataclass(frozen=True)
class _Task:
    """What is asked of a training; see `fit_potential`."""

    model: ModelSettings
    ensemble: EnsembleSettings
    training: TrainingSettings
    seed: int
    start: Potential | None


@dataclass(frozen=True)
class _Prepared:
    """A training before its first step.

    Attributes:
        species: every element of the potential.
        sees_state: whether the ensemble tells structures apart that differ in charge and spin alone.
        parts: what the structures are for.
        references: reference energies.
        params: first parameters; None for fresh ones.
        trainer: sized for the structures.
    """

    species: SpeciesTable
    sees_state: bool
    parts: _Parts
    references: References
    params: Params | None
    trainer: AnyTrainer


def _prepare(
    task: _Task, structures: Sequence[Atoms], bonded: list[Atoms], held_out: list[Atoms], say: Say | None
) -> _Prepared:
    """Species, data, reference energies and trainer; ``bonded`` are the structures that are not isolated atoms."""
    known = () if task.start is None else task.start.species.numbers
    species = SpeciesTable(tuple(sorted({*SpeciesTable.of([*bonded, *held_out]).numbers, *known})))
    built = build_ensemble(task.model, task.ensemble, species)
    parts = _parts(bonded, held_out, task.training, task.start, say, built.sees_state)
    _check_elements(parts, known, say, given=bool(held_out))
    dtype = np.float64 if jax.dtypes.canonicalize_dtype(np.float64) == np.float64 else np.float32
    references, params = _beginning(structures, task, species, built.sees_state)
    for doubt in (doubts(structures, references), None if built.sees_state else untold_charges(structures)):
        if say is not None and doubt is not None:
            say(doubt)
    capacity = plan_capacity([*parts.dataset, *parts.held_out], built.cutoff, parts.settings)
    trainer = build_trainer(task.model, task.ensemble, species, capacity, parts.settings, dtype, references.isolated)
    return _Prepared(species, built.sees_state, parts, references, params, trainer)


def _train(
    task: _Task,
    prepared: _Prepared,
    on_epoch: Callable[[EpochReport], None] | None,
    checkpoint: Path | None,
    say: Say | None,
) -> TrainingResult:
    return prepared.trainer.train(
        prepared.parts.dataset,
        prepared.params,
        named_key(task.seed, "train"),
        reference_energies=prepared.references.energies,
        on_epoch=on_epoch,
        validation=prepared.parts.held_out,
        weights_key=named_key(task.seed, "bootstrap"),
        say=say,
        checkpoint=checkpoint,
    )


def _calibrated(task: _Task, prepared: _Prepared, result: TrainingResult, dataset_size: int) -> Potential:
    """The potential that a training gave, calibrated where it was validated, with a sample of what it learned from."""
    parts, replayed = prepared.parts, len(prepared.parts.again)
    sees_state = prepared.sees_state
    states = states_note(parts.dataset, states_before(task.start, sees_state=sees_state), sees_state=sees_state)
    compositions = compositions_note(parts.dataset, () if task.start is None else task.start.compositions)
    files = {} if task.start is None else noted_file_types(task.start.metadata).note()
    stream = numpy_generator(task.seed, "replay")
    noted = {"dataset_size": dataset_size, "replayed": replayed, "seed": task.seed}
    potential = Potential(
        settings=task.model,
        species=prepared.species,
        params=result.params,
        reference_energies=prepared.references.energies,
        metadata=noted | states | compositions | files,
        members=result.members(task.ensemble),
        isolated=prepared.references.isolated,
        remembered=remember(parts.learned, task.training.replay, stream, parts.again),
    )
    return potential.calibrated(parts.judging)


def states_before(start: Potential | None, *, sees_state: bool) -> Collection[tuple[int, int]] | None:
    """Electronic states that a potential to begin with has learned of.

    Where it does not say, a potential that tells them apart goes by what it remembers, or by neutral singlets; for one
    that does not, they are not known (None).
    """
    if start is None:
        return ()
    if not sees_state:
        return start.states_met or None
    return start.states_met or {electronic_state(atoms) for atoms in start.remembered} or {(0, 1)}


@dataclass(frozen=True)
class _Parts:
    """What the structures of a training are for.

    Attributes:
        dataset: given to the trainer.
        held_out: structures that validate and are not part of ``dataset``; none where a share of it validates.
        settings: of the trainer.
        learned: new structures that are trained on.
        judging: structures that validate, whatever list they are in.
        again: remembered structures that are trained on again, each once.
    """

    dataset: list[Atoms]
    held_out: list[Atoms]
    settings: TrainingSettings
    learned: list[Atoms]
    judging: list[Atoms]
    again: tuple[Atoms, ...]


def _parts(
    new: list[Atoms],
    held_out: list[Atoms],
    training: TrainingSettings,
    start: Potential | None,
    say: Say | None,
    sees_state: bool,
) -> _Parts:
    """What is trained on and what validates; remembered structures are only trained on, and change no other's part."""
    share = 0.0 if held_out else training.validation_fraction
    learned, judging = training_part(new, share), held_out or validation_part(new, share)
    found = Replay((), 0, None)
    if start is not None:
        found = replayed(start, bool(training.replay), learned, judging, sees_state)
    if say is not None and found.remark is not None:
        say(found.remark)
    again = found.structures
    if not again:
        return _Parts(new, held_out, training, learned, judging, again)
    no_share = training.model_copy(update={"validation_fraction": 0.0})  # also where nothing validates
    return _Parts([*learned, *again * found.copies], judging, no_share, learned, judging, again)


def replayed(
    start: Potential, replays: bool, learned: Sequence[Atoms], judging: Sequence[Atoms], sees_state: bool
) -> Replay:
    """What is trained on again of what the potential to begin with remembers; none unless ``replays``."""
    if replays:
        return replay(start.remembered, learned, judging, sees_state=sees_state)
    return Replay((), 0, f"training.replay is 0, so that {FORGETS}.")


def each_once(structures: Sequence[Atoms], what: str, say: Say | None) -> list[Atoms]:
    """Labelled structures without those that come again with the same label, which could validate what they trained.

    Args:
        structures: labelled.
        what: to call them all.
        say: is told how many were left out, and which structures have labels that contradict each other.
    """
    tell = say or (lambda _: None)
    once = without_repeats(structures, geometry_key, what, tell)
    if again := len(structures) - len(once):
        is_one = again == 1
        tell(
            f"{what}: {again} structure{' comes' if is_one else 's come'} again with the same label, and "
            f"{'counts' if is_one else 'count'} once; give a weight to what is to count more."
        )
    return once


def _held_out(validation: list[Atoms], trained: Sequence[Atoms], say: Say | None) -> list[Atoms]:
    """Structures to validate on that are not trained on.

    Raises:
        InputError: all of them are.
    """
    if not validation:
        return []
    known = {geometry_key(atoms) for atoms in trained}
    fresh = [atoms for atoms in validation if geometry_key(atoms) not in known]
    if not fresh:
        raise InputError("all structures to validate on are trained on too; take them out of one of the two.")
    if say is not None and len(fresh) < len(validation):
        say(
            f"{len(validation) - len(fresh)} of {len(validation)} structures to validate on are trained on, and do not "
            "validate."
        )
    return fresh


def _check_elements(parts: _Parts, known: Collection[int], say: Say | None, *, given: bool) -> None:
    """Looks for elements that validate and are not trained on: a potential would claim to know them.

    Args:
        parts: of a training.
        known: elements that the potential to begin with knows.
        say: is told where a share of the data validates.
        given: whether structures were given to validate on.

    Raises:
        InputError: structures that were given to validate on hold one.
    """
    learned = {*known, *(int(z) for atoms in (*parts.learned, *parts.again) for z in atoms.numbers)}
    strange = sorted({int(z) for atoms in parts.judging for z in atoms.numbers} - learned)
    if not strange:
        return
    named = ", ".join(chemical_symbols[z] for z in strange)
    if given:
        raise InputError(
            f"structures to validate on hold {named}, which no structure that is trained on holds; leave those out, or "
            "add some to the data."
        )
    if say is not None:
        say(
            f"{named} occurs only in structures that are kept to validate on, so that nothing is learned of it; add "
            "more of these to the data, or name others with --validation."
        )


def check_start(start: Potential, model: ModelSettings, ensemble: EnsembleSettings) -> None:
    """Whether a training can begin with a potential.

    One that was not told charge and spin may be continued by one that is: for neutral singlets it predicts the same.

    Raises:
        InputError: it is of another architecture; the first difference is named.
    """
    there = start.ensemble
    if "electronic_state" in type(model).model_fields and not there.sees_state:
        model = model.model_copy(update={"electronic_state": False})
    wanted = build_ensemble(model, ensemble, start.species, start.isolated)
    if isinstance(wanted, Ensemble) and isinstance(there, Ensemble) and wanted.size > there.size:
        wanted = replace(wanted, size=there.size)  # further members begin anew
    if wanted == there:
        return
    told = []
    for section, ours, its in (("model", model, start.settings), ("ensemble", ensemble, start.member_settings)):
        given, old = ours.model_dump(), its.model_dump()
        names = [name for name in given if name in old and given[name] != old[name] and name not in _ASIDE]
        told += [f"{section}.{name} {old[name]}, not {given[name]}" for name in names]
    raise InputError(
        "the potential to start from has another architecture than model and ensemble of the config: "
        f"{'; '.join(told) or 'its members differ'}. Leave model and ensemble out of the config to take its own."
    )


_ASIDE = ("bootstrap", "bootstrap_variance", "order", "potential_name", "potential_tag")
"""Settings that change nothing of an architecture."""


def _beginning(
    structures: Sequence[Atoms], task: _Task, species: SpeciesTable, sees_state: bool
) -> tuple[References, Params | None]:
    """Reference energies and first parameters."""
    given, start = given_references(task.training), task.start
    if start is None:
        return find_references(structures, species, isolated=given, charges=sees_state), None
    kept = start.reference_energies
    references = find_references(structures, species, isolated=given, kept=kept, charges=sees_state)
    isolated = start.isolated | references.isolated
    grown = with_elements(start, species, references.energies, isolated, named_key(task.seed, "species"), structures)
    begun = with_kept_references(grown, structures, {*start.reference_energies, *isolated})
    return replace(references, energies=dict(begun.reference_energies), isolated=isolated), begun.params


def with_kept_references(begun: Potential, structures: Sequence[Atoms], met: Collection[int]) -> Potential:
    """The potential that a training goes on from, with reference energies that suit the structures.

    Those of the elements that it has met stay, and what charges cost, as far as the compositions that it has met tell
    these apart; those of the others, and what is left open (see `_for_new_proportions`), are fitted to what its
    predictions leave of the energies.

    Args:
        begun: the potential, which knows all elements.
        structures: labelled.
        met: elements that it has learned of.
    """
    begun = _for_new_proportions(begun, structures, met)
    fitted = [z for z in begun.species.numbers if z not in met]
    occurring = {int(z) for atoms in structures for z in atoms.numbers}
    if not occurring.intersection(fitted):
        return begun
    bare = replace(begun, reference_energies={**begun.reference_energies, **dict.fromkeys(fitted, 0.0)})
    found = references_of_the_rest(bare, structures, {z: 0.0 for z in begun.species.numbers if z in met})
    energies = {**begun.reference_energies, **{z: found.energies[z] for z in fitted}}
    return replace(begun, reference_energies=energies)


def references_of_the_rest(
    potential: Potential, structures: Sequence[Atoms], known: Mapping[int, float], *, charges: bool = False
) -> References:
    """Reference energies fitted to what a potential leaves of the energies of structures.

    Args:
        potential: the one.
        structures: labelled.
        known: energies that stay as they are, eV by atomic number.
        charges: whether the costs of charges are sought too.
    """
    labelled, rest = _with_energies(structures), []
    for atoms, energy in zip(labelled, potential.evaluate(labelled).energy, strict=True):
        left = atoms.copy()
        left.calc = SinglePointCalculator(left, energy=atoms.calc.results["energy"] - energy)
        rest.append(left)
    return fitted_references(rest, potential.species, known, charges=charges)


def _for_new_proportions(begun: Potential, structures: Sequence[Atoms], met: Collection[int]) -> Potential:
    """The potential with reference energies that suit structures whose proportions of elements it has not met.

    From H5O2+ alone nobody learns how its energy is shared between H, O and the charge, and any share serves; H9O4+ has
    other proportions, and tells, and so does a neutral molecule to a model that sees charge.  The reference energies
    change so that no energy of a composition that was met does, and that energies of the new ones are met on the
    average.  Without that the network would have to learn the difference, tens of electron-volts.  Energies of isolated
    atoms stay.

    Args:
        begun: the potential.
        structures: labelled.
        met: elements that it has learned of.
    """
    free = [z for z in begun.species.numbers if z in met and z not in begun.isolated]
    known = [*begun.remembered, *begun.compositions]
    if not known:
        return begun
    found = [atoms for atoms in _with_energies(structures) if set(atoms.numbers.tolist()) <= {*met, *begun.isolated}]
    before, counts = _counted([*known, *found], free, len(known), begun.ensemble.sees_state)
    left_open = proportions_left_open(before)
    shares = counts / np.array([len(atoms) for atoms in found])[:, None]
    new = np.flatnonzero(np.max(np.abs(shares @ left_open), axis=1, initial=0.0) > 1e-8)
    if not len(new):
        return begun
    telling = [found[n] for n in new]
    rest = [
        (atoms.calc.results["energy"] - energy) / len(atoms)
        for atoms, energy in zip(telling, begun.evaluate(telling).energy, strict=True)
    ]
    change = left_open @ robust_fit(shares[new] @ left_open, np.array(rest))
    moved = {z: begun.reference_energies[z] + float(by) for z, by in zip(free, change[: len(free)], strict=True)}
    return replace(
        begun,
        reference_energies={**begun.reference_energies, **moved},
        params=with_charge_energy(begun.params, change[len(free) :], added=True),
    )


def _counted(
    structures: Sequence[Atoms], free: Sequence[int], first: int, charges: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Atoms of some elements and amounts of charge, [n, S + 2], of the first structures and of the others.

    Charges are 0 where a potential does not see them, or where all structures have the same.
    """
    atoms = np.array([[np.sum(one.numbers == z) for z in free] for one in structures], np.float64)
    charged = charge_columns([total_charge(one) if charges else 0 for one in structures])
    counts = np.hstack([atoms.reshape(len(structures), len(free)), charged])
    return counts[:first], counts[first:]


def _with_energies(structures: Sequence[Atoms]) -> list[Atoms]:
    """Those that have an energy, without isolated atoms."""
    return [a for a in without_isolated_atoms(structures) if a.calc is not None and "energy" in a.calc.results]


def with_elements(
    start: Potential,
    species: SpeciesTable,
    energies: Mapping[int, float],
    isolated: frozenset[int],
    key: jax.Array,
    structures: Sequence[Atoms] = (),
) -> Potential:
    """A potential for a species table that holds its own; for the elements that it knows it predicts the same.

    Args:
        start: the potential.
        species: the table.
        energies: reference energies of all of its elements, eV by atomic number.
        isolated: elements whose reference energies are those of isolated atoms.
        key: draws the parameters of new elements.
        structures: typical ones; those that hold new elements say how large these parameters are to be.
    """
    grown = Potential(
        start.settings,
        species,
        start.params,
        energies,
        members=start.member_settings,
        isolated=isolated,
        remembered=start.remembered,
        metadata=compositions_note((), start.compositions),
    )
    if start.species == species:
        return grown
    fresh = replace(grown, params=jax.jit(grown.ensemble.init)(key))
    new = set(species.numbers) - set(start.species.numbers)
    holding = [atoms for atoms in without_isolated_atoms(structures) if new.intersection(atoms.numbers.tolist())]
    params = standardised(fresh, holding) if holding else with_constants_of(fresh.params, start.params)
    return replace(grown, params=start.ensemble.with_species(start.params, params, species))


def standardised(fresh: Potential, structures: Sequence[Atoms]) -> Params:
    """Parameters of a potential with their constants set for typical structures, and energies in units of 1 eV."""
    survey = jax.jit(fresh.ensemble.survey)
    surveys = [jax.device_get(survey(graph)) for graph in fresh.graphs(structures[:_SURVEYED])]
    whole = jax.tree.map(lambda *x: sum(x), *surveys)
    params: Params = jax.device_get(jax.jit(fresh.ensemble.standardise)(fresh.params, whole, 1.0))
    return params
