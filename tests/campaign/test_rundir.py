"""The run directory: places, atomic writes, readable errors, one process at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from almlip_jax import files, work_directory
from almlip_jax.campaign.latest import point_to
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.status import campaign_status
from almlip_jax.errors import InputError


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run").create()


def partials(run: RunDirectory) -> list[Path]:
    return list(run.path.rglob(".*.partial*"))


# ---------------------------------------------------------------------------------------------------------- places


def test_rounds_are_listed_in_numeric_order_and_nothing_else_is(run: RunDirectory) -> None:
    for name in ("002", "000", "1000", "010", "junk", "07"):
        (run.rounds_folder / name).mkdir()
    (run.rounds_folder / "011").write_text("a file, not a folder")
    assert [place.index for place in run.rounds()] == [0, 2, 10, 1000]
    assert run.rounds()[1].pool == run.path / "rounds" / "002" / "pool.extxyz"
    assert run.round(3).trajectory(12) == run.path / "rounds" / "003" / "walkers" / "012.extxyz"


def test_a_string_is_a_path_and_an_absent_directory_has_no_rounds(tmp_path: Path) -> None:
    absent = RunDirectory(str(tmp_path / "nowhere"))
    assert absent.rounds() == []
    with pytest.raises(InputError, match="there is no run directory"):
        absent.require()
    with pytest.raises(InputError, match="holds no campaign"):
        RunDirectory(tmp_path).require()


def test_looking_at_a_run_does_not_wait_for_jax() -> None:
    code = "import sys\n"
    for module in ("campaign.rundir", "progress", "campaign.status"):
        code += f"import almlip_jax.{module}\nprint('{module}', 'jax' in sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["campaign.rundir", "False", "progress", "False", "campaign.status", "False"], done


# --------------------------------------------------------------------------------------------------------- writing


def test_json_becomes_plain_and_valid(run: RunDirectory) -> None:
    files.write_json(run.state, {"a": np.float32(1.5), "b": np.arange(3), "nan": float("nan"), "p": Path("x"), 3: None})
    assert files.read_json(run.state) == {"a": 1.5, "b": [0, 1, 2], "nan": None, "p": "x", "3": None}


def test_csv_round_trip_is_exact(run: RunDirectory) -> None:
    rows = [
        {"round": 0, "forces_rmse_300K": 0.1 + 0.2, "reason": 'a "b", c\nd', "ok": True, "none": None},
        {"round": np.int64(1), "forces_rmse_300K": np.float32(0.1), "ok": np.bool_(False), "late": float("inf")},
    ]
    files.write_csv(run.metrics, rows)
    back = files.read_csv(run.metrics)
    assert back[0] == {**rows[0], "late": None}
    assert back[1]["forces_rmse_300K"] == float(np.float32(0.1))
    assert (back[1]["round"], back[1]["ok"], back[1]["reason"], back[1]["late"]) == (1, False, None, float("inf"))


def test_npz_round_trip_with_strings_and_awkward_names(run: RunDirectory) -> None:
    arrays = {"file": np.eye(2), "group": np.array(["300K", "600K"]), "nan": np.full(3, np.nan), "scalar": 0.5}
    files.write_npz(run.round(0).walkers, arrays)
    back = files.read_npz(run.round(0).walkers)
    assert list(back) == list(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(back[name], np.asarray(value))
    first = run.round(0).walkers.read_bytes()
    files.write_npz(run.round(0).walkers, arrays)
    assert run.round(0).walkers.read_bytes() == first, "equal arrays must give equal files"
    with pytest.raises(TypeError, match="'bad'"):
        files.write_npz(run.round(0).walkers, {"bad": np.array([None])})


@pytest.mark.parametrize("crash", ["write", "rename", "flush"])
def test_a_failure_between_temporary_file_and_rename_leaves_the_old_file(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    files.write_json(run.state, {"round": 1})

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if crash == "rename":
        monkeypatch.setattr(files.os, "replace", broken)
    elif crash == "flush":
        monkeypatch.setattr(files.os, "fsync", broken)
    else:
        monkeypatch.setattr(Path, "write_text", broken)
    with pytest.raises(InputError, match=r"state\.json: the disk is full; free some space") as error:
        files.write_json(run.state, {"round": 2})
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert files.read_json(run.state) == {"round": 1}
    assert partials(run) == []


def test_a_kill_before_the_rename_leaves_the_old_file_and_a_leftover_that_the_next_lock_removes(
    run: RunDirectory,
) -> None:
    files.write_json(run.state, {"round": 1})
    script = f"""
        import os, signal
        from pathlib import Path
        from almlip_jax import files
        files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        files.write_json(Path({str(run.state)!r}), {{"round": 2}})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)])
    assert done.returncode == -signal.SIGKILL
    assert files.read_json(run.state) == {"round": 1}
    half = run.round(0).path / "potential" / ".params-0123456789abcdef.4194304.partial.orbax-checkpoint-tmp"
    half.mkdir(parents=True)  # of a potential that was being saved
    (half / "d").write_text("half")
    assert len(partials(run)) == 2
    mine = run.path / f".report.{os.getpid()}.partial.html"
    mine.write_text("of a live process")
    with run.lock():
        assert partials(run) == [mine]


