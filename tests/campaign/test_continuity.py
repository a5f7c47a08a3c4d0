"""What a campaign goes on from has to be what it left: its settings, its label source, its files, its label store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_campaign import Killed, KillingProgress, result_of, run_or_resume, tiny_config

from almlip_jax.campaign import Outcome, bookkeeping, resume_campaign
from almlip_jax.campaign.bookkeeping import restore_rows
from almlip_jax.campaign.config import load_run_config
from almlip_jax.campaign.continuity import with_earlier_defaults
from almlip_jax.campaign.loop import Campaign
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.state import read_state
from almlip_jax.errors import InputError
from almlip_jax.files import read_json, write_json
from almlip_jax.oracles import LabelStore, TBLiteSettings
from almlip_jax.progress import SilentProgress

pytestmark = pytest.mark.usefixtures("compile_once")

Edit = Callable[[Any], None]

MD = {"temperature": 300, "steps": 4, "every": 2}


class Notes(SilentProgress):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def run(reference: Path, tmp_path: Path) -> RunDirectory:
    """A copy of the finished tiny campaign."""
    shutil.copytree(reference / "run", tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def edited(path: Path, edit: Edit) -> None:
    data = yaml.safe_load(path.read_text())
    edit(data)
    path.write_text(yaml.safe_dump(data, sort_keys=False))


def from_disk(run: RunDirectory, *overrides: str, notes: Notes | None = None, **options: Any) -> Outcome:
    """Goes on as the command line does."""
    return resume_campaign(load_run_config(run.path, overrides), run.path, progress=notes, **options)


def forget(run: RunDirectory) -> None:
    """Makes the state one of an earlier version, which remembered nothing."""
    state = read_json(run.state)
    for name in ("settled", "files", "lost_calls"):
        del state[name]
    write_json(run.state, state)


@pytest.mark.parametrize("old", [False, True], ids=["", "of-an-earlier-version"])
def test_another_label_source_is_refused(run: RunDirectory, old: bool) -> None:
    if old:
        forget(run)
    before = result_of(run.path)
    with pytest.raises(InputError, match=r"label source differs.*oracle\.method.*--accept-changes"):
        from_disk(run, "oracle.method=GFN1-xTB")
    assert from_disk(run, "oracle.timeout=99", "executor.workers=2").finished  # these change no label
    assert result_of(run.path) == before
    assert from_disk(run, "oracle.method=GFN1-xTB", accept_changes=True).finished
    with pytest.raises(InputError, match=r"oracle\.method"):  # what was accepted is now what has to stay
        from_disk(run, "oracle.method=GFN2-xTB")


def test_a_config_edited_by_hand_does_not_pass_unseen(run: RunDirectory) -> None:
    whole = run.config.read_text()
    for edit, name in (
        (lambda data: data.update(seed=8), "'seed'"),
        (lambda data: data["model"].update(channels=5), "'model'"),
        (lambda data: data["oracle"].update(method="GFN1-xTB"), r"oracle\.method"),
    ):
        edited(run.config, edit)
        with pytest.raises(InputError, match=f"{name}.*what the campaign began with|differs.*{name}"):
            from_disk(run)
        run.config.write_text(whole)
    edited(run.config, lambda data: data["stopping"].update(max_labels=500))
    notes = Notes()
    assert from_disk(run, notes=notes).finished
    assert any("config.yaml is not what the campaign last ran with" in text for text in notes.said)
    again = Notes()
    from_disk(run, notes=again)
    assert not again.said


def test_files_edited_by_hand_are_refused(run: RunDirectory) -> None:
    last = run.round(2).dataset
    text = last.read_text()
    last.write_text(text.replace("energy=-1", "energy=-2", 1))
    with pytest.raises(InputError, match=r"rounds/002/dataset\.extxyz .*has changed since.*--accept-changes"):
        from_disk(run)
    assert from_disk(run, accept_changes=True).finished
    assert from_disk(run).finished
    last.unlink()
    with pytest.raises(InputError, match=r"rounds/002/dataset\.extxyz .*is missing"):
        from_disk(run)


def test_a_run_of_an_earlier_version_goes_on_and_remembers_from_then_on(run: RunDirectory) -> None:
    forget(run)
    before = result_of(run.path)
    notes = Notes()
    assert from_disk(run, notes=notes).finished and not notes.said
    assert result_of(run.path) == before
    assert read_state(run).settled["seed"] == 7


def test_another_version_of_the_label_source_is_told(run: RunDirectory) -> None:
    state = read_json(run.state)
    state["settled"]["oracle_version"] = "tblite 0.1"
    write_json(run.state, state)
    notes = Notes()
    assert from_disk(run, notes=notes).finished
    assert any("earlier labels are of tblite 0.1" in text for text in notes.said)


def test_other_code_that_labels_are_bound_to_is_refused(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TBLiteSettings, "version_binds", True)
    monkeypatch.setattr(TBLiteSettings, "version", lambda self: "other code")
    with pytest.raises(InputError, match="is now version other code.*--accept-changes"):
        from_disk(run)
    assert from_disk(run, accept_changes=True).finished
    assert from_disk(run).finished  # what is accepted once is


def test_keys_that_a_run_did_not_know_mean_what_held_then() -> None:
    old = {"oracle": {"kind": "ase", "calculator": "a:B"}}
    assert with_earlier_defaults(old)["oracle"]["force_consistent"] is False
    new = {"oracle": {"kind": "ase", "force_consistent": True}}
    assert with_earlier_defaults(new) == new
    assert with_earlier_defaults({"oracle": {"kind": "tblite"}}) == {"oracle": {"kind": "tblite"}}


@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_a_store_that_is_gone_costs_no_budget_twice(run: RunDirectory, how: str) -> None:
    before = result_of(run.path)
    calls = before["metrics"][-1]["labels"]
    if how == "removed":
        shutil.rmtree(run.labels.with_name("labels.db.spool"))
        run.labels.unlink()
    else:
        run.labels.write_bytes(b"")
    notes = Notes()
    outcome = from_disk(run, notes=notes)
    assert outcome.finished and outcome.labels == calls
    assert any("labels.db was removed or replaced" in text for text in notes.said)
    known = {identity: energy for identity, _, energy in before["labels"]}
    with LabelStore(run.labels, readonly=True) as store:
        rows = {row.label.identity: row.label.energy for row in store.labelled()}
        state = read_state(run)
        assert store.count_calls() + state.lost_calls == calls
        assert store.count_test_calls() + state.lost_test_calls == before["metrics"][-1]["test_calls"]
    # all that went into a file is there again, to the last bit
    files = [*run.round(2).dataset.read_text().split(), *run.test.read_text().split()]
    named = {word.partition("=")[2].strip('"') for word in files if word.startswith("label_id=")}
    assert set(rows) == named and all(known[identity] == energy for identity, energy in rows.items())
    again = Notes()
    assert from_disk(run, notes=again).labels == calls and not again.said
    # with the budget spent, nothing more is asked for
    assert from_disk(run, f"stopping.max_labels={calls}", "stopping.max_rounds=9").rule == "max_labels"


def test_a_kill_while_labels_are_restored_loses_no_call(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = read_state(run).labels
    run.labels.unlink()
    shutil.rmtree(run.labels.with_name("labels.db.spool"))

    def killed(*given: Any) -> int:
        restore_rows(*given)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(bookkeeping, "restore_rows", killed)
        from_disk(run)
    assert read_state(run).labels == calls
    assert from_disk(run).labels == calls


@pytest.mark.usefixtures("labels_here")
@pytest.mark.parametrize("name", ["initial set", "test set"])
def test_a_store_removed_after_a_kill_in_the_first_stages_still_counts(tmp_path: Path, name: str) -> None:
    """Nothing of these stages is in a file yet, nor has the state moved on: the calls were counted as they landed."""
    run = RunDirectory(tmp_path / "run")
    sections = {"initial": {"rattle": {"count": 3, "stdev": 0.05}, "md": ()}, "test": {"md": [MD, {**MD, "steps": 5}]}}
    with pytest.raises(Killed):
        run_or_resume(tmp_path, run.path, KillingProgress(None, name, within=True), **sections)
    state = read_state(run)
    assert state.stage == name.split()[0]
    with LabelStore(run.labels, readonly=True) as store:
        paid = store.count_calls(), store.count_test_calls()
    assert (state.labels, state.test_calls) == paid and sum(paid) > 0
    shutil.rmtree(run.labels.with_name("labels.db.spool"))
    run.labels.unlink()
    notes = Notes()
    campaign = Campaign(tiny_config(tmp_path, **sections), run, notes)
    try:
        campaign.take_stock()
    finally:
        campaign.close()
    assert any("labels.db was removed or replaced" in text for text in notes.said)
    assert (read_state(run).labels, read_state(run).test_calls) == paid
    assert tuple(campaign.calls().values()) == paid


def test_results_do_not_depend_on_what_is_remembered(reference: Path, tmp_path: Path) -> None:
    state = read_json(reference / "run" / "state.json")
    assert set(state["files"]) == {
        "config.yaml",
        "test.extxyz",
        *(f"rounds/{n:03d}/dataset.extxyz" for n in range(3)),
        *(f"rounds/{n:03d}/batch.extxyz" for n in range(2)),
    }
    assert json.loads(json.dumps(state["settled"])) == state["settled"]
    assert state["settled"]["oracle"] == tiny_config(reference).oracle.model_dump(mode="json")
    assert run_or_resume(reference, reference / "run").finished
