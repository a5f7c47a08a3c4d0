"""Speed and accuracy beside peers, side by side in one session: ``python benchmarks/peers/run.py --data DIR``.

Each peer (apax, InstaDeep's mlip, mace-torch) has a virtual environment of its own, made from PyPI where it is missing,
and a worker that runs in it.  Dynamics: one acetylacetone molecule (acac, 15 atoms) and 64 atoms of silicon, cutoff
5 Angstrom, 0.5 fs, float32, one walker, a committee's largest force uncertainty at every step; rounds of all codes
alternate, so that a busy machine hits all alike, and medians are compared.  Training: 450 frames of acac at 300 K and
50 for validation, the same for all, errors on every fifth frame of two test trajectories.  Results are written after
each measurement to ``benchmarks/results/peers.json``, the table to ``peers.md`` beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.io import read, write

HERE = Path(__file__).resolve().parent
PEERS = ("apax", "mlip", "mace")
PARTS = ("md", "stop", "train")
ENVIRONMENTS = {
    "apax": ["apax==0.14.0", "jax==0.10.1", "jaxlib==0.10.1"],
    "mlip": ["mlip==0.2.5", "jax==0.10.1", "jaxlib==0.10.1"],
    "mace": ["mace-torch==0.3.16"],
}
OURS: dict[str, dict[str, Any]] = {
    "tiny": {"kind": "shared_density", "size": "tiny"},
    "small": {"kind": "shared_density", "size": "small"},
    "medium": {"kind": "shared_density", "size": "medium"},
    "mace": {"kind": "mace", "channels": 32, "hidden_l_max": 1, "correlation": 3, "l_max": 3, "layers": 2},
}
COMMITTEES = {"apax": (1, 4), "mlip": (1,), "mace": (1, 4)}
STEPS = {  # of one repeat: a few seconds
    "ours tiny": {"acac": 4000, "Si64": 1000},
    "ours small": {"acac": 2000, "Si64": 1000},
    "ours medium": {"acac": 2000, "Si64": 500},
    "ours mace": {"acac": 500, "Si64": 100},
    "apax": {"acac": 2000, "Si64": 500},
    "mlip": {"acac": 1000, "Si64": 200},
    "mace": {"acac": 80, "Si64": 24},
}
INNER = {"acac": 500, "Si64": 100}  # apax: steps between two looks of the host; 500 is its default
BATCH = {"ours": 5, "apax": 4, "mlip": 5, "mace": 5}
SHORT = {"ours": 20, "apax": 3, "mlip": 4, "mace": 2}  # epochs that make the dynamics harmless and give s/epoch
FIRST_TRIES = (5, 10, 20, 40)  # epochs of our trainings, the shortest of which to reach the target is the answer


def environment(name: str, folder: Path, torch_index: str | None) -> Path:
    """Python of a peer's environment, which is made where it is missing or of another version."""
    python = folder / name / "bin" / "python"
    package, _, wanted = ENVIRONMENTS[name][0].partition("==")
    if not python.exists():
        print(f"making the environment of {name} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
    look = f"from importlib.metadata import version; print(version({package!r}))"
    found = subprocess.run([str(python), "-c", look], capture_output=True, text=True).stdout.strip()
    if found != wanted:
        print(f"installing {package} {wanted} ...", flush=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        if name == "mace" and torch_index:
            subprocess.run([*install, "torch", "--index-url", torch_index], check=True)
        subprocess.run([*install, *ENVIRONMENTS[name]], check=True)
    return python


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


class Session:
    """Runs workers and keeps what they say."""

    def __init__(self, pythons: dict[str, Path], path: Path, scratch: Path, target: float) -> None:
        self.pythons = pythons
        self.path = path
        self.scratch = scratch
        self.target = target
        variables = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR", "PYTHONPATH")}
        self.variables = {"JAX_PLATFORMS": "cpu"} | variables | {"ALMLIP_CACHE_DIR": str(scratch / "cache")}
        self.found: dict[str, Any] = {
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "machine": platform.machine(),
            "processor": processor(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "target_forces_mae": target,
            "versions": {},
            "rows": [],
        }

    def run(self, who: str, task: dict[str, Any], **labels: Any) -> dict[str, Any]:
        """One worker on one task; ``labels`` say in the table what it was."""
        load = os.getloadavg()[0]
        command = [str(self.pythons[who]), str(HERE / "workers" / f"{who}_worker.py"), json.dumps(task)]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=self.variables, cwd=self.scratch)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        result = json.loads(lines[-1][7:]) if lines else {"failed": done.stderr[-2000:]}
        self.found["versions"].setdefault(who, result.pop("versions", {}))
        row = {"who": who, "part": task["part"], "members": task["members"], **labels, "load": load}
        row |= {"wall": time.perf_counter() - began, **result}
        self.found["rows"].append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")
        print(" ".join(f"{k}={_brief(v)}" for k, v in row.items() if k not in ("curve", "failed", "seen")), flush=True)
        if "failed" in row:
            print(row["failed"], file=sys.stderr, flush=True)
        return row

    def train(self, who: str, data: str, members: int, epochs: int, model: str = "", length: str = "short") -> dict:
        """One training; its potential is found by the dynamics under `potential`."""
        tests = {t: str(self.scratch / f"test_{t}.xyz") for t in ("300K", "600K")} if data == "acac" else {}
        task = {"part": "train", "members": members, "epochs": epochs, "batch": BATCH[who], "target": self.target}
        task |= {"train": str(self.scratch / f"{data}_train.xyz"), "valid": str(self.scratch / f"{data}_valid.xyz")}
        task |= {"tests": tests, "out": str(self.potential(who, data, members, model, length))}
        if who == "ours":
            task["model"] = OURS[model]
        return self.run(who, task, data=data, model=model, length=length)

    def potential(self, who: str, data: str, members: int, model: str, length: str) -> Path:
        """Where a training leaves its potential."""
        return self.scratch / "_".join(("potential", who, model, data, str(members), length))


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return "[" + " ".join(_brief(v) for v in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def labelled(frames: Iterable[Atoms]) -> Iterator[Atoms]:
    """Frames with their labels also under names that no reader claims for itself; molecules without a cell."""
    for atoms in frames:
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = atoms.get_potential_energy(), atoms.get_forces()
        if not atoms.pbc.any():
            atoms.cell = None
        yield atoms


def prepare(data: Path, scratch: Path) -> None:
    """Writes what all workers read: training and validation sets, tests, start structures."""
    rng = np.random.default_rng(0)
    for name, path, every, count in (
        ("acac", data / "acac" / "train_300K.xyz", 1, 500),
        ("Si64", data / "mlearn" / "Si_train.extxyz", 3, None),
    ):
        frames = list(labelled(read(path, f"::{every}")))[:count]
        order = rng.permutation(len(frames))
        held_out = len(frames) // 10
        write(scratch / f"{name}_valid.xyz", [frames[i] for i in order[:held_out]], format="extxyz")
        write(scratch / f"{name}_train.xyz", [frames[i] for i in order[held_out:]], format="extxyz")
    for temperature in ("300K", "600K"):
        frames = labelled(read(data / "acac" / f"test_MD_{temperature}.xyz", "::5"))
        write(scratch / f"test_{temperature}.xyz", list(frames), format="extxyz")
    molecule = read(data / "acac" / "test_MD_300K.xyz", "0")
    write(scratch / "acac_start.xyz", Atoms(molecule.numbers, molecule.positions), format="extxyz")
    write(scratch / "Si64_start.xyz", bulk("Si", "diamond", a=5.43, cubic=True) * (2, 2, 2), format="extxyz")


def short_trainings(session: Session, peers: list[str], dynamics: bool, quick: bool) -> None:
    """A few epochs of everything that is to run dynamics, or only to a threshold; gives s/epoch as well."""
    for data in ("acac", "Si64") if dynamics else ("acac",):
        for model in ("tiny", "small", "medium") if dynamics else ("tiny", "medium"):
            session.train("ours", data, 4, SHORT["ours"], model)
        for who in peers if dynamics else [peer for peer in peers if peer == "apax"]:
            for members in COMMITTEES[who] if dynamics else (4,):
                if who == "mace" and (members > 1 or data != "acac" or quick):
                    continue  # its dynamics use random parameters
                session.train(who, data, members, 2 if quick else SHORT[who])


def long_trainings(session: Session, peers: list[str], minutes: float) -> None:
    """Ours in a few lengths until the target is reached; then everything for the same time, peers in turn with ours."""
    for model in ("tiny", "small", "medium"):
        for epochs in FIRST_TRIES:
            if session.train("ours", "acac", 4, epochs, model, f"{epochs} epochs").get("target_seconds"):
                break
    if minutes <= 0:
        return
    entries = [("ours", 4, model) for model in ("tiny", "small", "medium")]
    entries += [(who, members, "") for who in peers for members in COMMITTEES[who] if (who, members) != ("mace", 4)]
    for who, members, model in entries:
        rows = session.found["rows"]
        known = [
            row
            for row in rows
            if row["part"] == "train"
            and (row["who"], row["members"], row["model"], row["data"]) == (who, members, model, "acac")
            and "failed" not in row
        ]
        if known:
            before = known[-1]["first_epoch"] - known[-1]["seconds_per_epoch"]
            epochs = max(int((60 * minutes - before) / known[-1]["seconds_per_epoch"]), 4)
            session.train(who, "acac", members, epochs, model, f"{minutes:g} min")


def dynamics(session: Session, peers: list[str], rounds: int, minutes: float, quick: bool) -> None:
    """Steps per second, codes in turn."""
    for n in range(rounds):
        for system in ("acac", "Si64"):
            start = str(session.scratch / f"{system}_start.xyz")
            entries = [("ours", model, members) for model in OURS for members in (1, 4)]
            entries += [(peer, "", members) for peer in peers for members in COMMITTEES[peer]]
            for who, model, members in entries:
                task = _dynamics_task(session, who, model, members, system, minutes, quick)
                task |= {"start": start, "out": str(session.scratch / f"md_{who}_{system}_{members}_{n}")}
                labels = {"data": system, "model": model, "round": n}
                session.run(who, task, **labels, temperature=task["temperature"], steps=task["steps"])


def stops(session: Session, peers: list[str], rounds: int, minutes: float, quick: bool) -> None:
    """Seconds from starting Python to "stopped at the threshold", codes in turn.

    Each code first runs to the end and says what it sees.  Its threshold lies below the maximum, and above all that
    came before: that is where it has to stop.
    """
    entries = [("ours", "tiny"), ("ours", "medium"), *((peer, "") for peer in peers if peer == "apax")]
    tasks = {}
    for who, model in entries:
        task = _dynamics_task(session, who, model, 4, "acac", minutes, quick) | {"part": "stop"}
        task["steps"] = 400 if quick else 4000
        task["inner"] = min(INNER["acac"], task["steps"])
        task |= {"start": str(session.scratch / "acac_start.xyz"), "out": str(session.scratch / f"stop_{who}_{model}")}
        seen = session.run(who, task, data="acac", model=model).pop("seen", None)
        if seen:
            tasks[who, model] = task | {"threshold": _last_rise(seen)}
    for n in range(rounds):
        for (who, model), task in tasks.items():
            again = task | {"out": f"{task['out']}_{n}"}
            session.run(who, again, data="acac", model=model, round=n).pop("seen", None)


def _last_rise(seen: list[float]) -> float:
    """A threshold that is first passed where a trace reaches its maximum."""
    top = seen.index(max(seen))
    return 0.5 * (max(seen[:top], default=0.0) + seen[top])


def _dynamics_task(
    session: Session, who: str, model: str, members: int, system: str, minutes: float, quick: bool
) -> dict[str, Any]:
    steps = STEPS[f"{who} {model}".strip()][system] // (2 if who in ("apax", "mace") and members > 1 else 1)
    if quick:
        steps = max(steps // 10, 10)
    inner = min(INNER[system], steps)
    task = {"part": "md", "members": members, "repeats": 1 if who == "apax" else 2, "inner": inner}
    task["steps"] = steps // inner * inner if who == "apax" else steps
    # peers after a few epochs may fall apart when they are hot; so may our message-passing model, which is untrained
    task["temperature"] = 300 if who == "ours" else 50
    lengths = [f"{minutes:g} min", "short"]
    if who == "ours" and model == "mace":
        task |= {"model": OURS[model], "temperature": 1}
    elif who == "mace":
        task["temperature"] = 50
    else:
        trained = 4 if who == "ours" else members
        for length in lengths:
            path = session.potential(who, system, trained, model, length)
            if path.exists() or path.with_name(path.name + ".zip").exists():
                if who != "ours" and length != "short":
                    task["temperature"] = 300
                return task | {"potential": str(path)}
    return task


NAMES = {
    "ours tiny": "almlip-jax, shared density, tiny",
    "ours small": "almlip-jax, shared density, small",
    "ours medium": "almlip-jax, shared density, medium (default)",
    "ours mace": "almlip-jax, MACE-type, 32 channels, l <= 1, correlation 3",
    "apax": "apax, GMNN, full ensemble",
    "mlip": "mlip, MACE, 32 channels, l <= 1, correlation 3",
    "mace": "mace-torch, MACE, 32 channels, l <= 1, correlation 3, ASE",
}


def report(found: dict[str, Any]) -> str:
    """What was found, as Markdown."""
    rows = [row for row in found["rows"] if "failed" not in row]
    versions = {name: number for of in found["versions"].values() for name, number in of.items() if name != "numpy"}
    loads = [row["load"] for row in found["rows"]]
    lines = [
        "# Beside peers",
        "",
        f"{found['date']}; {found['cpus']} cpus ({found['processor'] or found['machine']}), "
        f"load average {min(loads):.1f} to {max(loads):.1f}; Python {found['python']}; "
        + ", ".join(f"{name} {number}" for name, number in versions.items()),
        "",
    ]
    md = [row for row in rows if row["part"] == "md"]
    lines += [*_dynamics_table(md), *_ratios(md)] if md else []
    lines += _stop_table([row for row in rows if row["part"] == "stop" and "round" in row])
    train = [row for row in rows if row["part"] == "train"]
    lines += _training_table(train, found["target_forces_mae"]) if train else []
    failed = [row for row in found["rows"] if "failed" in row]
    lines += [f"Failed: {row['who']} {row['model']} x{row['members']} {row['part']} {row['data']}." for row in failed]
    return "\n".join(lines).rstrip() + "\n"


def _grouped(md: list[dict[str, Any]]) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in md:
        groups.setdefault((row["data"], f"{row['who']} {row['model']}".strip(), row["members"]), []).append(row)
    return groups


def _rates(rows: list[dict[str, Any]]) -> list[float]:
    return [rate for row in rows for rate in row["steps_per_second"]]


def _dynamics_table(md: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Dynamics",
        "",
        "Force uncertainty at every step where there are 4 members.  Start-up: from starting Python to the first step,",
        "in the first round / in later ones (median); compile: what the first run took beyond a steady one, likewise.",
        "",
        "| system | code and model | members | steps/s, median (range) | start-up, s | compile, s "
        "| peak memory, GB | T, K |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def first_and_later(rows: list[dict[str, Any]], name: str) -> str:
        values = [row[name] for row in rows]
        return f"{values[0]:.1f}" + (f" / {statistics.median(values[1:]):.1f}" if len(values) > 1 else "")

    for (system, who, members), rows in _grouped(md).items():
        rates = _rates(rows)
        cells = [system, NAMES[who], str(members)]
        cells += [f"{statistics.median(rates):.1f} ({min(rates):.1f} - {max(rates):.1f})"]
        cells += [first_and_later(rows, "start_up"), first_and_later(rows, "compile")]
        cells += [f"{max(row['memory_gb'] for row in rows):.2f}", f"{rows[0]['temperature']}"]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _ratios(md: list[dict[str, Any]]) -> list[str]:
    rates = {key: statistics.median(_rates(rows)) for key, rows in _grouped(md).items()}
    pairs = [
        *(((f"ours {model}", 4), (peer, 4)) for model in OURS for peer in ("apax", "mace")),
        *(((f"ours {model}", 1), (peer, 1)) for model in OURS for peer in PEERS),
        *(((f"ours {model}", 4), (f"ours {model}", 1)) for model in OURS),
    ]
    lines = ["Steps/s as a ratio of medians:", "", "| | acac | Si64 |", "| --- | --- | --- |"]
    for (one, members), (other, others) in pairs:
        cells = []
        for system in ("acac", "Si64"):
            above, below = rates.get((system, one, members)), rates.get((system, other, others))
            cells.append(f"{above / below:.2f}" if above and below else "-")
        if set(cells) != {"-"}:
            names = {"ours": "almlip-jax", "mace": "mace-torch"}
            code, _, model = one.partition(" ")
            right = f"{names.get(other, other.replace('ours ', ''))} x{others}"
            lines.append(f"| {names[code]} {model} x{members} / {right} | {' | '.join(cells)} |")
    return [*lines, ""]


def _stop_table(stops: list[dict[str, Any]]) -> list[str]:
    if not stops:
        return []
    lines = [
        "## To the threshold",
        "",
        "acac, four members: seconds from starting Python until the walker had stopped at the threshold, which each",
        "code first passes at the step given; median (range).",
        "",
        "| code and model | step | seconds |",
        "| --- | --- | --- |",
    ]
    for name in dict.fromkeys(f"{row['who']} {row['model']}".strip() for row in stops):
        rows = [row for row in stops if f"{row['who']} {row['model']}".strip() == name]
        seconds = [row["seconds"] for row in rows]
        told = f"{statistics.median(seconds):.1f} ({min(seconds):.1f} - {max(seconds):.1f})"
        lines.append(f"| {NAMES[name]} | {', '.join(sorted({str(row['stopped']) for row in rows}))} | {told} |")
    return [*lines, ""]


def _training_table(train: list[dict[str, Any]], target: float) -> list[str]:
    lines = [
        "## Training",
        "",
        "450 frames of acac at 300 K (mean absolute errors on test frames), or a third of the silicon set, which only",
        "serves the dynamics.  To the target: seconds from starting Python until the force error was",
        f"{target:g} meV/A; for peers the end of the first epoch after which the validation set says so, for ours the",
        "end of a whole training of this length after which the 300 K test set does.",
        "",
        "| data | code and model | members | epochs | s/epoch | end of first epoch, s | all, s | to the target, s "
        "| forces 300 / 600 K, meV/A | energy 300 / 600 K, meV | peak memory, GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in train:
        cells = [row["data"], NAMES[f"{row['who']} {row['model']}".strip()], str(row["members"]), str(row["epochs"])]
        cells += [f"{row['seconds_per_epoch']:.2f}", f"{row['first_epoch']:.1f}", f"{row['seconds']:.0f}"]
        cells += [f"{row['target_seconds']:.0f}" if row.get("target_seconds") else "-"]
        for kind in ("forces", "energy"):
            values = [row.get(f"{kind}_mae_{t}") for t in ("300K", "600K")]
            cells.append(" / ".join("-" if v is None else f"{v:.1f}" for v in values))
        lines.append("| " + " | ".join([*cells, f"{row['memory_gb']:.2f}"]) + " |")
    return [*lines, ""]


def main() -> None:
    """Measures, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "almlip-jax-peers")
    parser.add_argument("--torch-index", help="pip index of CPU builds of torch, for mace-torch; default: PyPI's torch")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=3, help="of the dynamics")
    parser.add_argument("--minutes", type=float, default=7.5, help="length of the long trainings; 0: none")
    parser.add_argument("--target", type=float, default=36.0, help="force MAE that counts as reached, meV/Angstrom")
    parser.add_argument("--quick", action="store_true", help="few steps and epochs: only shows that all works")
    parser.add_argument("--results", type=Path, default=HERE.parent / "results", help="folder")
    parser.add_argument("--label", default="peers", help="name of the result files")
    parser.add_argument("--report", action="store_true", help="only write the table again from the results")
    options = parser.parse_args()
    path = options.results.resolve() / f"{options.label}.json"
    if not options.report:
        if options.data is None:
            parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
        measure(options, path)
    text = report(json.loads(path.read_text()))
    path.with_suffix(".md").write_text(text)
    print(text)


def measure(options: argparse.Namespace, path: Path) -> None:
    """Runs all workers; the trainings first, since the dynamics use what they leave."""
    pythons = {who: environment(who, options.envs.resolve(), options.torch_index) for who in options.peers}
    minutes = options.minutes if "train" in options.parts else 0.0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        prepare(Path(options.data), scratch)
        session = Session(pythons | {"ours": Path(sys.executable)}, path, scratch, options.target)
        short_trainings(session, options.peers, "md" in options.parts or "train" in options.parts, options.quick)
        if "train" in options.parts:
            long_trainings(session, options.peers, minutes)
        if "md" in options.parts:
            dynamics(session, options.peers, options.rounds, minutes, options.quick)
        if "stop" in options.parts:
            stops(session, options.peers, options.rounds, minutes, options.quick)


if __name__ == "__main__":
    main()
