"""The stages of a campaign, one function each: files of the stages before go in, files and a few numbers come out.

Every input that a stage does not compute itself is read from the run directory, also where the stage before has just
written it, and every random number comes from a stream named after stage and round.  A stage done again after a kill
therefore gives the same result.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from ase import Atoms

from almlip_jax.campaign.batch import (
    Chooser,
    Looked,
    choose_shared,
    shown,
    taken,
    undecided,
    validation_error,
)
from almlip_jax.campaign.correction import SPREAD, marked
from almlip_jax.campaign.cost import PaidLabel
from almlip_jax.campaign.preparation import Source, check_target_labels, held_out_set, initial_set, planned_calls
from almlip_jax.campaign.round import Budget, Round, Trained
from almlip_jax.campaign.rundir import PotentialDirectory, RoundDirectory
from almlip_jax.campaign.settings import InitialSettings, TargetErrorSettings, TestSettings
from almlip_jax.errors import LabelError
from almlip_jax.evaluation import error_metrics
from almlip_jax.evaluation.metrics import labels_of
from almlip_jax.files import read_json, understood, write_csv, write_json, write_npz
from almlip_jax.learner import Earlier, Learner
from almlip_jax.models import Params
from almlip_jax.oracles import Labeller, LabelResult
from almlip_jax.potential import ActiveSetSettings, ActiveStructures, Evaluated, Potential
from almlip_jax.potential.evaluator import joined, rows_of
from almlip_jax.potential.file_types import FileTypes
from almlip_jax.progress import Progress, reaching
from almlip_jax.scores import mean_score
from almlip_jax.selection import SelectorSettings
from almlip_jax.structures.carried import carried, system_of
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.labels import type_numbers
from almlip_jax.targets import target_errors, targets
from almlip_jax.training import EpochReport, checkpoint

Results = Mapping[str, Any]
"""Fields of the round's record that a stage found out."""


# -------------------------------------------------------------------------------------------------------- preparation


def make_initial_set(
    settings: InitialSettings,
    source: Source,
    pool: Sequence[Atoms],
    generated: Mapping[str, Sequence[Atoms]],
    here: Round,
    chosen: Sequence[Atoms] = (),
    *,
    needed: Collection[str] = (),
) -> Results:
    """Labels the initial set and writes it as the dataset of a round.

    Args:
        settings: what it is made of.
        source: start geometries and label source.
        pool: structures that a fixed pool gives.
        generated: structures that are made for it, by the kind of their generator.
        here: the round.
        chosen: frames of a teacher.
        needed: named systems of which there have to be some.
    """
    source.labeller.prepare()
    calls = planned_calls(settings, source.geometries)
    with here.progress.stage("initial set", calls, unit="labels") as advance:
        frames = initial_set(settings, replace(source, advance=advance), pool, generated, chosen, needed=needed)
    write_structures(here.folder.create().dataset, frames)
    return {}


def make_test_set(
    settings: TestSettings, source: Source, pool: Sequence[Atoms], target: TargetErrorSettings | None, here: Round
) -> Results:
    """Labels the test set, if one is asked for, and writes it; it has to have the labels of the wanted error."""
    calls = planned_calls(settings, source.geometries)
    with here.progress.stage("test set", calls, unit="labels") as advance:
        frames = held_out_set(settings, replace(source, advance=advance), pool, here.dataset())
    if frames:
        write_structures(here.run.test, frames)
    check_target_labels(target, frames)
    return {}


# ----------------------------------------------------------------------------------------------------- train, evaluate


