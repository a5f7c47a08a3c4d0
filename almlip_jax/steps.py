"""The steps of active learning on structures, for your own scripts: label, explore, set thresholds, select.

Each takes structures and gives structures.  What is compiled is kept for the next call with the same settings, so that
the second round of a loop compiles nothing.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from almlip_jax.campaign.batch import AtomRoom, Looked, choose, features_of, shown, taken
from almlip_jax.campaign.consistency import check_selector
from almlip_jax.campaign.cost import PaidLabel, paid_labels
from almlip_jax.dynamics import Exploration, ExplorationSettings, Explorer, Knowledge, dealt_further, know
from almlip_jax.dynamics.knowledge import errors_and_scores, structure_scores
from almlip_jax.dynamics.thresholds import Resolved, ThresholdSettings
from almlip_jax.ensembles import AnyEnsemble, require_score, require_target
from almlip_jax.errors import InputError, LabelError, nearest
from almlip_jax.given import given_number, given_settings, given_structures, refusals
from almlip_jax.keys import named_key
from almlip_jax.kinds import refusal, user_code
from almlip_jax.oracles import (
    ExecutorSettings,
    LabelStore,
    LocalSettings,
    OwnSource,
    SourceSettings,
    is_own_source,
    label_structures,
)
from almlip_jax.potential import GRADES, Potential
from almlip_jax.scores import names, needs_no_fit, scores
from almlip_jax.scoring import MV_GRADE, NBH_GRADES
from almlip_jax.selection import Candidates, Selector, SelectorSettings, UserSelector
from almlip_jax.structures.species import SpeciesTable

_EXPLORERS = 8  # kinds of exploration whose programs are kept
_OF_CAMPAIGNS = {
    "thresholds": "they are given to `run`: explorer.run(starts, {'kind': 'relative'}, labelled=data)",
    "starts": "the structures to start from are given to `run`",
    "continue_walkers": "`run` is given the structures to start from, such as those of `exploration.final`",
    "correct": "displace the frames of `exploration.final`, and put those that you want beside what `select` gives",
}
"""Keys of the section of a config that a script has no use for, and what it does instead."""
_LEAST_ROWS = 64  # of a pool, so that small pools share a program


def label(
    source: SourceSettings | Mapping[str, Any] | str | BaseCalculator | Callable[[Atoms], Any],
    structures: Sequence[Atoms] | Atoms,
    *,
    store: Path | str | None = None,
    executor: ExecutorSettings | Mapping[str, Any] | str | None = None,
    failed: str = "raise",
    retry: bool = False,
    identity: str = "",
    charge_and_spin: bool = False,
) -> list[Atoms]:
    """Structures with energies and forces from a label source.

    Args:
        source: settings of the label source, a dict of them such as ``{"kind": "tblite"}``, or the name of a kind.  Or
            an object of your own: an ASE calculator, or a function of a structure that gives the structure with a
            calculator, a calculator, ``(energy, forces)`` or what else functions of kind ``user`` give.  It is asked in
            this process, one structure after the other, without a time limit, and sees of a structure what labels
            depend on: species, positions, cell, pbc, charge, spin and initial magnetic moments.  Its labels are judged
            like others: finite, converged as far as a calculator says, no force component above 100 eV/Angstrom.
        structures: in any number; charge and spin are those of their ``info``.  One alone stands for a list of one,
            here as in all other functions.
        store: file of the label store.  Labels that it holds are not calculated again, and what is calculated is kept
            there; without, labels are kept for this call only.
        executor: where calculations run, of a source with settings; by default in a process for each core.
        failed: ``raise``, or ``leave_out``: what becomes of structures that the source cannot label.
        retry: whether labels that have failed in this store are tried again, as where a program was not there.
        identity: what labels of an object of your own are taken for in a store: its method, settings and version, which
            nothing else can tell.  Labels of one identity are never calculated twice, so give another one whenever the
            object would label differently.
        charge_and_spin: whether an object of your own takes charge and spin of structures into account; those that have
            some are refused otherwise.

    Returns:
        copies with their labels, in order.

    Raises:
        LabelError: a label failed; the frame and the reason are named, and the others are in the store.
        InputError: the settings are not valid, the label source or the store cannot be used, or an object of your own
            comes with a store and without an identity.

    >>> from ase.build import molecule
    >>> from almlip_jax import label
    >>> water, = label("tblite", [molecule("H2O")])
    >>> bool(abs(water.get_potential_energy() + 138.0) < 0.1)
    True
    """
    if failed not in ("raise", "leave_out"):
        raise InputError(f"failed is 'raise' or 'leave_out', not '{failed}'.")
    structures = given_structures(structures, "structures")
    settings = _source(source, store, executor, identity, charge_and_spin)
    where = given_settings(ExecutorSettings, executor or LocalSettings(), "executor")
    with tempfile.TemporaryDirectory(prefix="almlip-labels-") as folder:
        with LabelStore(Path(store or Path(folder) / "labels.db")) as opened:
            told = {"purpose": "script"}
            results = label_structures(structures, settings, opened, executor=where, provenance=told, retry=retry)
    wrong = [(number, result.error) for number, result in enumerate(results) if result.atoms is None]
    if wrong and failed == "raise":
        number, reason = wrong[0]
        earlier = "; it failed in an earlier call, and is tried again with retry=True" if results[number].cached else ""
        raise LabelError(
            f"{len(wrong)} of {len(results)} labels failed, first that of structure {number}: {reason}{earlier}"
        )
    return [result.atoms for result in results if result.atoms is not None]


def _source(source: Any, store: Any, executor: Any, identity: str, charge_and_spin: bool) -> SourceSettings:
    """Settings of a label source, which may be an object of a script's own."""
    if not is_own_source(source):
        if identity or charge_and_spin:
            raise InputError("identity and charge_and_spin are of objects of your own; settings of sources say theirs.")
        return given_settings(SourceSettings, source, "source")
    if executor is not None:
        raise InputError("executor: an object of your own labels in this process; leave it out, or take kind 'user'.")
    if store is not None and not identity:
        raise InputError(
            "store: nothing tells what an object of your own calculates; say it in identity, its method, settings and "
            "version, or leave store out."
        )
    why = None if hasattr(source, "get_potential_energy") else refusal(source, "atoms")
    if why is not None:
        raise InputError(f"source: a function that labels takes a structure, and this one does not ({why}).")
    return OwnSource(kind="own", own=source, known_as=identity, charge_and_spin=charge_and_spin)


