"""The stages of a campaign, one function each: files of the stages before go in, files and a few numbers come out.

Every input that a stage does not compute itself is read from the run directory, also where the stage before has just
written it, and every random number comes from a stream named after stage and round.  A stage done again after a kill
therefore gives the same result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.campaign.batch import (
    adaptive_part,
    candidates,
    choose,
    selection_scalars,
    undecided,
    validation_error,
)
from almlip_jax.campaign.cost import expected_costs, paid_labels
from almlip_jax.campaign.preparation import check_target_labels, held_out_set, initial_set, planned_calls
from almlip_jax.campaign.rundir import PotentialDirectory, RoundDirectory
from almlip_jax.campaign.workshop import Workshop
from almlip_jax.errors import InputError, LabelError
from almlip_jax.evaluation import error_metrics
from almlip_jax.evaluation.metrics import labels_of
from almlip_jax.files import read_json, understood, write_csv, write_json, write_npz
from almlip_jax.fitting import kept_references
from almlip_jax.keys import named_key, numpy_generator
from almlip_jax.oracles import LabelResult
from almlip_jax.potential import Evaluated, Potential
from almlip_jax.progress import reaching
from almlip_jax.structures.carried import carried
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.targets import target_errors, targets
from almlip_jax.training import EpochReport, checkpoint, params_for

Results = Mapping[str, Any]
"""Fields of the round's record that a stage found out."""


# -------------------------------------------------------------------------------------------------------- preparation


def make_initial_set(workshop: Workshop, round_index: int) -> Results:
    """Labels the initial set and writes it as the dataset of round 0."""
    workshop.labeller.prepare()
    pool = [workshop.pool[i] for i in workshop.pool_split.initial]
    settings = workshop.config.initial
    with workshop.progress.stage(
        "initial set", planned_calls(settings, len(workshop.geometries)), unit="labels"
    ) as advance:
        frames = initial_set(settings, workshop.source(advance), pool)
    write_structures(workshop.run.round(round_index).create().dataset, frames)
    return {}


def make_test_set(workshop: Workshop, round_index: int) -> Results:
    """Labels the test set, if the config asks for one, and writes it."""
    pool = [workshop.pool[i] for i in workshop.pool_split.test]
    settings = workshop.config.test
    with workshop.progress.stage(
        "test set", planned_calls(settings, len(workshop.geometries)), unit="labels"
    ) as advance:
        frames = held_out_set(settings, workshop.source(advance), pool, workshop.dataset(round_index))
    if frames:
        write_structures(workshop.run.test, frames)
    check_target_labels(workshop.config.stopping.target_error, frames)
    return {}


# ----------------------------------------------------------------------------------------------------- train, evaluate


def train(workshop: Workshop, round_index: int) -> Results:
    """Trains the ensemble on the dataset of the round and saves the potential."""
    potential = _train_round(workshop, round_index)
    calls = {"labels": workshop.labels, "test_calls": workshop.test_calls}
    return {**calls, "dataset_size": potential.metadata["dataset_size"]}


def train_final(workshop: Workshop, round_index: int) -> Results:
    """Trains the final potential on the dataset of the last round, with a length of its own, and saves it."""
    settings = workshop.config.training
    previous = potential_of(workshop, round_index) if settings.warm_start else None
    _train_into(workshop, workshop.run.final.create(), round_index, "final", previous, settings.final_steps)
    return {}


def _train_round(workshop: Workshop, round_index: int) -> Potential:
    warm = workshop.config.training.warm_start and round_index > 0
    previous = potential_of(workshop, round_index - 1) if warm else None
    return workshop.keep(
        round_index, _train_into(workshop, workshop.run.round(round_index), round_index, "train", previous)
    )


def _train_into(
    workshop: Workshop,
    folder: PotentialDirectory,
    round_index: int,
    name: str,
    previous: Potential | None,
    steps: int | None = None,
) -> Potential:
    """Trains on the dataset of a round and saves the potential; random numbers follow from ``name`` and the round."""
    dataset = workshop.dataset(round_index)
    key = named_key(workshop.config.seed, name, round_index)
    params = None
    if previous is not None:
        params = params_for(workshop.config.ensemble, previous.member_settings, previous.params)
    before = round_index if name == "final" else round_index - 1
    references = _references(workshop, dataset, previous, before)
    most = steps or _most_steps(workshop, len(dataset), previous is not None)
    with workshop.progress.stage("train", most, unit="steps") as advance:
        reached = reaching(advance)

        def on_epoch(report: EpochReport) -> None:
            reached(report.step, epoch=report.epoch, **report.errors)

        result = workshop.learner.train(dataset, params, key, references, on_epoch, folder.unfinished_training, steps)
    write_csv(folder.training, result.rows())
    metadata = {"campaign": workshop.config.name, "round": round_index, "dataset_size": len(dataset)}
    stream = numpy_generator(workshop.config.seed, "replay", name, round_index)
    potential = workshop.learner.potential(result, dataset, references, stream, metadata)
    if workshop.config.know_training_set:
        potential = potential.knowing(dataset, shape=potential.batch_shape(dataset))
    potential.save(folder.potential)
    checkpoint.discard(folder.unfinished_training)
    return potential