def train(
    learner: Learner,
    here: Round,
    earlier: Earlier | None,
    *,
    know: bool = False,
    final: bool = False,
    spanned: ActiveSetSettings | None = None,
    standing: ActiveStructures | None = None,
) -> Potential:
    """Trains the ensemble on the dataset of a round and saves the potential.

    Args:
        learner: trains, with arrays that keep their shapes.
        here: the round.
        earlier: what the training goes on from; None where it begins anew, or with what the learner begins with.
        know: whether the potential keeps what comparisons with its training set need.
        final: whether it is the final potential, with a length of its own; other random numbers, another folder.
        spanned: the active set that the potential is to have; None for none.
        standing: that of the potential before, which is renewed.
    """
    name = "final" if final else "train"
    folder: PotentialDirectory = here.run.final.create() if final else here.folder
    dataset = here.dataset()
    return trained(
        learner,
        dataset,
        learner.beginning(dataset, earlier),
        here.key(name),
        here.generator("replay", name),
        folder,
        here.progress,
        metadata=here.provenance | FileTypes(tuple(type_numbers(here.types or ()))).note(),
        know=know,
        steps=learner.training.final_steps if final else None,
        spanned=spanned,
        standing=standing,
    )


def trained(
    learner: Learner,
    dataset: Sequence[Atoms],
    beginning: tuple[Params | None, dict[int, float]],
    key: jax.Array,
    stream: np.random.Generator,
    folder: PotentialDirectory,
    progress: Progress,
    *,
    metadata: Mapping[str, Any],
    name: str = "train",
    know: bool = False,
    steps: int | None = None,
    spanned: ActiveSetSettings | None = None,
    standing: ActiveStructures | None = None,
) -> Potential:
    """Trains the ensemble on a dataset and saves the potential.

    Args:
        learner: trains.
        dataset: labelled.
        beginning: first parameters and reference energies.
        key: of the random numbers of the training.
        stream: draws what the potential remembers.
        folder: of the potential.
        progress: tells the user.
        metadata: goes with the potential.
        name: of the stage, as the user is told.
        know: whether the potential keeps what comparisons with its training set need.
        steps: length of the training, in place of what the settings say.
        spanned: the active set that the potential is to have; None for none.
        standing: that of the potential before, which is renewed.
    """
    params, references = beginning
    most = steps or learner.training.most_steps(len(dataset), warm=params is not None)
    with progress.stage(name, most, unit="steps") as advance:
        reached = reaching(advance)

        def on_epoch(report: EpochReport) -> None:
            reached(report.step, epoch=report.epoch, **report.errors)

        result = learner.train(dataset, params, key, references, on_epoch, folder.unfinished_training, steps)
    write_csv(folder.training, result.rows())
    potential = learner.potential(result, dataset, references, stream, {**metadata, "dataset_size": len(dataset)})
    whole = [*dataset, *(() if params is None else learner.replayed(dataset))]
    if spanned is not None:
        potential = potential.spanning(whole, spanned, earlier=standing)
    if know:
        potential = potential.knowing(whole, shape=potential.batch_shape(whole))
    potential.save(folder.potential)
    checkpoint.discard(folder.unfinished_training)
    return potential


def evaluate(
    test: Sequence[Atoms], potential: Callable[[], Potential], folder: PotentialDirectory, progress: Progress
) -> Results:
    """Errors and calibration on the test set; without one, no potential is asked for."""
    if not test:
        return {}
    evaluating = potential()
    with progress.stage("evaluate", len(test), unit="structures") as advance:
        evaluated = evaluating.evaluate(test, on_batch=advance)
    metrics = error_metrics(test, evaluated)
    write_npz(folder.test_predictions, _predictions(test, evaluated))
    write_json(folder.evaluation, metrics)
    errors = {
        f"{name}_{group}": float(values[name])
        for group, values in metrics["by_group"].items()
        for name in target_errors()
        if math.isfinite(values.get(name, math.nan))
    }
    return {"errors": errors}