def thresholds(
    rule: ThresholdSettings | Mapping[str, Any] | str,
    potential: Potential,
    labelled: Sequence[Atoms] | Atoms,
    *,
    score: str = "force_std_max",
    knowledge: Knowledge | None = None,
    calibration: Sequence[Atoms] | Atoms | None = None,
) -> Resolved:
    """Thresholds of a gate.

    Args:
        rule: settings of the thresholds, a dict of them such as ``{"kind": "relative", "floor": 0.05}``, or the name of
            a kind.
        potential: whose scores count.
        labelled: the training set, for relative thresholds; structures with forces that were drawn at random from an
            exploration and not trained on, for calibrated and conformal ones.
        score: what the gate looks at.
        knowledge: of the training set (`know`), for novelty scores.
        calibration: structures that were not trained on, where they are others than ``labelled``: for a rule that looks
            at both.

    Raises:
        InputError: the settings are not valid, the score is not known, does not suit the rule or is not there, or the
            structures are too few, or say nothing.
    """
    settings = given_settings(ThresholdSettings, rule, "rule")
    labelled = given_structures(labelled, "labelled")
    drawn = labelled if calibration is None else given_structures(calibration, "calibration")
    if (settings.looks_at_training_set and not labelled) or (settings.frames_drawn and not drawn):
        raise InputError(f"{settings.kind} thresholds follow from labelled structures, and there are none; give some.")
    bare = [number for number, frame in enumerate(drawn) if frame.calc is None]
    if settings.frames_drawn and bare:
        raise InputError(f"{settings.kind} thresholds follow from true errors, and structure {bare[0]} has no forces.")
    known = knowledge or Knowledge()
    _check_score(score, settings, potential, known)
    return settings.resolve(
        lambda: structure_scores(score, potential, labelled, known),
        lambda _: errors_and_scores(score, potential, drawn, known),
    )