def test_other_errors_of_the_system_are_one_sentence(run: RunDirectory) -> None:
    run.state.mkdir()  # a folder in the place of the file
    with pytest.raises(InputError, match=r"^cannot write .*state\.json: .*\.$"):
        files.write_json(run.state, {})
    (run.path / "blocked").write_text("")
    with pytest.raises(InputError, match=r"^cannot write .*\.$"):
        RunDirectory(run.path / "blocked" / "run").create()


# --------------------------------------------------------------------------------------------------------- reading


def test_missing_files_are_named(run: RunDirectory) -> None:
    for read, path in [
        (files.read_json, run.state),
        (files.read_csv, run.metrics),
        (files.read_npz, run.round(0).walkers),
    ]:
        with pytest.raises(InputError, match=f"{path.name} is missing"):
            read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"round": 1,\n "sta', "line 2"),
        (b"[1, 2]", "not a JSON object"),
        (b"\xff\xfe", "not a text file"),
        (b"", "JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"1" * 10_000, "not valid JSON"),
    ],
)
def test_damaged_json(run: RunDirectory, content: bytes, message: str) -> None:
    run.state.write_bytes(content)
    with pytest.raises(InputError, match=rf"cannot read .*state\.json: .*{message}"):
        files.read_json(run.state)


@pytest.mark.parametrize(("content", "message"), [("", "no header"), ("a,b\n1\n", "line 2"), ("a\n1,2\n", "line 2")])
def test_damaged_csv(run: RunDirectory, content: str, message: str) -> None:
    run.metrics.write_text(content)
    with pytest.raises(InputError, match=rf"metrics\.csv: .*{message}"):
        files.read_csv(run.metrics)