def _predictions(structures: Sequence[Atoms], evaluated: Evaluated) -> dict[str, np.ndarray]:
    sizes = np.array([len(atoms) for atoms in structures])
    labels = [labels_of(atoms) for atoms in structures]
    compared: list[tuple[str, tuple[int, ...], str, Any]] = [("stress", (6,), "structure", evaluated.stress)]
    compared += [(one.label, one.shape, one.per, evaluated.further[one.name]) for one in targets(evaluated.further)]
    arrays: dict[str, np.ndarray] = {}
    for name, shape, per, predicted in compared:
        rows = [n for n, known in enumerate(labels) if name in known]
        both = [labels[n][name] for n in rows], [predicted[n] for n in rows]
        for of, values in zip(("true", "pred"), both, strict=True):
            parts = [np.reshape(one, (-1, *shape)) for one in (*values, np.zeros((0, *shape)))]
            arrays[f"{name}_{of}"] = np.concatenate(parts)
        arrays[f"{name}_structure"] = np.repeat(np.array(rows, np.int64), sizes[rows] if per == "atom" else 1)
    return arrays | {
        "forces_true": np.concatenate([atoms.get_forces(apply_constraint=False) for atoms in structures]),
        "forces_pred": np.concatenate(evaluated.forces),
        "force_total": np.concatenate(evaluated.atom_scores["force_total"]),
        "group": np.repeat([atoms.info["group"] for atoms in structures], sizes),
        "energy_true": np.array([atoms.get_potential_energy() for atoms in structures]),
        "energy_pred": evaluated.energy,
        "energy_total": evaluated.scores["energy_total"],
        "natoms": sizes,
        "structure_group": np.array([atoms.info["group"] for atoms in structures]),
    }


# ------------------------------------------------------------------------------------------------------------- select


Compare = Callable[[Sequence[Atoms], Evaluated, Potential], Mapping[str, np.ndarray]]
"""Further scores of candidates, from what the potential of a round says of them."""


def select(
    chooser: Chooser,
    here: Round,
    trained: Callable[[], Trained],
    paid: Callable[[], list[PaidLabel]],
    budget: Budget,
    *,
    fixed: bool,
    shares: Mapping[str, float],
    compare: Compare | None = None,
    under_way: Sequence[Atoms] = (),
) -> Results:
    """Chooses the batch from the candidates, cut to what is left of the label budget.

    Args:
        chooser: the selector.
        here: the round.
        trained: its potential, asked for where there are candidates.
        paid: labels whose times say what others cost.
        budget: of the round.
        fixed: whether candidates are those of a fixed pool: what is left of it is looked at, too.
        shares: of named systems in the batch.
        compare: compares candidates with a teacher, where the selector asks for it.
        under_way: structures whose labels are being made, which count as chosen.
    """
    folder = here.folder
    folder.batch.unlink(missing_ok=True)
    if not folder.pool.exists():
        return {"selected": 0}
    frames, judge = read_structures(folder.pool), trained()
    with here.progress.stage("select"):
        evaluated, dataset = judge.evaluate("candidates", frames), here.dataset()
        corrections = marked(frames)
        first = corrections[: budget.selected]
        among, around = shown(
            chooser.settings,
            Looked(frames, evaluated, chooser.candidates, chooser.atoms_of_candidates),
            _known(chooser, judge, (frames, evaluated), (dataset, under_way), first),
            fitted_to=(judge.potential, dataset),
            paid=paid,
            scores=None if compare is None else compare(frames, evaluated, judge.potential),
            scalars=_selection_scalars(chooser.settings, here),
            chosen=len(first),
        )
        if first:  # nor are corrections for which no place is left candidates
            among = replace(among, valid=among.valid.at[np.array(corrections)].set(False))
        chosen = [(row, _spread(frames[row])) for row in first]
        if left := budget.selected - len(first):
            key_of = partial(here.key, "select")
            chosen += choose_shared(chooser.selector, key_of, frames, (among, around), shares, left)
    if not chosen and compare is not None:
        here.progress.message(f"none of {len(frames)} candidates is bought: the filters leave none of them.")
    if (remark := undecided([gain for _, gain in chosen[len(first) :]], len(frames) - len(first))) is not None:
        here.progress.message(remark)
    batch = taken(frames, chosen)
    if batch:
        write_structures(folder.batch, batch)
    scores, indices = evaluated.scores[judge.monitor], [index for index, _ in chosen]
    results: dict[str, Any] = {"selected": len(batch), "sigma_batch": mean_score(scores[indices])}
    if shares:
        results |= {
            f"systems_{what}": {name: counts[name] for name in shares}
            for what, some in (("candidates", frames), ("selected", batch))
            for counts in (Counter(map(system_of, some)),)
        }
    if fixed:
        results["sigma_pool"] = mean_score(np.delete(scores, indices))
    return results