def _check_score(score: str, rule: ThresholdSettings, potential: Potential, knowledge: Knowledge) -> None:
    """Refuses a score that thresholds cannot follow from."""
    declared = names(scores())
    if score not in declared:
        raise InputError(f"score: '{score}' is not a known score{nearest(score, declared)}")
    with refusals():
        rule.check(score)
    if not (rule.looks_at_training_set or rule.frames_drawn):
        return
    with refusals():
        require_target(score, potential.ensemble.targets, "score")
        require_score(score, potential.member_settings, "score")
    if not needs_no_fit(score) and score not in knowledge.novelty:
        raise InputError(
            f"score: {score} is fitted to a training set; give knowledge, what know() gives for one and an exploration "
            f"that looks at {score}."
        )


@dataclass(frozen=True)
class PotentialExplorer:
    """Explores with one potential; `Potential.explorer` makes it.

    Attributes:
        potential: that drives the walkers.
        settings: of the exploration.
    """

    potential: Potential
    settings: ExplorationSettings

    @property
    def room(self) -> int:
        """Frames that an exploration can record at most."""
        return len(self.settings.temperatures) * self.settings.buffer

    def run(
        self,
        starts: Sequence[Atoms] | Atoms,
        gate: ThresholdSettings | Mapping[str, Any] | Resolved | Sequence[float] | str = (math.inf, math.inf),
        *,
        labelled: Sequence[Atoms] | Atoms = (),
        calibration: Sequence[Atoms] | Atoms = (),
        seed: int = 0,
        step: int = 0,
        on_chunk: Callable[[int, int], None] | None = None,
    ) -> Exploration:
        """Runs every walker until it ends or its steps are done.

        Args:
            starts: start structures, dealt out to the walkers in turn; with ``rewind: {to: starts}`` a walker begins
                again at others of the same atoms.
            gate: thresholds of the gate: record and stop, what `thresholds` gave, or how they follow from labelled
                structures, as there; infinite ones, the default, neither record nor stop.
            labelled: the training set, where thresholds, novelty scores or the admission to the buffer look at it; what
                the potential knows of it (`Potential.knowing`) serves where none is given.
            calibration: labelled structures that were drawn at random and not trained on, for thresholds that follow
                from true errors (calibrated and conformal ones).
            seed: all random numbers follow from it and from ``step``.
            step: which round it is, so that each has random numbers of its own.
            on_chunk: called after each chunk with steps done and number of walkers that still run.

        Raises:
            InputError: as for `dynamics.Explorer.run`, thresholds are not valid or not in order, or labelled structures
                are missing.
        """
        starts, labelled = given_structures(starts, "starts"), given_structures(labelled, "labelled")
        if not starts:
            raise InputError("there is no structure to start from.")
        potential, settings = self.potential, self.settings
        knowledge = None
        if labelled or potential.training_set is not None or potential.active_set is not None:
            knowledge = know(settings, potential, labelled or None, seed, _rows(len(labelled)))
        resolved = _levels(gate)
        if resolved is None:
            rule = given_settings(ThresholdSettings, gate, "gate")
            score = settings.gate.score
            resolved = thresholds(rule, potential, labelled, score=score, knowledge=knowledge, calibration=calibration)
        if resolved.relative is not None:
            knowledge = replace(knowledge or Knowledge(), relative=resolved.relative)
        dealt = [starts[n % len(starts)] for n in range(len(settings.temperatures))]
        made = _explorer(
            potential.ensemble,
            potential.species,
            type(settings),
            settings.model_dump_json(),
            max(len(start) for start in dealt),
            potential.precision,
        )
        further = dealt_further(starts, len(dealt), settings.further_starts)
        key = named_key(seed, "explore", step)
        return made.run(potential.params, dealt, resolved.levels, key, on_chunk, knowledge, further=further)


def explorer_of(potential: Potential, settings: ExplorationSettings | Mapping[str, Any]) -> PotentialExplorer:
    """Exploration with a potential; settings, or a dict of them, as in the section ``exploration`` of a config."""
    for name, instead in _OF_CAMPAIGNS.items():
        if isinstance(settings, Mapping) and name in settings and name not in ExplorationSettings.model_fields:
            raise InputError(f"exploration.{name}: this is a key of campaigns; in a script {instead}.")
    return PotentialExplorer(potential, given_settings(ExplorationSettings, settings, "exploration"))


