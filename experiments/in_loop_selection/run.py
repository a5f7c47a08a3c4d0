"""Does selection in the loop keep what offline selection would?  ``python experiments/in_loop_selection/run.py RUN``.

Takes the potentials of a finished campaign (``start.py run`` makes one of the Zundel cation), explores with each at 300
and 600 K with every tenth step offered to the buffer (`admission: {kind: log_det}` with its defaults), and compares the
log-determinant of the features of what the buffer holds with that of a greedy selection from all the frames offered,
which are kept as trajectories.  One row a potential, temperature and size of the buffer in ``results.csv``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from ase import Atoms

import almlip_jax as al
from almlip_jax.dynamics.admission import LogDetAdmission
from almlip_jax.features import FeatureRequest

HERE = Path(__file__).resolve().parent
WALKERS, EVERY, STEPS = 8, 10, 1500
FEATURES = "last_layer_gradient"


def features(potential: al.Potential, frames: list[Atoms]) -> np.ndarray:
    """[n, D]."""
    return potential.evaluate(frames, features=FeatureRequest.of([FEATURES])).features[FEATURES]


def log_det(rows: np.ndarray) -> float:
    """Of whitened features [n, P], relative to the training set alone."""
    return float(np.linalg.slogdet(np.eye(len(rows)) + rows @ rows.T)[1])


def greedy(rows: np.ndarray, count: int) -> list[int]:
    """Rows that raise the log-determinant most, one after the other, from all of them."""
    posterior, chosen = np.eye(rows.shape[1]), []
    for _ in range(count):
        chosen.append(int(np.argmax(np.einsum("ni,ij,nj->n", rows, posterior, rows))))
        way = posterior @ rows[chosen[-1]]
        posterior -= np.outer(way, way) / (1 + rows[chosen[-1]] @ way)
    return chosen


def row(potential: al.Potential, data: list[Atoms], temperature: float, room: int) -> dict[str, float]:
    """Shares of the log-determinant of greedy selection that the buffer and random frames reach."""
    settings = {
        "walkers": [{"temperature": temperature, "count": WALKERS}],
        "buffer": room // WALKERS,
        "when_full": "go_on",
        "admission": {"kind": "log_det"},
        **{"steps": STEPS, "chunk": STEPS, "trajectory_every": EVERY, "record_every": EVERY, "trace_every": EVERY},
    }
    everything = {"kind": "fixed", "record": 1e-9, "stop": 1e9}
    found = potential.explorer(settings).run([data[0]], everything, labelled=data, step=0)
    known = features(potential, data).astype(np.float32)
    whiten = np.asarray(LogDetAdmission().context(known, 0).map, np.float64)
    offered = features(potential, [frame for frames in found.trajectories for frame in frames]) @ whiten
    best = log_det(offered[greedy(offered, room)])
    draws = [np.random.default_rng(n).choice(len(offered), room, replace=False) for n in range(20)]
    held = log_det(features(potential, found.recorded) @ whiten)
    return {
        "temperature": temperature,
        "room": room,
        "offered": len(offered),
        "held": len(found.recorded),
        "share": round(held / best, 4),
        "share_random": round(float(np.mean([log_det(offered[some]) for some in draws])) / best, 4),
    }


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a campaign")
    parser.add_argument("--rounds", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--out", type=Path, default=HERE / "results.csv")
    options = parser.parse_args()
    al.prepare_jax()
    rows = []
    for number in options.rounds:
        folder = options.run / "rounds" / f"{number:03d}"
        potential, data = al.load(folder / "potential"), al.read_structures(folder / "dataset.extxyz")
        for room in (16, 64):
            for temperature in (300, 600):
                about = {"round": number, "labels": len(data)}
                rows.append(about | row(potential, data, temperature, room))
                print(rows[-1], flush=True)
                pd.DataFrame(rows).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
