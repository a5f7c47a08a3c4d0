"""The label store keeps every bit, every failure and every intent, and says what is wrong in a sentence."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ase.db
import ase.db.sqlite
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from almlip_jax.errors import InputError
from almlip_jax.oracles import Label, LabelStore, StorageError
from almlip_jax.oracles.spool import Reservation, label_from_json, label_to_json

Waters = Callable[..., list[Atoms]]


def _label(identity: str, atoms: Atoms, seed: int = 0, stress: bool = False) -> Label:
    generator = np.random.default_rng(seed)
    return Label(
        identity,
        float(-1e4 / 3 * generator.random()),
        generator.normal(size=(len(atoms), 3)),
        generator.normal(size=6) if stress else None,
        seconds=0.5,
    )


def _same(left: Label, right: Label) -> bool:
    def equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
        return (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))

    same_arrays = equal(left.forces, right.forces) and equal(left.stress, right.stress)
    return same_arrays and (left.energy, left.error, left.identity) == (right.energy, right.error, right.identity)


def test_every_bit_survives(tmp_path: Path) -> None:
    crystal = bulk("Si", cubic=True)
    crystal.rattle(0.1, seed=1)
    crystal.info.update(charge=-1, spin=2)
    label = _label("a" * 64, crystal, stress=True)
    with LabelStore(tmp_path / "labels.db") as store:
        store.intend([(label.identity, crystal, {"purpose": "train", "score": np.float32(0.1), "round": 3})])
        store.land([label])
    with LabelStore(tmp_path / "labels.db", readonly=True) as store:
        stored = store.stored(label.identity)
    assert _same(stored.label, label)
    np.testing.assert_array_equal(stored.atoms.positions, crystal.positions)
    np.testing.assert_array_equal(stored.atoms.cell.array, crystal.cell.array)
    assert stored.atoms.info == {"charge": -1, "spin": 2} and stored.atoms.pbc.all()
    assert stored.atoms.get_potential_energy() == label.energy
    np.testing.assert_array_equal(stored.atoms.get_stress(), label.stress)
    assert stored.provenance == {"purpose": "train", "score": float(np.float32(0.1)), "round": 3}


def test_json_keeps_every_bit(waters: Waters) -> None:
    label = _label("b", waters(1)[0], stress=True)
    assert _same(label_from_json(label_to_json(label)), label)


def test_rows_stand_in_the_order_of_requests_and_an_intent_is_no_label(waters: Waters, tmp_path: Path) -> None:
    frames = waters(3)
    with LabelStore(tmp_path / "labels.db") as store:
        store.intend([(name, frame, {"purpose": "train"}) for name, frame in zip("cab", frames, strict=True)])
        assert "c" not in store and store.get("c") is None and store.count_calls() == 0
        store.land([_label("b", frames[2]), Label("a", error="it broke")])
        store.land([_label("c", frames[0])])
        assert [row.label.identity for row in store.labelled()] == ["c", "b"]
        failed = list(store.labelled(failed=True))
        assert [row.label.error for row in failed] == ["it broke"] and failed[0].atoms.calc is None


def test_a_label_that_is_there_stays(waters: Waters, tmp_path: Path) -> None:
    (frame,) = waters(1)
    first, second = _label("a", frame, 1), _label("a", frame, 2)
    with LabelStore(tmp_path / "labels.db") as store:
        store.intend([("a", frame, {"purpose": "train"})] * 2)
        store.land([first])
        store.land([second])
        store.record([(frame, {"purpose": "test"}, second)])
        assert _same(store.stored("a").label, first) and store.count_calls() == 1


def test_calls_are_counted_by_purpose_with_failures_and_retries(waters: Waters, tmp_path: Path) -> None:
    frames = waters(5)
    with LabelStore(tmp_path / "labels.db") as store:
        purposes = ["initial", "train", "train", "test", "train"]
        store.intend([(str(n), f, {"purpose": p}) for n, (f, p) in enumerate(zip(frames, purposes, strict=True))])
        store.land([_label("0", frames[0]), Label("1", error="x", calls=3), _label("2", frames[2])])
        store.land([_label("3", frames[3])])
        assert store.count_calls() == 5 and store.count_calls(None) == 6 and store.count_calls("train") == 2
        assert store.summary()["train"] == dict(done=1, failed=1, pending=1, calls=4, cut_off=0, seconds=0.5)
        assert store.reopen_failed() == 1 and store.count_calls() == 5
        store.land([_label("1", frames[1])])
        assert store.count_calls() == 6
    with LabelStore(tmp_path / "labels.db", readonly=True) as store:
        assert store.count_calls() == 6 and store.count_calls(None) == 7


@pytest.mark.parametrize("moment", ["before", "while it is written"])
def test_a_label_outlives_that_its_reservation_is_cleared_away(tmp_path: Path, monkeypatch, moment: str) -> None:
    """As by a store that is opened on another machine while the label is calculated, or handed over."""
    reservation = Reservation(tmp_path, "a", 3)
    label, replace = Label("a", -1.0, np.zeros((3, 3))), os.replace

    def cleared(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        reservation.give_back()
        replace(source, target)

    if moment == "before":
        reservation.give_back()
    else:
        monkeypatch.setattr(os, "replace", cleared)
    reservation.hand_over(label)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert label_from_json(json.loads((tmp_path / "a.json").read_text())).energy == -1.0


def test_what_lies_in_the_spool_is_taken_in(waters: Waters, tmp_path: Path) -> None:
    frames = waters(2)
    labels = [_label(name, frame) for name, frame in zip("ab", frames, strict=True)]
    with LabelStore(tmp_path / "labels.db") as store:
        store.intend([(name, frame, {"purpose": "train"}) for name, frame in zip("ab", frames, strict=True)])
        for label in labels:
            Reservation(store.spool, label.identity, 3).hand_over(label)
        Reservation(store.spool, "c", 3)
        (store.spool / "b.json").write_text('{"identity": "b", "ener')
    with LabelStore(tmp_path / "labels.db") as store:
        assert _same(store.stored("a").label, labels[0]) and "b" not in store
        assert not list(store.spool.glob("*.json"))


def test_it_is_an_ase_database(waters: Waters, tmp_path: Path) -> None:
    (frame,) = waters(1)
    with LabelStore(tmp_path / "labels.db") as store:
        store.intend([("a", frame, {"purpose": "train", "round": 2})])
        store.land([_label("a", frame)])
        assert [row.label.identity for row in store.select(round=2)] == ["a"]
    row = ase.db.connect(tmp_path / "labels.db").get(purpose="train", round=2, status="done")
    assert row.formula == "H2O" and row.toatoms().get_forces().shape == (3, 3)


def test_one_writer_and_any_number_of_readers(tmp_path: Path) -> None:
    code = "import sys; from almlip_jax.oracles import LabelStore; LabelStore(sys.argv[1])"
    with LabelStore(tmp_path / "labels.db"):
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "labels.db")], capture_output=True, text=True
        )
        assert "another process is writing" in other.stderr
        LabelStore(tmp_path / "labels.db", readonly=True).close()
    LabelStore(tmp_path / "labels.db").close()


def test_reading_only_means_it(waters: Waters, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no label store"):
        LabelStore(tmp_path / "labels.db", readonly=True)
    LabelStore(tmp_path / "labels.db").close()
    with LabelStore(tmp_path / "labels.db", readonly=True) as store, pytest.raises(StorageError, match="reading only"):
        store.intend([("a", waters(1)[0], {"purpose": "train"})])


@pytest.mark.parametrize("tables", [0, 1, 4])
def test_a_store_whose_making_was_cut_off_is_made_anew(waters: Waters, tmp_path: Path, tables: int) -> None:
    path = tmp_path / "labels.db"
    path.touch()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in ase.db.sqlite.init_statements[:tables]:
            connection.execute(statement)
        connection.commit()
    (tmp_path / "labels.db-journal").write_bytes(b"left behind")
    with pytest.raises(StorageError, match="holds nothing yet"):
        LabelStore(path, readonly=True)
    with LabelStore(path) as store:
        store.intend([("a", waters(1)[0], {"purpose": "train"})])
        store.land([_label("a", waters(1)[0])])
    with LabelStore(path) as store:
        assert "a" in store
    assert {file.name for file in tmp_path.iterdir()} == {"labels.db", "labels.db.spool"}


def test_a_full_disk_leaves_no_half_made_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def small(*arguments: object, **options: object) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        connection.execute("PRAGMA max_page_count = 3")
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", small)
        with pytest.raises(StorageError, match="disk is full"):
            LabelStore(tmp_path / "labels.db")
    assert {file.name for file in tmp_path.iterdir()} == {"labels.db.spool"}
    LabelStore(tmp_path / "labels.db").close()


@pytest.mark.parametrize(
    "column, value",
    [
        ("key_value_pairs", "{"),
        ("key_value_pairs", "[1]"),
        ("key_value_pairs", '{"status": "done"}'),
        ("key_value_pairs", '{"status": "asleep", "purpose": "train", "calls": 1, "seconds": 0}'),
        ("data", b"\x01"),
        ("positions", b"\x01"),
        ("forces", b"\x00" * 8),
    ],
)
def test_a_damaged_row_is_one_sentence(waters: Waters, tmp_path: Path, column: str, value: str | bytes) -> None:
    path = tmp_path / "labels.db"
    with LabelStore(path) as store:
        store.intend([("a", waters(1)[0], {"purpose": "train"})])
        store.land([_label("a", waters(1)[0])])
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"UPDATE systems SET {column} = ?", (value,))
        connection.commit()
    with pytest.raises(StorageError, match=r"row.* of the label store .*labels\.db is damaged"):
        with LabelStore(path, readonly=True) as store:
            list(store.labelled())


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"\xff", b'{"identity": "a"}', b'{"identity": {}, "energy": 1}', b'"a"', b"null"]
    + [
        json.dumps(dict(identity="a", energy=e, forces=f, stress=None, error=None, seconds=0, calls=1)).encode()
        for e, f in ((None, None), (1.0, [[0, 0, 0]]), ({}, [[0, 0, 0]] * 3), (1.0, [[[0]]]))
    ],
)
def test_what_is_no_result_in_the_spool_is_put_aside(waters: Waters, tmp_path: Path, content: bytes) -> None:
    with LabelStore(tmp_path / "labels.db") as store:
        store.intend([("a", waters(1)[0], {"purpose": "train"})])
        (store.spool / "a.json").write_bytes(content)
        (store.spool / "notes.part").write_text("no reservation")
    with LabelStore(tmp_path / "labels.db") as store:
        assert "a" not in store and [file.name for file in store.spool.glob("a.*")] == ["a.damaged"]


def test_damaged_store_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "labels.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(InputError, match=r"labels\.db is damaged.*restore a copy"):
        LabelStore(tmp_path / "labels.db")
    (tmp_path / "labels.db").unlink()
    LabelStore(tmp_path / "labels.db").close()  # the lock of the failed attempt is gone


@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_a_store_that_is_gone_while_in_use_is_not_made_anew(waters: Waters, tmp_path: Path, how: str) -> None:
    """SQLite would make an empty file, into which later rows go while the earlier ones are missing."""
    path, frames, told = tmp_path / "labels.db", waters(3), []
    with LabelStore(path) as store:
        store.watch(lambda: told.append(store.count_calls()))
        requests = [(str(n), frame, {"purpose": "train"}) for n, frame in enumerate(frames)]
        store.intend(requests[:2])
        store.land([_label("0", frames[0], 0)])
        assert told == [0, 1]
        path.unlink() if how == "removed" else path.write_bytes(b"")
        for use in (
            lambda: store.intend(requests),
            lambda: store.land([_label("1", frames[1], 1)]),
            lambda: store.stored("0"),
            lambda: store.select(purpose="train"),
        ):
            with pytest.raises(StorageError, match=r"labels\.db was removed or emptied while it was in use; put it"):
                use()
        assert told == [0, 1] and (not path.exists() or path.stat().st_size == 0)


def test_any_other_ase_database_is_refused(waters: Waters, tmp_path: Path) -> None:
    ase.db.connect(tmp_path / "other.db").write(waters(1)[0])
    with pytest.raises(StorageError, match="is an ASE database but not a label store"):
        LabelStore(tmp_path / "other.db")


def test_full_disk_loses_nothing(waters: Waters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = waters(400)
    labels = [_label(str(n), frame, n) for n, frame in enumerate(frames)]
    requests = [(str(n), frame, {"purpose": "train"}) for n, frame in enumerate(frames)]
    connect = sqlite3.connect

    def small(*arguments: object, **options: object) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        connection.execute("PRAGMA max_page_count = 60")
        return connection

    with LabelStore(tmp_path / "labels.db") as store:
        store.intend(requests[:10])
        for label in labels[:10]:
            Reservation(store.spool, label.identity, 3).hand_over(label)
        monkeypatch.setattr(sqlite3, "connect", small)
        with pytest.raises(StorageError, match="disk is full.*free some space and resume"):
            store.intend(requests[10:])
        monkeypatch.undo()
        store.intend(requests[10:20])  # the same store goes on when there is space again
    with LabelStore(tmp_path / "labels.db") as store:
        for label in labels[:10]:
            assert _same(store.stored(label.identity).label, label)
        assert store.summary()["train"]["pending"] == 10