def _levels(gate: Any) -> Resolved | None:
    """The thresholds themselves, where a script gave these; None where it gave a rule, or something else."""
    if isinstance(gate, Resolved):
        return gate
    if isinstance(gate, str | Mapping) or not isinstance(gate, Sequence | np.ndarray):
        return None
    try:
        record, stop = (float(one) for one in gate)
    except (TypeError, ValueError):
        raise InputError(f"gate: two numbers are needed, record and stop threshold, not {gate}.") from None
    if not record <= stop:  # not a number is never in order
        raise InputError(f"gate: the stop threshold {stop:g} is below the record threshold {record:g}; raise stop.")
    return Resolved(record, stop)


@lru_cache(maxsize=_EXPLORERS)
def _explorer(
    ensemble: AnyEnsemble, species: SpeciesTable, kind: type[ExplorationSettings], text: str, atoms: int, precision: str
) -> Explorer:
    """One for all potentials of an architecture, which share what it compiles."""
    settings = kind.model_validate_json(text)
    return Explorer(ensemble.predict, species, ensemble.cutoff, settings, atoms=atoms, dtype=np.dtype(precision))


def select(
    selector: SelectorSettings | Mapping[str, Any] | str | Selector,
    potential: Potential,
    pool: Sequence[Atoms] | Atoms,
    labelled: Sequence[Atoms] | Atoms,
    k: int | None = None,
    *,
    seed: int = 0,
    step: int = 0,
    room: int = 0,
    errors: Sequence[float] = (),
    store: Path | str | None = None,
    features: Sequence[str] | None = None,
    atom_features: Sequence[str] = (),
) -> list[Atoms]:
    """The structures of a pool that are most worth a label.

    Args:
        selector: settings of the selector, a dict of them such as ``{"kind": "bait"}``, or the name of a kind.  Or a
            selector itself: what a factory of `almlip_jax.selection` made, as ``max_det(10)``, or a pure function of
            your own ``(key, pool, labelled) -> Selection`` that jax can compile (`selection.Selector`).
        potential: whose scores and features count.
        pool: structures to choose from.
        labelled: what is labelled already.
        k: how many; None for a selector itself, which has its number.
        seed: all random numbers follow from it and from ``step``.
        step: which round it is.
        room: structures that a pool can have at most (`PotentialExplorer.room`), so that pools of any size share a
            program; where not given, sizes are rounded up to powers of two.
        errors: force errors on the structures kept for validation, of all rounds so far, where the selector follows
            them (``adaptive``).
        store: file of the label store, whose times say what labels cost, where the selector weighs by it
            (``cost_aware``); without, costs follow from the number of atoms.
        features: names of the feature maps that candidates have for a selector itself; ``latent`` and
            ``last_layer_gradient`` where not given.  Settings say what theirs look at.
        atom_features: of those whose rows of atoms they have, in ``environments``; likewise.

    Returns:
        up to k of them, copies, best first, with ``info["gain"]`` and their place in the pool, ``info["pool_index"]``.

    Raises:
        InputError: the settings are not valid, or the selector looks for scores or features that do not exist, or that
            are 0 everywhere (the spread of one member), or is no function that jax can compile.

    >>> from almlip_jax import select
    >>> from almlip_jax.selection import max_det
    >>> batch = select(max_det(10), potential, pool, labelled)  # doctest: +SKIP
    """
    settings, build = _selector(selector, k, features, atom_features)
    pool, labelled = given_structures(pool, "pool"), given_structures(labelled, "labelled")
    if not pool:
        return []
    with refusals():
        check_selector(settings, potential.member_settings, "the selector", potential.ensemble.targets)
    request = features_of(settings, seed)
    shape = potential.batch_shape([*pool, *labelled])
    of_pool = potential.evaluate(pool, features=request, shape=shape)
    # where nothing is labelled, one row that counts for nothing keeps the shapes
    of_labelled = potential.evaluate(labelled, features=request, shape=shape) if labelled else of_pool
    atoms = AtomRoom.of([len(frame) for frame in pool], room, each_once=False) if room else _atoms(pool)
    among, around = shown(
        settings,
        Looked(pool, of_pool, room or _rows(len(pool)), atoms),
        Looked(labelled, of_labelled, _rows(len(labelled)), _atoms(labelled or pool[:1])),
        fitted_to=(potential, labelled),
        paid=partial(_paid, store),
        scalars=settings.scalars(errors),
    )
    return taken(pool, build(named_key(seed, "select", step), among, around), "pool_index")


Chosen = list[tuple[int, float]]