def _references(workshop: Workshop, dataset: list[Atoms], previous: Potential | None, before: int) -> dict[int, float]:
    """Reference energies of a training: those of its first parameters stay, of all elements that these have met.

    Fresh parameters go with a fresh fit.  ``before`` is the round whose dataset the previous potential was trained on.
    """
    if previous is None:
        return workshop.learner.references(dataset)
    met = {*SpeciesTable.of(workshop.dataset(before)).numbers, *previous.isolated}
    return kept_references(previous, dataset, met)


def _most_steps(workshop: Workshop, structures: int, warm: bool) -> int:
    settings = workshop.config.training
    most = (settings.warm_steps if warm else None) or settings.max_steps
    return min(most, settings.max_epochs * math.ceil(structures / settings.batch_size))


def potential_of(workshop: Workshop, round_index: int) -> Potential:
    """The potential of a round; where its checkpoint is damaged it is trained again, which gives the same one."""
    try:
        return workshop.potential(round_index)
    except InputError as error:
        workshop.progress.message(f"{error} The potential of round {round_index} is trained again from its dataset.")
        return _train_round(workshop, round_index)


def evaluate(workshop: Workshop, round_index: int) -> Results:
    """Errors and calibration on the test set."""
    if not workshop.test:
        return {}
    return {"errors": _test_errors(workshop, potential_of(workshop, round_index), workshop.run.round(round_index))}


def evaluate_final(workshop: Workshop, round_index: int) -> Results:
    """Errors and calibration of the final potential on the test set; one that is damaged is trained again."""
    if not workshop.test:
        return {}
    folder = workshop.run.final
    try:
        potential = Potential.load(folder.potential)
    except InputError as error:
        workshop.progress.message(f"{error} The final potential is trained again.")
        train_final(workshop, round_index)
        potential = Potential.load(folder.potential)
    return {"errors": _test_errors(workshop, potential, folder)}


def _test_errors(workshop: Workshop, potential: Potential, folder: PotentialDirectory) -> dict[str, float]:
    with workshop.progress.stage("evaluate", len(workshop.test), unit="structures") as advance:
        evaluated = potential.evaluate(workshop.test, on_batch=advance)
    metrics = error_metrics(workshop.test, evaluated)
    write_npz(folder.test_predictions, _predictions(workshop.test, evaluated))
    write_json(folder.evaluation, metrics)
    return {
        f"{name}_{group}": float(values[name])
        for group, values in metrics["by_group"].items()
        for name in target_errors()
        if math.isfinite(values.get(name, math.nan))
    }


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


# ------------------------------------------------------------------------------------------------------ explore, select


def explore(workshop: Workshop, round_index: int) -> Results:
    """Finds candidates, as the kind of exploration does."""
    stage = workshop.config.exploration.stage()
    return stage(workshop, round_index, potential_of(workshop, round_index))


def select(workshop: Workshop, round_index: int) -> Results:
    """Chooses the batch from the candidates, cut to what is left of the label budget."""
    folder = workshop.run.round(round_index)
    folder.batch.unlink(missing_ok=True)
    if not folder.pool.exists():
        return {"selected": 0}
    frames = read_structures(folder.pool)
    potential = potential_of(workshop, round_index)
    with workshop.progress.stage("select"):
        evaluated = workshop.evaluated_once(round_index, "candidates", frames, potential, None)
        dataset = workshop.dataset(round_index)
        context = workshop.evaluated_once(round_index, "dataset", dataset, potential, None)
        chosen = choose(
            workshop.selector,
            named_key(workshop.config.seed, "select", round_index),
            candidates(frames, evaluated, workshop.pool_capacity, cost=_costs(workshop, frames)),
            candidates(dataset, context, workshop.largest_dataset, scalars=_selection_scalars(workshop, round_index)),
        )[: _allowed(workshop)]
    if (remark := undecided([gain for _, gain in chosen], len(frames))) is not None:
        workshop.progress.message(remark)
    batch = []
    for index, gain in chosen:
        frame = frames[index].copy()
        frame.info["gain"] = gain
        batch.append(frame)
    if batch:
        write_structures(folder.batch, batch)
    scores = evaluated.scores[workshop.config.stopping.monitor]
    indices = [index for index, _ in chosen]
    results: dict[str, Any] = {"selected": len(batch), "sigma_batch": _mean(scores[indices])}
    if workshop.config.exploration.pool_files:
        results["sigma_pool"] = _mean(np.delete(scores, indices))
    return results