def test_damaged_npz(run: RunDirectory) -> None:
    path = run.round(0).walkers
    files.write_npz(path, {"a": np.random.default_rng(0).normal(size=1000)})
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (b"", b"not an archive", whole[: len(whole) // 2], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"walkers\.npz: not a readable npz"):
            files.read_npz(path)


def test_content_that_is_not_understood_is_one_sentence_with_the_file(run: RunDirectory) -> None:
    with pytest.raises(InputError, match=r"cannot read .*state\.json: .*KeyError: 'status'.*restore the file"):
        with files.understood(run.state):
            {}["status"]
    with pytest.raises(InputError, match="as it is"), files.understood(run.state):
        raise InputError("a sentence stays as it is")


def test_foreign_traces_of_walkers_are_named_by_the_status(run: RunDirectory) -> None:
    files.write_npz(run.round(0).create().walkers, {"a": np.zeros(3)})
    with pytest.raises(InputError, match=r"cannot read .*walkers\.npz"):
        campaign_status(run.path)


# ------------------------------------------------------------------------------------------------ the newest potential


def test_the_link_leads_to_the_newest_potential(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a copy that followed it; a folder of the user's stays; a file says it where there are no links."""
    places = [run.round(0).potential, run.final.potential]
    for number, place in enumerate(places):
        files.write_json(place / "potential.json", {"number": number})
        point_to(run, place)
        assert files.read_json(run.path / "potential" / "potential.json") == {"number": number}
    assert os.readlink(run.path / "potential") == "final/potential"
    copy = RunDirectory(shutil.copytree(run.path, run.path.with_name("copy")))
    assert not copy.latest_potential.is_symlink()
    point_to(copy, copy.round(0).potential)
    assert os.readlink(copy.latest_potential) == "rounds/000/potential"
    copy.latest_potential.unlink()
    files.write_json(copy.latest_potential / "potential.json", {"number": "of the user"})
    point_to(copy, copy.round(0).potential)
    assert files.read_json(copy.latest_potential / "potential.json") == {"number": "of the user"}

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    run.latest_potential.unlink()
    monkeypatch.setattr(os, "symlink", refused)
    point_to(run, places[0])
    assert (run.path / "potential.txt").read_text() == "rounds/000/potential\n" and partials(run) == []


# ------------------------------------------------------------------------------------------------------------ lock


def test_the_lock_keeps_a_second_process_out_and_goes_with_the_context(run: RunDirectory) -> None:
    script = f"""
        from almlip_jax.campaign.rundir import RunDirectory
        from almlip_jax.errors import InputError
        try:
            with RunDirectory({str(run.path)!r}).lock():
                print("in")
        except InputError as error:
            print(error)
    """

    def other() -> str:
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
        return done.stdout.strip() + done.stderr

    with run.lock():
        assert run.is_running()
        assert f"in use by process {os.getpid()}" in other()
        with pytest.raises(InputError, match="in use"), run.lock():
            pass
        assert run.lock_file.exists(), "a refused lock must not free the one that is held"
    assert not run.is_running()
    assert not run.lock_file.exists()
    assert other() == "in"


def test_the_lock_is_freed_by_an_exception(run: RunDirectory) -> None:
    with pytest.raises(ZeroDivisionError), run.lock():
        1 / 0  # noqa: B018
    assert not run.lock_file.exists()


def test_the_lock_of_a_killed_process_is_taken_over(run: RunDirectory) -> None:
    script = f"""
        import os, signal
        from almlip_jax.campaign.rundir import RunDirectory
        with RunDirectory({str(run.path)!r}).lock():
            os.kill(os.getpid(), signal.SIGKILL)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended but not waited for: a zombie still has a pid
    assert run.lock_file.exists()
    assert not run.is_running()
    with run.lock():
        assert json.loads(run.lock_file.read_text())["pid"] == os.getpid()
    process.wait()


def test_a_later_process_with_the_number_of_a_dead_one_does_not_count(run: RunDirectory) -> None:
    with run.lock():
        owner = run.lock_owner()
    assert owner is not None
    files.write_json(run.lock_file, {**owner, "born": 1})
    assert not run.is_running()
    with run.lock():
        pass
    files.write_json(run.lock_file, owner)  # this very process: alive
    with pytest.raises(InputError, match="in use"), run.lock():
        pass


def test_a_lock_of_another_host_is_respected_and_says_what_to_do(run: RunDirectory) -> None:
    files.write_json(run.lock_file, {"pid": 1, "host": socket.gethostname() + "-other", "born": 1, "since": "now"})
    assert run.is_running()
    with pytest.raises(InputError, match=r"process 1 on .*-other.*delete .*lock"), run.lock():
        pass


def test_an_unreadable_lock_names_nobody(run: RunDirectory) -> None:
    run.lock_file.write_text('{"pid": 12')
    with run.lock():
        assert run.is_running()


# -------------------------------------------------------------------------------------------------------- versions


def test_versions_name_the_packages_and_keep_what_an_earlier_session_used(run: RunDirectory) -> None:
    work_directory.write_versions(run)
    now = files.read_json(run.versions)
    assert now["packages"]["numpy"] == np.__version__
    assert now["backend"] in ("cpu", "gpu", "tpu")
    assert now["devices"]
    work_directory.write_versions(run)
    assert files.read_json(run.versions) == now, "the same versions again are no new entry"
    work_directory.write_versions(run, {"python": "9.9"})
    assert files.read_json(run.versions) == {"python": "9.9", "earlier": [now]}


def test_a_session_on_other_devices_says_so(run: RunDirectory) -> None:
    assert work_directory.write_versions(run, {"devices": ["cpu", "cpu"]}) is None
    assert work_directory.write_versions(run, {"devices": ["cpu", "cpu"]}) is None
    said = work_directory.write_versions(run, {"devices": ["cpu"]})
    assert said == "works on 1 device (cpu), on 2 devices (cpu) before: from here on results differ in their last bits."
