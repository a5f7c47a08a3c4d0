"""Batch selectors beside bmdal_reg: ``python benchmarks/selection.py --envs DIR``.

The peer has a virtual environment of its own, made from PyPI where it is missing.  Both sides select from the same rows
(a mixture of Gaussians with a decaying spectrum), with the same training rows, in the same precision, on the same
number of threads; they take turns, and medians are compared.  Picks in float32 are also compared with ours in float64.
Compilation of ours is timed apart.  Setup is the time of
a batch of one: distances to the training rows, or the posterior.  What lies between it and the whole batch gives the
rate at which a choice goes through the pool, which is compared with that of matrix-vector products.  Results go to
``benchmarks/results/selectors.json`` after each measurement (rows of other sizes are kept), the table to
``selectors.md``.  ``--picks`` compares picks alone, and keeps what was measured before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
PEER = ["bmdal-reg==3.0.2", "numpy<2", "pandas<3"]  # it uses names that numpy 2 has dropped
SELECTORS = ("max_dist", "lcmd", "kmeans_pp", "max_det", "bait", "frank_wolfe")
ALONE = ("kmeans_fps", "dpp", "maxvol")  # the peer has nothing of the kind; measured where asked for
DRAWS = ("kmeans_pp",)  # at random: picks of two codes cannot be compared
SAME = ("pool", "train", "columns", "k", "precision", "selector")  # of rows of the same kind
PASSES = {"bait": 2}  # through the pool for a choice
NOTE = """
bmdal-reg adds 1e-8 to what `bait` divides by, the posterior variance plus sigma^2.  With sigma = 1e-3 that is 1 % of
the noise, which decides between candidates that are nearly equal.  Its times are those of this call.  Its picks are
those of one more call with rows and sigma a thousand times as large: the criterion chooses the same in any unit, and
1e-8 of the noise decides nothing.  Picks of the timed call stand in brackets where they are others.  Rows without times
were measured for their picks alone.
"""


def environment(folder: Path, torch_index: str | None) -> Path:
    """Python of the peer's environment, which is made where it is missing."""
    python = folder / "bmdal" / "bin" / "python"
    look = [str(python), "-c", "import bmdal_reg.bmdal.algorithms, numpy; assert numpy.__version__ < '2'"]
    if python.exists() and subprocess.run(look, capture_output=True).returncode == 0:
        return python
    print("making the environment of bmdal_reg ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "bmdal")], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    if torch_index:
        subprocess.run([*install, "torch", "--index-url", torch_index], check=True)
    subprocess.run([*install, *PEER], check=True)
    return python


def make_rows(n: int, columns: int, seed: int) -> np.ndarray:
    """A mixture of 30 Gaussians whose spectrum falls by e^-4, float32."""
    rng = np.random.default_rng(seed)
    widths = np.exp(-4 * np.arange(columns) / columns).astype(np.float32)
    centres = np.random.default_rng(0).standard_normal((30, columns), dtype=np.float32)
    return (rng.standard_normal((n, columns), dtype=np.float32) + centres[rng.integers(0, 30, n)]) * widths


class Side:
    """A worker process that stays."""

    def __init__(self, python: str, who: str, threads: int, folder: Path) -> None:
        variables = os.environ | {"PYTHONPATH": str(HERE.parent) if who == "ours" else ""}
        command = [python, str(HERE / "selection_worker.py"), who, str(threads), str(folder)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=variables,
            cwd=folder,
        )

    def ask(self, do: str, **task: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **task}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"failed": f"the worker ended with status {self.process.wait()}"}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compared(ours: list[int], theirs: list[int], selector: str) -> str:
    """Whether picks are the same, or which of them is the first that is not."""
    if selector in DRAWS:
        return "drawn at random"
    for n, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one != other:
            return f"first difference at {n + 1}, {len(set(ours) & set(theirs))} in common"
    return "equal"


