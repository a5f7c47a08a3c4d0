"""Speed and accuracy beside peers, side by side in one session: ``python benchmarks/peers/run.py --data DIR``.

Each peer has a virtual environment of its own, made from PyPI where it is missing.  Dynamics: one acetylacetone
molecule (15 atoms) and 64 atoms of silicon, cutoff 5 Angstrom, 0.5 fs, float32, one walker, the largest force
uncertainty of a committee at every step.  Repeats of all peers alternate, so that a busy machine hits all alike;
medians are compared.  Training: 450 + 50 frames of acetylacetone at 300 K, errors on the two test trajectories.
Results are written after each measurement to ``benchmarks/results/peers.json``, the table to ``peers.md`` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ase.build import bulk
from ase.io import read, write

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
ENVIRONMENTS = {
    "apax": ["apax==0.14.0", "jax==0.10.1", "jaxlib==0.10.1"],
    "mace": ["mace-torch==0.3.16"],
}
SMALL = {"kind": "shared_density", "size": "small"}
MEDIUM = {"kind": "shared_density", "size": "medium"}
MACE = {"kind": "mace", "channels": 32, "hidden_l_max": 1, "correlation": 3, "l_max": 3, "layers": 2}


def environment(name: str, folder: Path) -> Path:
    """Python of a peer's environment, which is made where it is missing."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        print(f"installing {name} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        for requirement in ENVIRONMENTS[name]:
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", requirement], check=True)
    return python


class Session:
    """Runs workers and keeps what they say."""

    def __init__(self, environments: Path, label: str) -> None:
        self.environments = environments
        self.path = RESULTS / f"{label}.json"
        self.found: dict[str, Any] = {"machine": platform.machine(), "cpus": os.cpu_count(), "rows": []}

    def run(self, who: str, what: str, task: dict[str, Any], **note: Any) -> dict[str, Any] | None:
        """One worker on one task; None where it failed."""
        python = Path(sys.executable) if who == "ours" else environment(who, self.environments)
        load = os.getloadavg()[0]
        command = [str(python), str(HERE / "workers" / f"{who}_worker.py"), json.dumps(task)]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        result = json.loads(lines[-1][7:]) if lines else None
        row = {"who": who, "what": what, "load": load, "wall": time.perf_counter() - began, **note}
        row |= result if result is not None else {"failed": done.stderr[-500:]}
        self.found["rows"].append(row)
        RESULTS.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")
        rates = [f"{rate:.1f}" for rate in row.get("steps_per_second", [])]
        brief = {k: v for k, v in row.items() if k not in ("who", "what", "steps_per_second", "failed")}
        print(f"{who:5s} {what:34s} {rates} {brief} {row.get('failed', '')}", flush=True)
        return result


def train(session: Session, data: Path, scratch: Path, options: argparse.Namespace) -> None:
    """Trains what the dynamics need; with ``--train`` long enough to compare errors."""
    tests = {name: str(data / "acac" / f"test_MD_{name}.xyz") for name in ("300K", "600K")}
    acac, silicon = str(data / "acac" / "train_300K.xyz"), str(data / "mlearn" / "Si_train.extxyz")
    long = options.train
    for name, model in (("small", SMALL), ("medium", MEDIUM)):
        steps = options.our_steps if long else 2000
        task = {"part": "train", "train": acac, "model": model, "members": 4, "steps": steps, "tests": tests}
        session.run("ours", f"train acac {name} x4", task | {"out": str(scratch / f"ours_{name}")})
    if "apax" in options.peers:
        for members, epochs in ((1, 45 if long else 4), (4, 2)):
            task = {"part": "train", "train": acac, "n_train": 450, "n_valid": 50, "epochs": epochs, "members": members}
            task |= {"tests": tests if members == 1 and long else {}, "test_every": 5}
            session.run("apax", f"train acac x{members}", task | {"out": str(scratch / f"apax_acac_{members}")})
            task |= {"train": silicon, "n_train": 190, "n_valid": 20, "epochs": 2, "tests": {}}
            session.run("apax", f"train Si x{members}", task | {"out": str(scratch / f"apax_Si64_{members}")})


