"""The main job against the same budget spent at random, with paired seeds.

``selected`` is ``configs/zundel.yaml``.  ``random`` trains once, by the same code, on as many structures drawn at
random from a pool of 300 K and 600 K dynamics of the label source itself: from the very distribution of the test set.
The two share the test set of their seed.  A campaign that is finished already is not run again.

    python experiments/zundel_xtb/run.py --out runs/zundel_xtb
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from almlip_jax.campaign import resume_campaign, run_campaign
from almlip_jax.campaign.config import ExperimentConfig, load_config
from almlip_jax.campaign.preparation import start_geometries
from almlip_jax.compilation import prepare_jax
from almlip_jax.oracles import Labeller, LabelStore, MDRun, run_label_md
from almlip_jax.progress import open_progress
from almlip_jax.structures.io import write_structures

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "zundel.yaml"
POOL = [MDRun(temperature=t, steps=16_000, every=40, equilibration=1000, name=f"pool-{t}") for t in (300, 600)]


def make_pool(path: Path, seed: int) -> None:
    """400 frames at either temperature of the label source's own dynamics; their labels are not used."""
    if path.exists():
        return
    config = load_config(CONFIG)
    path.parent.mkdir(parents=True, exist_ok=True)
    with LabelStore(path.with_suffix(".db")) as store, Labeller(config.oracle, store, config.executor) as labeller:
        start = start_geometries(config.system)[0]
        found = run_label_md(start, labeller, POOL, seed=1000 + seed, purpose="test")
    write_structures(path, [frame for one in found for frame in one.frames])


def finished(folder: Path, config: ExperimentConfig) -> dict[str, object]:
    """Runs a campaign unless it is finished; its last evaluated record."""
    state = folder / "state.json"
    if not (state.exists() and json.loads(state.read_text())["finished"]):
        with open_progress() as progress:
            (resume_campaign if state.exists() else run_campaign)(config, folder, progress=progress)
    history = json.loads(state.read_text())["history"]
    last = [record for record in history if record["errors"]][-1]
    seconds = sum(sum(record["seconds"].values()) for record in history)
    return {"labels": last["labels"], **last["errors"], "seconds": seconds}


def main() -> None:
    """Runs what is not finished and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/zundel_xtb"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    prepare_jax()
    rows: list[dict[str, object]] = []
    for seed in range(options.seeds):
        pool = (options.out / f"pool-{seed}.extxyz").resolve()
        make_pool(pool, seed)
        selected = load_config(CONFIG, [f"seed={seed}"])
        budget = selected.stopping.max_labels
        drawn = [f"initial={{from_pool: {budget}}}", f"exploration={{kind: pool, files: {pool}}}"]
        at_random = load_config(CONFIG, [f"seed={seed}", *drawn, "stopping.max_rounds=0"])
        for name, config in (("selected", selected), ("random", at_random)):
            rows.append({"strategy": name, "seed": seed, **finished(options.out / f"{name}-{seed}", config)})
            with (HERE / "results.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