def measure(sides: dict[str, Side], task: dict[str, Any], rounds: int) -> dict[str, Any]:
    """One row: both sides in turn, a few times."""
    answers: dict[str, list[dict[str, Any]]] = {who: [] for who in sides}
    for _ in range(rounds):
        for who, side in sides.items():
            answers[who].append(side.ask("select", **task))
    row: dict[str, Any] = {"load": os.getloadavg()[0], "versions": {}}
    for who, found in answers.items():
        row["versions"][who] = found[-1].get("versions", {})
        failed = [one["failed"] for one in found if "failed" in one]
        if failed:
            row[f"{who}_failed"] = failed[0]
            continue
        for name in ("setup", "select"):
            row[f"{who}_{name}_seconds"] = statistics.median(s for one in found for s in one[f"{name}_seconds"])
        row |= {f"{who}_peak_mib": found[-1]["peak_mib"], f"{who}_picks": found[-1]["picks"]}
        named = ("status", "temporary_mib", "picks_as_called")
        row |= {f"{who}_{name}": found[-1][name] for name in named if name in found[-1]}
        if "compile_seconds" in found[0]:
            row["compile_seconds"] = found[0]["compile_seconds"]
    return row


def completed(row: dict[str, Any], bandwidth: dict[str, Any]) -> dict[str, Any]:
    """The row with what follows from its measurements."""
    if "ours_select_seconds" in row:
        between = row["ours_select_seconds"] - row["ours_setup_seconds"]
        size = row["pool"] * row["columns"] * np.dtype(row["precision"]).itemsize
        read = (row["k"] - 1) * PASSES.get(row["selector"], 1) * size
        row["gb_per_s"] = read / between / 1e9 if between > 0 else float("nan")
        row |= {name: bandwidth.get(name) for name in ("pool_gb_per_s", "stream_gb_per_s")}
        if "peer_select_seconds" in row:
            row["ratio"] = row["peer_select_seconds"] / row["ours_select_seconds"]
    return row | judged(row)


def judged(row: dict[str, Any]) -> dict[str, str]:
    """Whether both sides pick the same, where both did."""
    if not {"ours_picks", "peer_picks"} <= row.keys():
        return {}
    picks = compared(row["ours_picks"], row["peer_picks"], row["selector"])
    if row.get("peer_picks_as_called", row["peer_picks"]) != row["peer_picks"]:
        picks += f" ({compared(row['ours_picks'], row['peer_picks_as_called'], row['selector'])})"
    return {"picks": picks}


