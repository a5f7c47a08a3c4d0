"""What a campaign gains from labels that are made while it goes on: ``python benchmarks/overlap.py``.

Ethanol, GFN2-xTB, walkers at 300 and 600 K.  For each seed a first campaign, whose labels take no time, compiles
everything and says what the rest of a round takes (median over rounds).  Then each label sleeps for that long divided
by the batch, on one worker, and the campaign runs with `campaign.overlap` and without, for the same number of labels,
in turn; each in a process of its own.  Wall seconds of whole campaigns, their ratio, and the errors on one test set go
to ``benchmarks/results/overlap.json`` and ``.md``.

On a machine that others use, too, ``--asleep 12`` has the exploration sleep for so many seconds and the two campaigns
run side by side, with little training, so that both meet the same crowd; labels of a batch take ``--labels`` seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from ase.build import molecule
from overlap_labels import CANDIDATES

from almlip_jax.campaign.config import ExperimentConfig
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.state import read_state
from almlip_jax.oracles import Labeller, LabelStore, MDRun, TBLiteSettings, run_label_md
from almlip_jax.structures.io import write_structures

HERE = Path(__file__).resolve().parent
BATCH = 8


def sections(folder: Path, rounds: int, seconds: float, *, overlap: bool, seed: int) -> dict[str, Any]:
    """A campaign of so many batches whose labels take some seconds each."""
    walkers = [{"temperature": 300, "count": 4}, {"temperature": 600, "count": 4}]
    return {
        "seed": seed,
        "system": {"structures": str(folder / "start.extxyz")},
        "oracle": {"kind": "user", "function": "overlap_labels:make", "parameters": {"seconds": seconds}},
        "executor": {"kind": "local", "workers": 1},
        "initial": {"rattle": {"count": BATCH, "stdev": 0.05}},
        "test": {"files": [{"path": str(folder / f"{t}K.extxyz"), "group": f"{t}K"} for t in (300, 600)]},
        "model": {"kind": "shared_density", "size": "tiny"},
        "training": {"max_steps": 2000},
        "exploration": {
            "kind": "md",
            "walkers": walkers,
            "steps": 2000,
            "thresholds": {"kind": "relative"},
        },
        "selection": {"batch": BATCH, "selector": {"kind": "max_det"}},
        "stopping": {"max_rounds": rounds, "share_below": None},
        "campaign": {"overlap": overlap},
    }


def drowsy(asked: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The same campaign with an exploration that sleeps, two members and little training."""
    exploration = {"kind": "user", "function": "overlap_labels:wander", "candidates": CANDIDATES}
    changed = {"training": {"max_steps": 300}, "ensemble": {"size": 2}}
    return asked | changed | {"exploration": exploration | {"parameters": {"seconds": seconds}}}


def side_by_side(folder: Path, rounds: int, seed: int, asleep: float, labels: float) -> dict[str, Any]:
    """Campaigns with overlap and without at the same time, whose rounds sleep."""
    with ThreadPoolExecutor(2) as threads:
        begun = {
            name: threads.submit(
                campaign, folder, f"{name} {seed}", rounds, labels / BATCH, overlap=overlap, seed=seed, asleep=asleep
            )
            for name, overlap in (("without", False), ("with", True))
        }
        return {"seed": seed, "rest": labels, **{name: one.result() for name, one in begun.items()}}


def prepare(folder: Path) -> None:
    """Writes the start geometry and the test sets."""
    start = molecule("CH3CH2OH")
    write_structures(folder / "start.extxyz", [start])
    with LabelStore(folder / "tests.db") as store, Labeller(TBLiteSettings(), store) as labeller:
        for temperature in (300, 600):
            runs = [MDRun(temperature, 400, every=10, equilibration=100)]
            (found,) = run_label_md(start, labeller, runs, seed=temperature, purpose="test")
            write_structures(folder / f"{temperature}K.extxyz", found.frames)


