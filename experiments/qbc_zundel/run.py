"""Query by committee on DFT frames of the Zundel cation, against random selection, with paired seeds.

The published protocol (SAbIA active-learning tutorial): 20 random initial structures, then 15 times the 10 structures
of highest ``force_std_mean`` from a labelled pool, 50 held-out test frames, 4 members.
Campaigns of one seed share their initial set, test set and pool.  A campaign that is finished already is not run again.

    python experiments/qbc_zundel/run.py --data zundel.extxyz --out runs/qbc
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

from almlip_jax.campaign import resume_campaign, run_campaign
from almlip_jax.campaign.progress import open_progress
from almlip_jax.compilation import prepare_jax
from almlip_jax.config import load_config

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "qbc_zundel.yaml"
SELECTORS = {
    "top_k": ["selection.selector={kind: top_k, score: force_std_mean}"],
    # nothing that is learned on the way changes a random choice: batches of 50 give the same sets in fewer rounds
    "random": ["selection.selector={kind: random}", "selection.batch=50", "stopping.max_rounds=3"],
    "max_det": ["selection.selector={kind: max_det, features: last_layer_gradient}"],
}


def run_one(data: Path, folder: Path, selector: str, seed: int) -> list[dict[str, object]]:
    """One campaign; its learning curve as rows."""
    changes = [
        f"exploration.files={data}",
        f"oracle.path={data}",
        *SELECTORS[selector],
        f"seed={seed}",
    ]
    state = folder / "state.json"
    began = time.monotonic()
    if not (state.exists() and json.loads(state.read_text())["finished"]):
        config = load_config(CONFIG, changes)
        with open_progress() as progress:
            (resume_campaign if state.exists() else run_campaign)(config, folder, progress=progress)
        (folder / "seconds").write_text(f"{time.monotonic() - began:.1f}")
    rows = []
    for record in json.loads(state.read_text())["history"]:
        rows.append(
            {
                "selector": selector,
                "seed": seed,
                "labels": record["dataset_size"],
                "forces_rmse": record["errors"]["forces_rmse_pool"],
                "forces_mae": record["errors"]["forces_mae_pool"],
                "energy_rmse": record["errors"]["energy_rmse_pool"],
                "sigma_batch": record["sigma_batch"],
                "sigma_pool": record["sigma_pool"],
                "seconds": sum(record["seconds"].values()),
            }
        )
    return rows


def main() -> None:
    """Runs what is not finished and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/qbc"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--selectors", nargs="+", default=["top_k", "random"], choices=sorted(SELECTORS))
    options = parser.parse_args()
    prepare_jax()
    rows: list[dict[str, object]] = []
    for seed in range(options.seeds):
        for selector in options.selectors:
            rows += run_one(options.data.resolve(), options.out / f"{selector}-{seed}", selector, seed)
            with (HERE / "results.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