def picked(sides: dict[str, Side], task: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a task with new picks, and what was measured before."""
    before = [row for row in rows if all(row[key] == task[key] for key in SAME)]
    row = {"versions": {}} | (before[0] if before else {key: task[key] for key in SAME})
    for who, side in sides.items():
        answer = side.ask("select", **task | {"repeats": 1})
        row["versions"][who] = answer.get("versions", {})
        row |= {
            f"{who}_{name}": answer[name] for name in ("picks", "picks_as_called", "status", "failed") if name in answer
        }
    return row | judged(row)


def report(found: dict[str, Any]) -> str:
    """The table, as Markdown."""
    versions = "; ".join(
        f"{who}: " + ", ".join(f"{name} {number}" for name, number in of.items())
        for who, of in found["versions"].items()
    )
    lines = ["# Batch selectors beside bmdal_reg", "", f"{found['date']}; {found['threads']} threads; {versions}", ""]
    names = "pool | train | k | precision | selector | ours, s | peer, s | ratio | picks | as in float64, ours, peer"
    names += " | ours, batch of 1, s"
    names += " | GB/s | product with pool, GB/s | beyond caches, GB/s | temporary, MiB"
    lines += [f"| {names} |", "|" + " --- |" * (names.count("|") + 1)]
    for row in found["rows"]:
        cells = [row["pool"], row["train"], row["k"], row["precision"], row["selector"]]
        cells += [row.get("ours_select_seconds", row.get("ours_failed"))]
        cells += [row.get("peer_select_seconds", row.get("peer_failed")), row.get("ratio")]
        cells += [row.get("picks", "") + (f"; peer: {row['peer_status']}" if "peer_status" in row else "")]
        cells += [_as_in_double(row, found["rows"])]
        cells += [row.get(name) for name in ("ours_setup_seconds", "gb_per_s", "pool_gb_per_s", "stream_gb_per_s")]
        cells += [row.get("ours_temporary_mib")]
        lines.append("| " + " | ".join(_brief(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n" + NOTE


def _as_in_double(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """How many picks of each side in float32 are among ours in float64."""
    keys = ("pool", "train", "columns", "k", "selector")
    double = [one for one in rows if one["precision"] == "float64" and all(one[key] == row[key] for key in keys)]
    if row["precision"] == "float64" or row["selector"] in DRAWS or not double or "ours_picks" not in double[0]:
        return ""
    right = set(double[0]["ours_picks"])
    return ", ".join(str(len(right & set(row[f"{who}_picks"]))) for who in ("ours", "peer") if f"{who}_picks" in row)


def _brief(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(path: Path, found: dict[str, Any], row: dict[str, Any]) -> None:
    """Puts a row in the place of an earlier one of the same kind."""
    same = [n for n, other in enumerate(found["rows"]) if all(other[key] == row[key] for key in SAME)]
    found["versions"] |= row.pop("versions")
    place = same[0] if same else len(found["rows"])
    found["rows"][place : place + 1] = [row]
    path.mkdir(parents=True, exist_ok=True)
    (path / "selectors.json").write_text(json.dumps(found, indent=1) + "\n")
    (path / "selectors.md").write_text(report(found))


def main() -> None:
    """Measures and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", type=Path, required=True, help="folder of the virtual environments of peers")
    parser.add_argument("--torch-index", help="package index for a build of torch that runs on the CPU alone")
    parser.add_argument("--pool", type=int, nargs="*", default=[20_000])
    parser.add_argument("--train", type=int, default=1_000)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument("--precision", nargs="*", default=["float32", "float64"])
    parser.add_argument("--selectors", nargs="*", default=SELECTORS, choices=SELECTORS + ALONE, metavar="NAME")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=2, help="turns of both sides")
    parser.add_argument("--repeats", type=int, default=3, help="runs in each turn")
    parser.add_argument("--picks", action="store_true", help="compare picks alone, and keep what was measured before")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    python = environment(options.envs.resolve(), options.torch_index)
    path = options.out / "selectors.json"
    found = json.loads(path.read_text()) if path.exists() else {"rows": [], "versions": {}}
    if not options.picks or "date" not in found:
        found["date"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        found["threads"] = options.threads
    for pool in options.pool:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            np.save(folder / "pool.npy", make_rows(pool, options.columns, 1))
            np.save(folder / "train.npy", make_rows(options.train, options.columns, 2))
            sides = {
                who: Side(with_, who, options.threads, folder)
                for who, with_ in (("ours", sys.executable), ("peer", str(python)))
            }
            for precision in options.precision:
                bandwidth = {} if options.picks else sides["ours"].ask("bandwidth", precision=precision)
                for selector in options.selectors:
                    task = {"selector": selector, "precision": precision, "k": options.k, "repeats": options.repeats}
                    row = {"pool": pool, "train": options.train, "columns": options.columns, **task}
                    beside = {"ours": sides["ours"]} if selector in ALONE else sides
                    if options.picks:
                        row = picked(beside, row, found["rows"])
                    else:
                        row = completed(row | measure(beside, task, options.rounds), bandwidth)
                    said = (
                        "ours_failed",
                        "peer_failed",
                        "ratio",
                        "picks",
                        "ours_select_seconds",
                        "peer_select_seconds",
                    )
                    said += ("ours_setup_seconds", "peer_setup_seconds", "gb_per_s", "pool_gb_per_s", "stream_gb_per_s")
                    shown = [f"{key}={_brief(row[key])}" for key in said if key in row]
                    print(pool, precision, selector, *shown, flush=True)
                    save(options.out, found, row)
            for side in sides.values():
                side.close()


if __name__ == "__main__":
    main()
