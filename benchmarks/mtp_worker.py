"""The peer's side of ``mtp.py``: moment tensor potentials by motep, run with a Python that has it.

Answers each line of standard input, ``FILE CALLS``, with JSON: energy, forces and stress of the first call, and seconds
of the process for each call, of the ASE calculator and of its engine alone.  Neighbours stay listed between calls.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from motep.calculator import MTP
from motep.io.mlip.mtp import read_mtp


@cache
def prepared(file: str) -> tuple[Atoms, MTP]:
    """The structure and its calculator, which has been used once."""
    data = read_mtp(file)
    data.species = [14]
    atoms = Atoms(**json.loads(Path(file).with_name("structure.json").read_text()))
    atoms.calc = MTP(data)
    atoms.get_forces()
    return atoms, atoms.calc


def answer(file: str, calls: int) -> dict[str, Any]:
    """Results of the structure as it is, and seconds of calls with atoms that move."""
    atoms, calculator = prepared(file)
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
    found = {name: np.asarray(value).tolist() for name, value in results.items()}
    start, seconds, inside = atoms.positions.copy(), [], []
    for call in range(calls):
        atoms.positions = start + 1e-4 * np.sin(call + np.arange(start.size).reshape(start.shape))
        began = time.process_time()
        calculator.calculate(atoms, ["energy", "forces", "stress"])
        seconds.append(time.process_time() - began)
        began = time.process_time()
        calculator.engine._calculate(atoms)
        inside.append(time.process_time() - began)
    atoms.positions = start
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return found | {"seconds": seconds, "inside": inside, "version": version("motep"), "cores": cores}


for line in sys.stdin:
    name, count = line.split()
    print(json.dumps(answer(name, int(count))), flush=True)