def campaign(folder: Path, name: str, *arguments: Any, asleep: float | None = None, **keywords: Any) -> dict[str, Any]:
    """Runs a campaign in a process of its own: its wall seconds, errors, labels, and the seconds of its rounds."""
    asked = sections(folder, *arguments, **keywords)
    config = ExperimentConfig.model_validate(asked if asleep is None else drowsy(asked, asleep))
    (folder / f"{name}.json").write_text(config.model_dump_json())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    environment |= {"ALMLIP_CACHE_DIR": str(folder / "compiled")}
    command = [sys.executable, "-m", "almlip_jax.cli", "run", str(folder / f"{name}.json")]
    begun = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        subprocess.run([*command, "--run-dir", str(folder / name)], env=environment, check=True, stdout=log, stderr=log)
    wall = time.monotonic() - begun
    state = read_state(RunDirectory(folder / name))
    return {
        "wall": wall,
        "rounds_wall": from_first_batch(folder / name),
        "labels": state.labels,
        "rounds": len(state.history) - 1,
        "round": round_seconds(folder / name),
        "waited": sum(one.seconds.get("label", 0.0) for one in state.history),
        "errors": {name: value for name, value in state.history[-1].errors.items() if name.startswith("forces_rmse")},
    }


def round_seconds(run: Path) -> float:
    """Median wall seconds from the end of a round to that of the next, its report included."""
    ends = [folder.dataset.stat().st_mtime for folder in RunDirectory(run).rounds()][1:]
    return statistics.median(after - before for before, after in zip(ends[:-1], ends[1:], strict=True))


def from_first_batch(run: Path) -> float:
    """Wall seconds from the selection of the first batch, before which all is the same, to the last evaluation."""
    folders = RunDirectory(run).rounds()
    return folders[-1].evaluation.stat().st_mtime - folders[0].batch.stat().st_mtime


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "overlap.json")
    parser.add_argument("--asleep", type=float)
    parser.add_argument("--labels", type=float, default=14.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        rows: list[dict[str, Any]] = []
        for seed in range(given.repeats):
            if given.asleep is not None:
                rows.append(side_by_side(folder, given.rounds, seed, given.asleep, given.labels))
                continue
            first = campaign(folder, f"first {seed}", given.rounds, 0.0, overlap=True, seed=seed)
            seconds = first["round"] / BATCH
            row = {"seed": seed, "rest": first["round"]}
            print(f"the rest of a round takes {first['round']:.1f} s, a label {seconds:.2f} s", flush=True)
            for name, overlap in (("without", False), ("with", True)):
                row[name] = campaign(folder, f"{name} {seed}", given.rounds, seconds, overlap=overlap, seed=seed)
                print(name, json.dumps(row[name]), flush=True)
            rows.append(row)
    write(given.out, {"batch": BATCH, "rows": rows})


def write(path: Path, found: dict[str, Any]) -> None:
    """The figures, and the table that people read."""
    for row in found["rows"]:
        row["ratio"] = row["with"]["rounds_wall"] / row["without"]["rounds_wall"]
        row["ratio_whole"] = row["with"]["wall"] / row["without"]["wall"]
    path.write_text(json.dumps(found, indent=1) + "\n")
    groups = [*found["rows"][0]["with"]["errors"]]
    ratio, whole = (float(np.mean([row[name] for row in found["rows"]])) for name in ("ratio", "ratio_whole"))
    head = [
        "seed",
        "labels of a batch (s)",
        "overlap",
        "whole campaign (s)",
        "ratio",
        "from the first batch on (s)",
        "ratio",
        "labels",
        "waited for labels (s)",
        *groups,
    ]
    lines = [
        "# Labels while the campaign goes on",
        "",
        "Written by `benchmarks/overlap.py`, whose text says what is measured.  Labels of a batch of "
        f"{found['batch']} take together what the rest of a round took before; {found['rows'][0]['with']['rounds']} "
        f"batches.  Force errors in eV/Angstrom.  Mean ratio {whole:.3f} of whole campaigns, {ratio:.3f} from the "
        "first batch on.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
    ]
    for row in found["rows"]:
        for name in ("without", "with"):
            one = row[name]
            told = [f"{row[ratio]:.3f}" if name == "with" else "" for ratio in ("ratio_whole", "ratio")]
            cells = [
                str(row["seed"]),
                f"{row['rest']:.1f}",
                "yes" if name == "with" else "no",
                f"{one['wall']:.1f}",
                told[0],
                f"{one['rounds_wall']:.1f}",
                told[1],
            ]
            cells += [str(one["labels"]), f"{one['waited']:.1f}", *(f"{one['errors'][group]:.4f}" for group in groups)]
            lines.append(f"| {' | '.join(cells)} |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