def _known(
    chooser: Chooser,
    judge: Trained,
    of_pool: tuple[Sequence[Atoms], Evaluated],
    labelled: tuple[Sequence[Atoms], Sequence[Atoms]],
    first: Sequence[int],
) -> Looked:
    """What counts as labelled where the batch is chosen.

    Args:
        chooser: the selector.
        judge: the potential of the round.
        of_pool: the candidates.
        labelled: the dataset, and structures whose labels are being made.
        first: rows of the corrections that stand in the batch already.
    """
    (frames, evaluated), (dataset, under_way) = of_pool, labelled
    known = [*dataset, *under_way, *(frames[row] for row in first)]
    contexts = [judge.evaluate("dataset", dataset)]
    if under_way:
        contexts.append(judge.evaluate("under way", under_way))
    if first:
        contexts.append(rows_of(evaluated, first))
    context = contexts[0] if len(contexts) == 1 else joined(contexts)
    return Looked(known, context, chooser.labelled, chooser.atoms_of_labelled)


def _spread(frame: Atoms) -> float:
    """What a correction was chosen by, which stands in the place of a gain."""
    return float(frame.info[SPREAD])


def _selection_scalars(settings: SelectorSettings, here: Round) -> Mapping[str, float]:
    """What the selector asks of the campaign so far, from the force errors on the structures kept for validation."""
    if not settings.follows_errors:
        return {}
    errors = []
    for file in [here.run.round(n).potential / "potential.json" for n in range(here.index + 1)]:
        with understood(file):
            errors.append(validation_error(read_json(file)["metadata"]))
    return settings.scalars(errors)


# -------------------------------------------------------------------------------------------------------------- label


@dataclass(frozen=True)
class Asked:
    """What a round wants labels for.

    Attributes:
        here: the round.
        batch: selected frames.
        drawn: frames drawn at random, whose labels thresholds come from.
        notes: of each frame, those of the batch first: what the label store keeps about it.
    """

    here: Round
    batch: list[Atoms]
    drawn: list[Atoms]
    notes: Sequence[Mapping[str, Any]]

    @property
    def frames(self) -> list[Atoms]:
        """All of them."""
        return [*self.batch, *self.drawn]


def asked(selector: str, monitor: str, here: Round) -> Asked:
    """What a round wants labels for.

    Args:
        selector: kind of the selector, which is noted with the labels,
        monitor: as is this score of the structures.
        here: the round.
    """
    folder, carried_along = here.folder, ("system", "walker", "step", "pool_index", "gain")
    batch = read_structures(folder.batch) if folder.batch.exists() else []
    drawn = read_structures(folder.drawn) if folder.drawn.exists() else []
    chosen_by = {row: "correction" for row in marked(batch)}
    of_batch = [
        {"purpose": "train", "selector": chosen_by.get(row, selector), "score": frame.info.get(monitor)}
        for row, frame in enumerate(batch)
    ]
    of_drawn = [{"purpose": "calibration", "selector": "random"}] * len(drawn)
    notes = [
        {**here.provenance, **{key: frame.info[key] for key in carried_along if key in frame.info}, **note}
        for frame, note in zip([*batch, *drawn], [*of_batch, *of_drawn], strict=True)
    ]
    return Asked(here, batch, drawn, notes)


