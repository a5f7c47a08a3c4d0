"""What the study is made on: a pool with dear labels, tests, and a teacher's frames; one function a system."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import silicon
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from almlip_jax.oracles import Labeller, LabelStore, MDRun, TBLiteSettings, run_label_md
from almlip_jax.structures.io import read_structures, write_structures

TEMPERATURES, EVERY = (300.0, 600.0, 900.0), 20
BLOCK = 40  # frames of the Zundel file; every fifth such block is the test


@dataclass(frozen=True)
class System:
    """Where labels are to be saved.

    Attributes:
        pool: structures with the labels that are dear.
        tests: sets that nothing is chosen from, by name.
        frames: with the labels of the teacher.
        model: settings of the architecture, whose size is `Namespace.size`.
    """

    pool: list[Atoms]
    tests: dict[str, list[Atoms]]
    frames: list[Atoms]
    model: dict[str, Any]


def acac(options: Namespace) -> System:
    """Acetylacetone with PBE labels, pool of dynamics at 600 K.

    The teacher is GFN2-xTB, Nequix omat-1 on its frames, or the mean of both.
    """
    folder = Path(options.data) / "acac"
    pool = read_structures(folder / "train_600K.xyz", require_labels=True)
    files = {"300K": "test_MD_300K.xyz", "600K": "test_MD_600K.xyz"}
    tests = {name: read_structures(folder / file, require_labels=True) for name, file in files.items()}
    return System(pool, tests, teachers(options, pool[0], "nequix-omat-1.nqx"), {"size": options.size})


def zundel(options: Namespace) -> System:
    """The Zundel cation with labels of FHI-aims; every fifth block of the frames is the test.

    The teacher is GFN2-xTB, Nequix mp-1, which knows no charge, on its frames, or the mean of both.
    """
    frames = read_structures(Path(options.data) / "protonated_water" / "zundel.extxyz", require_labels=True)
    for frame in frames:
        frame.info["charge"] = 1
    parts: dict[bool, list[Atoms]] = {True: [], False: []}
    for number, frame in enumerate(frames):
        parts[number // BLOCK % 5 == 4].append(frame)
    taught = teachers(options, frames[0], "nequix-mp-1.nqx")
    return System(parts[False], {"held out": parts[True]}, taught, {"size": options.size})


def teachers(options: Namespace, start: Atoms, weights: str) -> list[Atoms]:
    """Frames of dynamics with GFN2-xTB, with its labels, those of a foundation model, or the mean of both."""
    frames = tight_binding(options, start)
    if options.teacher == "xtb":
        return frames
    file = frames_of(options)
    better = file.parent / "nequix" / file.name
    if not better.exists():
        raise SystemExit(f"{better} is not there; {labelling(file, better.parent, weights)} makes it.")
    nearer = read_structures(better, require_labels=True)
    return nearer if options.teacher == "nequix" else [mean(pair) for pair in zip(frames, nearer, strict=True)]


def mean(labels: Sequence[Atoms]) -> Atoms:
    """A molecule with the mean of some labels of it, as the label source ``kind: mean`` makes them."""
    energies, forces = [one.get_potential_energy() for one in labels], [one.get_forces() for one in labels]
    found = labels[0].copy()
    found.calc = SinglePointCalculator(found, energy=float(np.mean(energies)), forces=np.mean(forces, axis=0))
    return found


def labelling(file: Path, folder: Path, weights: str = "FILE.nqx") -> str:
    """The command by which Nequix labels a file."""
    return f"python experiments/nequix_labels/run.py {file} --weights {weights} --out {folder}"


def frames_of(options: Namespace) -> Path:
    """The file of GFN2-xTB's frames."""
    return Path(options.teacher_frames / f"{options.system}_{options.frames}.extxyz")


def tight_binding(options: Namespace, start: Atoms) -> list[Atoms]:
    """Frames of dynamics with GFN2-xTB, made once."""
    file = frames_of(options)
    if not file.exists():
        runs = [
            MDRun(t, -(-options.frames // len(TEMPERATURES)) * EVERY, every=EVERY, equilibration=200)
            for t in TEMPERATURES
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        store = file.with_suffix(".db")
        with LabelStore(store) as opened, Labeller(TBLiteSettings(), opened) as labeller:
            found = run_label_md(start, labeller, runs, seed=0, purpose="teacher")
        write_structures(file, [frame for trajectory in found for frame in trajectory.frames])
    return read_structures(file, require_labels=True)


def mlearn_silicon(options: Namespace) -> System:
    """Silicon of the mlearn set (PBE); teacher Nequix, on cells of our own or on those of the pool too."""
    folder = Path(options.data) / "mlearn"
    pool, test = (read_structures(folder / f"Si_{part}.extxyz", require_labels=True) for part in ("train", "test"))
    file = options.teacher_frames / f"silicon_{options.cells}.extxyz"
    if not file.exists():
        bare = options.teacher_frames / "unlabelled" / file.name
        bare.parent.mkdir(parents=True, exist_ok=True)
        write_structures(bare, silicon.made() + (silicon.around(pool) if options.cells == "pool" else []))
        raise SystemExit(f"{file} is not there; {labelling(bare, file.parent)} makes it.")
    taught = read_structures(file, require_labels=True)
    return System(pool, {"test": test}, taught, {"size": options.size, "cutoff": 5.0})


SYSTEMS: dict[str, Callable[[Namespace], System]] = {"acac": acac, "zundel": zundel, "silicon": mlearn_silicon}
