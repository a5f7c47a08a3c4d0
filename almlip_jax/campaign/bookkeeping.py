"""The label store and the count of paid calls held against each other: a store that lost rows costs no budget twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ase import Atoms

from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.oracles import Label, LabelStore
from almlip_jax.structures.io import read_structures


def missing_calls(store: LabelStore, counted: int, lost: int) -> int:
    """Calls of the label source that the state has counted and the store does not know.

    Args:
        store: the label store.
        counted: calls by the state, without those of the test set.
        lost: calls among them that are known to be missing from the store.
    """
    return max(0, counted - lost - store.count_calls())


def restore_rows(store: LabelStore, run: RunDirectory, campaign: str) -> int:
    """Writes rows for the labels in the files of a run that the store does not hold; returns how many.

    What never went into a file (failed labels, steps of dynamics that no frame was kept of) cannot be restored.

    Args:
        store: open for writing.
        run: the run directory.
        campaign: its name.
    """
    entries = []
    for frame, purpose in _labelled_frames(run):
        identity = str(frame.info.get("label_id", ""))
        results = {} if frame.calc is None else frame.calc.results
        if not identity or "energy" not in results or "forces" not in results or identity in store:
            continue
        given: dict[str, Any] = {"purpose": purpose, "campaign": campaign, "restored": True}
        known = ("round", "origin", "walker", "step", "pool_index")
        given |= {key: frame.info[key] for key in known if key in frame.info}
        label = Label(identity, float(results["energy"]), results["forces"], results.get("stress"))
        entries.append((frame, _plain(given), label))
    store.record(entries)
    return len({entry[2].identity for entry in entries})


def _labelled_frames(run: RunDirectory) -> Iterator[tuple[Atoms, str]]:
    """The labelled structures in the files of a run, with what they were labelled for."""
    datasets = [folder.dataset for folder in run.rounds() if folder.dataset.exists()]
    for path in datasets[-1:]:  # each holds those before
        for frame in read_structures(path):
            yield frame, "train" if frame.info.get("round", 0) else "initial"
    for path in [folder.labelled for folder in run.rounds() if folder.labelled.exists()]:
        yield from ((frame, "train") for frame in read_structures(path))
    for path in [folder.calibration for folder in run.rounds() if folder.calibration.exists()]:
        yield from ((frame, "calibration") for frame in read_structures(path))
    if run.test.exists():
        yield from ((frame, "test") for frame in read_structures(run.test))


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.item() if hasattr(value, "item") else value for key, value in given.items()}