def _selection_scalars(workshop: Workshop, round_index: int) -> dict[str, float]:
    """What the selector asks of the campaign so far, from the force errors on the structures kept for validation."""
    settings = workshop.config.selection.selector
    if adaptive_part(settings) is None:
        return {}
    files = [workshop.run.round(n).potential / "potential.json" for n in range(round_index + 1)]
    errors = []
    for file in files:
        with understood(file):
            errors.append(validation_error(read_json(file)["metadata"]))
    return selection_scalars(settings, errors)


def _costs(workshop: Workshop, frames: Sequence[Atoms]) -> np.ndarray | None:
    """Expected cost of each label, where the selector asks for it."""
    exponent = workshop.config.selection.selector.cost_exponent
    return None if exponent is None else expected_costs(frames, paid_labels(workshop.store), exponent)


def _allowed(workshop: Workshop) -> int:
    budget = workshop.config.stopping.max_labels
    batch = workshop.config.selection.batch
    return batch if budget is None else max(0, min(batch, budget - workshop.labels))


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values, dtype=np.float64)) if len(values) else None


# -------------------------------------------------------------------------------------------------------------- label


def label(workshop: Workshop, round_index: int) -> Results:
    """Labels the batch and writes the dataset of the next round: the present one, and what got a label.

    Raises:
        LabelError: nothing of the batch could be labelled.
    """
    folder, following = workshop.run.round(round_index), workshop.run.round(round_index + 1).create()
    batch = read_structures(folder.batch) if folder.batch.exists() else []
    drawn = read_structures(folder.drawn) if folder.drawn.exists() else []
    folder.labelled.unlink(missing_ok=True)
    results = _label_frames(workshop, round_index, batch, drawn)
    _keep_calibration(workshop, folder, results[len(batch) :])
    results = results[: len(batch)]
    labelled = [_with_label_id(result) for result in results if result.atoms is not None]
    failed = [result.error for result in results if result.atoms is None]
    if failed and not labelled:
        raise LabelError(
            f"none of the {len(batch)} structures of round {round_index} could be labelled, the first because: "
            f"{failed[0]}. Correct the cause and resume: they are tried again."
        )
    if failed:
        workshop.progress.message(f"{len(failed)} of {len(batch)} labels failed, the first because: {failed[0]}")
    if labelled:
        write_structures(folder.labelled, labelled)
        labelled = read_structures(folder.labelled, require_labels=True)
    grown = [*workshop.dataset(round_index), *(_training_frame(frame, round_index + 1) for frame in labelled)]
    write_structures(following.dataset, grown)
    return {"failed": len(failed)}


def _label_frames(
    workshop: Workshop, round_index: int, batch: Sequence[Atoms], drawn: Sequence[Atoms]
) -> list[LabelResult]:
    """Labels of a batch, and of the frames drawn for the thresholds after it."""
    frames = [*batch, *drawn]
    if not frames:
        return []
    known = sum(workshop.labeller.identity(frame) in workshop.store for frame in frames)
    common = {"campaign": workshop.config.name, "round": round_index}
    selector, monitor = workshop.config.selection.selector.kind, workshop.config.stopping.monitor
    provenance = []
    for place, frame in enumerate(frames):
        of_frame = {key: frame.info[key] for key in ("walker", "step", "pool_index", "gain") if key in frame.info}
        if place < len(batch):
            of_frame |= {"purpose": "train", "selector": selector, "score": frame.info.get(monitor)}
        else:
            of_frame |= {"purpose": "calibration", "selector": "random"}
        provenance.append({**common, **of_frame})
    with workshop.progress.stage("label", len(frames), unit="labels") as advance:
        advance(known)
        return workshop.labeller.label(frames, provenance, on_label=lambda _: advance(1))


def _keep_calibration(workshop: Workshop, folder: RoundDirectory, results: Sequence[LabelResult]) -> None:
    """Writes the labelled frames that were drawn at random; those without a label are reported."""
    folder.calibration.unlink(missing_ok=True)
    labelled = [_with_label_id(result) for result in results if result.atoms is not None]
    failed = [result.error for result in results if result.atoms is None]
    if failed:
        workshop.progress.message(f"{len(failed)} of {len(results)} labels for thresholds failed, first: {failed[0]}")
    if labelled:
        write_structures(folder.calibration, labelled)


def _with_label_id(result: LabelResult) -> Atoms:
    assert result.atoms is not None
    result.atoms.info["label_id"] = result.identity
    return result.atoms


def _training_frame(labelled: Atoms, round_index: int) -> Atoms:
    """A labelled structure without what was noted during its exploration."""
    frame = carried(labelled)
    kept = ("charge", "spin", "label_id", "walker", "step", "pool_index")
    frame.info = {key: labelled.info[key] for key in kept if key in labelled.info}
    frame.info.update(origin="pool" if "pool_index" in labelled.info else "exploration", round=round_index)
    frame.calc = labelled.calc
    return frame
