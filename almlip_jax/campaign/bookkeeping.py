"""The label store and the count of paid calls held against each other: a store that lost rows costs no budget twice.

The state knows the calls of a stage while it runs, too: it is written whenever labels have gone into the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ase import Atoms

from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.state import CampaignState
from almlip_jax.oracles import Label, LabelStore
from almlip_jax.structures.io import read_structures
from almlip_jax.targets import further_targets


def missing_calls(store: LabelStore, state: CampaignState) -> tuple[int, int]:
    """Calls of the label source that the state has counted and the store does not know.

    Those known to be missing do not count.

    Returns:
        how many without those of the test set, and how many of the test set.
    """
    missing = state.labels - state.lost_calls - store.count_calls()
    missing_test = state.test_calls - state.lost_test_calls - store.count_test_calls()
    return max(0, missing), max(0, missing_test)


def take_stock(store: LabelStore, run: RunDirectory, campaign: str, state: CampaignState) -> tuple[CampaignState, str]:
    """Fills a store that lost rows from the files of a run; what is in none of them still counts.

    Args:
        store: open for writing.
        run: the run directory.
        campaign: its name.
        state: where it stands.

    Returns:
        the state, which knows the calls that are lost, and what to tell the user; empty where the store is whole.
    """
    missing = sum(missing_calls(store, state))
    if not missing:
        return state, ""
    restored = restore_rows(store, run, campaign)
    lost, lost_test = missing_calls(store, state)
    update = {"lost_calls": state.lost_calls + lost, "lost_test_calls": state.lost_test_calls + lost_test}
    said = (
        f"{run.labels} was removed or replaced: {missing} label-source calls are not in it; {restored} labels were "
        f"taken from the files of the run, and {lost + lost_test} calls that are in none of them still count."
    )
    return state.model_copy(update=update), said


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
        known = ("round", "origin", "system", "walker", "step", "pool_index")
        given |= {key: frame.info[key] for key in known if key in frame.info}
        further = {one.label: results[one.label] for one in further_targets() if one.label in results}
        label = Label(identity, float(results["energy"]), results["forces"], results.get("stress"), further=further)
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
