"""Pool and tests from Carbon-24: ``python experiments/unlike_pool/split.py --data DIR --out runs/unlike_pool``.

Of the carbon crystals of random structure search (Pickard, Materials Cloud 2020.0026) with forces and stresses, a
random quarter becomes the test ``test.extxyz``, the densest quarter of that ``densest.extxyz``, and the rest
``pool.extxyz``.  Structures whose largest force is above ``--most-force`` are left out of all three.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from almlip_jax.structures.io import read_structures, write_structures

FILE = Path("carbon24") / "carbon24_nequix.extxyz"


def main() -> None:
    """Writes the three files, once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="folder of data sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--most-force", type=float, default=15.0, help="eV/Angstrom")
    given = parser.parse_args()
    if given.data is None:
        parser.error("--data or the variable ALMLIP_DATA_DIR has to name the folder of data sets.")
    if (given.out / "pool.extxyz").exists():
        print(f"{given.out} holds a pool already.")
        return
    frames = read_structures(Path(given.data) / FILE, require_labels=True)
    largest = np.array([np.linalg.norm(frame.get_forces(), axis=1).max() for frame in frames])
    calm = [frame for frame, force in zip(frames, largest, strict=True) if force <= given.most_force]
    order = np.random.default_rng(0).permutation(len(calm))
    test, pool = ([calm[n] for n in some] for some in np.split(order, [len(calm) // 4]))
    volumes = np.array([frame.get_volume() / len(frame) for frame in test])
    dense = [test[n] for n in np.flatnonzero(volumes <= np.quantile(volumes, 0.25))]
    given.out.mkdir(parents=True, exist_ok=True)
    for name, some in (("test", test), ("densest", dense), ("pool", pool)):  # the pool last: it says that all is there
        write_structures(given.out / f"{name}.extxyz", some)
    print(
        f"{len(pool)} structures in the pool, {len(test)} in the test, {len(dense)} of them the densest; left out: "
        f"{len(frames) - len(calm)}."
    )


if __name__ == "__main__":
    main()