def dynamics(session: Session, starts: dict[str, str], scratch: Path, options: argparse.Namespace) -> None:
    """Steps per second, peers in turn."""
    for n in range(options.repeats):
        for system, start in starts.items():
            base = {"part": "md", "start": start, "repeats": 2, "repeat": n}
            for name, model in (("small", SMALL), ("medium", MEDIUM), ("mace", MACE)):
                for members in (1, 4):
                    trained = scratch / f"ours_{name}"
                    known = {"potential": str(trained)} if system == "acac" and trained.exists() else {}
                    steps = {"mace": 100}.get(name, 2000 if system == "acac" else 500)
                    task = base | {"model": model, "members": members, "temperature": 300, "steps": steps} | known
                    if not known:
                        task["temperature"] = 1
                    session.run("ours", f"md {system} {name} x{members}", task)
            if "apax" in options.peers:
                for members in (1, 4):
                    steps = {1: 4000, 4: 1000}[members] // (1 if system == "acac" else 4)
                    task = base | {"members": members, "temperature": 50, "steps": steps, "inner": 50, "every": 1}
                    task |= {"potential": str(scratch / f"apax_{system}_{members}"), "repeats": 1}
                    session.run(
                        "apax", f"md {system} x{members}", task | {"out": str(scratch / f"md_{system}_{members}_{n}")}
                    )
            if "mace" in options.peers:
                for members in (1, 4):
                    task = base | {"members": members, "temperature": 50, "steps": 40 // members, "threads": 2}
                    session.run("mace", f"md {system} x{members}", task)


def table(found: dict[str, Any]) -> str:
    """Medians as a Markdown table."""
    rates: dict[str, list[float]] = {}
    for row in found["rows"]:
        if row["what"].startswith("md ") and "steps_per_second" in row:
            rates.setdefault(f"{row['who']} {row['what'][3:]}", []).extend(row["steps_per_second"])
    lines = ["| dynamics | steps/s, median | lowest | highest |", "| --- | --- | --- | --- |"]
    for name, values in rates.items():
        lines.append(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} |")
    lines += [
        "",
        "| training | seconds | s/epoch | force MAE 300 K / 600 K, meV/A | energy MAE, meV |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        if row["what"].startswith("train") and "seconds" in row:
            errors = [
                f"{row.get(f'{kind}_mae_{t}', float('nan')):.1f}"
                for kind in ("forces", "energy")
                for t in ("300K", "600K")
            ]
            epoch = row.get("seconds_per_epoch", float("nan"))
            cells = [f"{row['who']} {row['what'][6:]}", f"{row['seconds']:.0f}", f"{epoch:.2f}"]
            lines.append("| " + " | ".join([*cells, " / ".join(errors[:2]), " / ".join(errors[2:])]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "almlip-jax-peers")
    parser.add_argument("--peers", nargs="*", default=["apax", "mace"], choices=["apax", "mace"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train", action="store_true", help="train long enough to compare errors (20 minutes more)")
    parser.add_argument("--our-steps", type=int, default=27000)
    parser.add_argument("--label", default="peers")
    options = parser.parse_args()
    if options.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    session = Session(options.envs, options.label)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        molecule = read(options.data / "acac" / "test_MD_300K.xyz", "0")
        molecule.calc, molecule.cell, molecule.pbc = None, None, False
        write(scratch / "acac.extxyz", molecule)
        write(scratch / "si.extxyz", bulk("Si", "diamond", a=5.43, cubic=True) * (2, 2, 2))
        train(session, options.data, scratch, options)
        starts = {"acac": str(scratch / "acac.extxyz"), "Si64": str(scratch / "si.extxyz")}
        dynamics(session, starts, scratch, options)
    text = table(session.found)
    session.path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