def label(
    labeller: Labeller, here: Round, due: Sequence[Asked], remarks: Sequence[str] = (), *, insist: bool = True
) -> dict[int, int]:
    """Labels what rounds asked for and writes the dataset of the next one: the present one, and what got a label.

    Args:
        labeller: the label source.
        here: the round.
        due: what it asked for, or the rounds before.
        remarks: keys of `info` that the dataset keeps, besides those that say where structures are from.
        insist: whether a batch without a single label is an error; else the dataset goes on without it.

    Returns:
        how many frames of the batches of these rounds got no label.

    Raises:
        LabelError: nothing of a batch could be labelled, and that is insisted on.
    """
    following = here.run.round(here.index + 1).create()
    grown, failures = here.dataset(), dict[int, int]()
    for one in due:
        labelled, failures[one.here.index] = _labelled(labeller, one, insist=insist)
        grown += [_training_frame(frame, here.index + 1, remarks) for frame in labelled]
    write_structures(following.dataset, grown)
    return failures


def _labelled(labeller: Labeller, asked: Asked, *, insist: bool) -> tuple[list[Atoms], int]:
    """What of a round's batch got a label, also written to its folder, and how many frames did not."""
    folder, say, batch = asked.here.folder, asked.here.progress.message, asked.batch
    folder.labelled.unlink(missing_ok=True)
    results = _label_frames(labeller, asked)
    _keep_calibration(folder, results[len(batch) :], say)
    labelled, failed = _parted(results[: len(batch)])
    if failed and not labelled and insist:
        raise LabelError(
            f"none of the {len(batch)} structures of round {asked.here.index} could be labelled, the first because: "
            f"{failed[0]}. Correct the cause and resume: they are tried again, and left out if they fail again."
        )
    if failed:
        say(f"{len(failed)} of {len(batch)} labels failed, the first because: {failed[0]}")
    if labelled:
        write_structures(folder.labelled, labelled)
        labelled = read_structures(folder.labelled, require_labels=True)
    return labelled, len(failed)


def _label_frames(labeller: Labeller, asked: Asked) -> list[LabelResult]:
    """Labels of what a round asked for, the batch first."""
    frames = asked.frames
    if not frames:
        return []
    known = sum(labeller.identity(frame) in labeller.store for frame in frames)
    with asked.here.progress.stage("label", len(frames), unit="labels") as advance:
        advance(known)
        return labeller.label(frames, asked.notes, on_label=lambda _: advance(1))


def _keep_calibration(folder: RoundDirectory, results: Sequence[LabelResult], say: Callable[[str], None]) -> None:
    """Writes the labelled frames that were drawn at random; those without a label are reported."""
    folder.calibration.unlink(missing_ok=True)
    labelled, failed = _parted(results)
    if failed:
        say(f"{len(failed)} of {len(results)} labels for thresholds failed, first: {failed[0]}")
    if labelled:
        write_structures(folder.calibration, labelled)


def _parted(results: Sequence[LabelResult]) -> tuple[list[Atoms], list[str | None]]:
    """Labelled structures, ``info["label_id"]`` with them, and the errors of those that got no label."""
    labelled = []
    for result in results:
        if result.atoms is not None:
            result.atoms.info["label_id"] = result.identity
            labelled.append(result.atoms)
    return labelled, [result.error for result in results if result.atoms is None]


def _training_frame(labelled: Atoms, round_index: int, remarks: Sequence[str]) -> Atoms:
    """A labelled structure without what was noted during its exploration, but for some remarks."""
    frame = carried(labelled)
    kept = ("charge", "spin", "system", "label_id", "walker", "step", "bath_temperature", "pool_index", *remarks)
    frame.info = {key: labelled.info[key] for key in kept if key in labelled.info}
    frame.info.update(origin="pool" if "pool_index" in labelled.info else "exploration", round=round_index)
    frame.calc = labelled.calc
    return frame