def _selector(
    selector: Any, k: int | None, features: Sequence[str] | None, atom_features: Sequence[str]
) -> tuple[SelectorSettings, Callable[[jax.Array, Candidates, Candidates], Chosen]]:
    """What a selector looks at, and what chooses by it; a selector itself looks at what is named, as kind ``user``."""
    if isinstance(selector, type | SelectorSettings) or not callable(selector):
        settings, number = given_settings(SelectorSettings, selector, "selector"), given_number(k, "k", 1)
        if features is not None or atom_features:
            raise InputError("features and atom_features are for selectors themselves; settings say what theirs see.")
        chosen_by = _chosen_by if any(user_code(settings)) else choose
        return settings, lambda *given: chosen_by(settings.build(number), *given)
    if k is not None:
        raise InputError("k: a selector itself has the number of structures that it chooses; leave k out.")
    why = refusal(selector, "key", "pool", "labelled")
    if why is not None:
        raise InputError(f"selector: it has to be a function of key, pool and labelled, and this one is not ({why}).")
    named = {} if features is None else {"features": features}
    looks_at = {"function": "script:selector", "atom_features": atom_features, **named}
    return given_settings(UserSelector, looks_at, "selector"), lambda *given: _chosen_by(selector, *given)


def _chosen_by(selector: Selector, key: jax.Array, pool: Candidates, labelled: Candidates) -> Chosen:
    """What a selector of a script's own chooses.

    Raises:
        InputError: it looks for what candidates do not have, cannot be compiled, or chooses what is not there.
    """
    try:
        return choose(selector, key, pool, labelled)
    except KeyError as error:
        raise InputError(f"the selector looks for {error}, which candidates do not have; see features.") from error
    except TypeError as error:  # those of jax are some, too
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"the selector has to be a function of key, pool and labelled that jax can compile: {reason}"
        ) from error


def select_add(
    potential: Potential, pool: Sequence[Atoms] | Atoms, labelled: Sequence[Atoms] | Atoms = ()
) -> tuple[list[Atoms], Potential]:
    """The structures of a pool that enter the active set of a potential: ``select-add`` of MLIP-2.

    The pool is offered to the set swap by swap, and what stands in it at the end is to be labelled and trained on.

    Args:
        potential: with an active set (`Potential.spanning`), unless labelled structures are given.
        pool: structures to choose from; labels are not looked at.
        labelled: structures that the set is built from anew, with the settings of the potential's where it has one.

    Returns:
        copies of those that entered, the largest grade first, with ``info["MV_grade"]`` and, in neighborhood mode,
        ``arrays["nbh_grades"]`` of their atoms (over the set before; so named in files of MLIP-2), and
        ``info["pool_index"]``; and the potential with the set that they entered.

    Raises:
        InputError: there is neither an active set nor a labelled structure, or an element is not known.

    >>> from almlip_jax import select_add
    >>> batch, potential = select_add(potential, pool)  # doctest: +SKIP
    """
    pool, labelled = given_structures(pool, "pool"), given_structures(labelled, "labelled")
    if not pool:
        return [], potential
    if labelled:
        active = potential.active_set
        potential = potential.spanning(labelled, None if active is None else active.settings)
    offer = potential.offer(pool)
    batch = []
    for place, index in enumerate(offer.entered):
        frame = pool[index].copy()
        for name in (*GRADES.values(), NBH_GRADES):  # those of another set are no longer true
            frame.info.pop(name, None)
            frame.arrays.pop(name, None)
        frame.info |= {MV_GRADE: float(offer.grades[index]), "pool_index": index}
        if offer.atom_grades:
            frame.arrays[NBH_GRADES] = offer.atom_grades[place]
        batch.append(frame)
    return batch, potential.with_fitted(active_set=offer.active)


def _paid(store: Path | str | None) -> list[PaidLabel]:
    """What the labels of a store have cost; of none, nothing is known."""
    if store is None:
        return []
    with LabelStore(Path(store), readonly=True) as opened:
        return paid_labels(opened)


def _atoms(structures: Sequence[Atoms]) -> AtomRoom:
    """Rows for the atoms of structures, likewise."""
    largest = max(len(structure) for structure in structures)
    return AtomRoom(_LEAST_ROWS * largest, largest).holding(structures)


def _rows(number: int) -> int:
    """Rows for a number of structures, rounded up so that few sizes occur."""
    return max(_LEAST_ROWS, 1 << max(number - 1, 0).bit_length())
