"""Path integrals of the Zundel cation with a committee in i-PI: ``python experiments/ipi_zundel/run.py``.

A small committee is trained on GFN2-xTB labels of frames of classical dynamics whose atoms were moved as far as
zero-point motion moves them.  It drives the cation in i-PI at 300 K, classically (one bead) and as a ring polymer.  The
distance of the oxygens and the place of the proton between them are averaged over frames and beads; error bars come
from blocks of the run, and, by ``i-pi-committee-reweight``, from the members: what each of them would have given.  A
potential or run that is there already is used as it is; a file ``EXIT`` in the folder of a run ends it early.  Rows in
``results.csv``.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import iread
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.units import Hartree, fs, kB

from almlip_jax.compilation import prepare_jax
from almlip_jax.ensembles import EnsembleSettings
from almlip_jax.evaluation import error_metrics
from almlip_jax.fitting import fit_potential
from almlip_jax.interfaces import ipi_driver
from almlip_jax.models import SharedDensitySettings
from almlip_jax.oracles.base import obtain_label
from almlip_jax.oracles.sources.xtb import TBLiteSettings
from almlip_jax.potential import Potential
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.training import TrainingSettings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Driving

HERE = Path(__file__).resolve().parent
START = HERE.parents[1] / "configs" / "zundel.xyz"
SOURCE = TBLiteSettings()
WIDTHS = {1: 0.1, 8: 0.03}  # Angstrom, of the zero-point motion of hydrogen and oxygen along each axis
TEMPERATURE = 300.0  # K
EVERY = 10  # steps between two frames
BLOCKS = 10
FRAMES, TESTED = 700, 100
OBSERVABLES = ("oxygen_distance", "proton_off_middle")
INPUT = """
<simulation verbosity='low'>
  <output prefix='run'>
    <properties filename='out' stride='{every}'>
      [step, time{{picosecond}}, conserved{{electronvolt}}, temperature{{kelvin}}, potential{{electronvolt}}]
    </properties>
    <trajectory filename='pos' stride='{every}' format='xyz'> positions{{angstrom}} </trajectory>
    <trajectory filename='committee_pot' stride='{every}' extra_type='committee_pot'> extras </trajectory>
  </output>
  <total_steps>{steps}</total_steps>
  <prng><seed>{seed}</seed></prng>
  <ffcommittee name='almlip'>
    <parse_json>True</parse_json>
    <ffdirect name='members'>
      <pes>custom</pes>
      <pes_path>{driver}</pes_path>
      <parameters>{{potential: {potential}, template: {template}}}</parameters>
    </ffdirect>
  </ffcommittee>
  <system>
    <initialize nbeads='{beads}'>
      <file mode='xyz'>start.xyz</file>
      <velocities mode='thermal' units='kelvin'>{temperature}</velocities>
    </initialize>
    <forces><force forcefield='almlip'/></forces>
    <motion mode='dynamics'>
      <dynamics mode='nvt'>
        <timestep units='femtosecond'>{timestep}</timestep>
        <thermostat mode='pile_l'><tau units='femtosecond'>100</tau></thermostat>
      </dynamics>
    </motion>
    <ensemble><temperature units='kelvin'>{temperature}</temperature></ensemble>
  </system>
</simulation>
"""


@dataclass(frozen=True)
class Run:
    """A run of i-PI.

    Attributes:
        beads: of the ring polymer; 1 is classical.
        steps: of the run.
        timestep: fs.
        seed: of i-PI's random numbers.
    """

    beads: int
    steps: int
    timestep: float = 0.5
    seed: int = 1


def labelled(file: Path) -> list[Atoms]:
    """Frames of classical dynamics at 400 K, every other one widened as beads of a ring polymer are spread."""
    if not file.exists():
        atoms, rng = read_structures(START)[0], np.random.default_rng(0)
        atoms.calc, label = Driving(SOURCE), SOURCE.build()
        MaxwellBoltzmannDistribution(atoms, temperature_K=400, rng=rng)
        dynamics = Langevin(atoms, 0.5 * fs, temperature_K=400, friction=0.02 / fs, rng=rng)
        widths = np.array([WIDTHS[number] for number in atoms.numbers])[:, None]
        frames = []
        for number in range(FRAMES):
            dynamics.run(8)
            frame = Atoms(atoms.numbers, atoms.positions, info=dict(atoms.info))
            frame.positions += (number % 4 > 0) * widths * rng.normal(size=frame.positions.shape)
            frames.append(obtain_label(label, SOURCE, frame, "").attach(frame))
        write_structures(file, frames)
    return read_structures(file)


def trained(frames: list[Atoms], folder: Path) -> None:
    """A committee, with its errors on frames that it was not trained on."""
    if not folder.exists():
        training = TrainingSettings(max_steps=4000)
        model, members = SharedDensitySettings(size="tiny"), EnsembleSettings(size=4)
        potential, _ = fit_potential(frames[:-TESTED], model, members, training, 0)
        potential.save(folder)
    errors = error_metrics(frames[-TESTED:], Potential.load(folder).evaluate(frames[-TESTED:]))
    print(f"forces_rmse {1e3 * errors['forces_rmse']:.1f} meV/A, energy {1e3 * errors['energy_rmse']:.2f} meV/atom")


def run(one: Run, potential: Path, start: Atoms, folder: Path) -> None:
    """Has i-PI do a run in a folder, unless it is there."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("run.*"):
        old.unlink()
    write_structures(folder / "start.extxyz", [start])
    comment = "# CELL(abcABC): 30 30 30 90 90 90 positions{angstrom} cell{angstrom}"
    lines = [str(len(start)), comment, *(f"{atom.symbol} {atom.x} {atom.y} {atom.z}" for atom in start)]
    (folder / "start.xyz").write_text("\n".join(lines) + "\n")
    text = INPUT.format(
        every=EVERY,
        steps=one.steps,
        seed=one.seed,
        driver=ipi_driver.__file__,
        potential=potential.resolve(),
        template=(folder / "start.extxyz").resolve(),
        beads=one.beads,
        temperature=TEMPERATURE,
        timestep=one.timestep,
    )
    (folder / "input.xml").write_text(text)
    subprocess.run([str(Path(sys.executable).parent / "i-pi"), "input.xml"], cwd=folder, check=True)
    (folder / "done").touch()


def observables(frames: list[Atoms]) -> np.ndarray:
    """Two lengths of each frame, [frames, 2] in Angstrom.

    The distance of the oxygens; and by how much the hydrogen that is nearest to their middle is nearer to one of them.
    """
    oxygen, hydrogen = (np.flatnonzero(frames[0].numbers == number) for number in (8, 1))
    rows = []
    for frame in frames:
        one, other = frame.positions[oxygen]
        off = np.linalg.norm(frame.positions[hydrogen] - 0.5 * (one + other), axis=1)
        proton = frame.positions[hydrogen[np.argmin(off)]]
        near = [float(np.linalg.norm(proton - end)) for end in (one, other)]
        rows.append([float(np.linalg.norm(one - other)), abs(near[0] - near[1])])
    return np.array(rows)


def sampled(folder: Path, skipped: float) -> tuple[np.ndarray, np.ndarray]:
    """Observables [frames, 2] and committee energies [frames, M] in hartree, both means over the beads."""
    positions, energies = sorted(folder.glob("run.pos_*.xyz")), sorted(folder.glob("run.committee_pot_*"))
    seen = [observables(list(iread(file, ":", format="xyz"))) for file in positions]
    members = [_numbers(file) for file in energies]
    last = min(map(len, (*seen, *members)))  # a run that was stopped may lack the last beads
    first = int(skipped * last)
    return np.mean([one[first:last] for one in seen], axis=0), np.mean([one[first:last] for one in members], axis=0)


def _numbers(file: Path) -> np.ndarray:
    rows = [line for line in file.read_text().splitlines() if line.strip() and "#" not in line]
    return np.array([[float(word.strip("[],")) for word in row.split()] for row in rows])


def reweighted(folder: Path, seen: np.ndarray, members: np.ndarray) -> np.ndarray:
    """What ``i-pi-committee-reweight`` says of each observable: mean, error of the committee, mean of each member."""
    np.savetxt(folder / "members.dat", members)
    np.savetxt(folder / "observables.dat", seen)
    program, kt = str(Path(sys.executable).parent / "i-pi-committee-reweight"), kB * TEMPERATURE / Hartree
    command = [program, "members.dat", "observables.dat", "--kt", str(kt)]
    found = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    return np.array([[float(word) for word in row.split()] for row in found.splitlines() if not row.startswith("#")])


def rows_of(one: Run, folder: Path, skipped: float) -> list[dict[str, object]]:
    """Averages of a run."""
    seen, members = sampled(folder, skipped)
    blocks = np.array([block.mean(axis=0) for block in np.array_split(seen, BLOCKS)])
    statistical = blocks.std(axis=0, ddof=1) / np.sqrt(BLOCKS)
    said = reweighted(folder, seen, members)
    times, conserved = np.loadtxt(folder / "run.out")[:, 1:3].T
    left = int(skipped * len(times))
    rows: list[dict[str, object]] = []
    for number, name in enumerate(OBSERVABLES):
        mean, committee = said[number, :2]
        values = {"mean": seen[:, number].mean(), "statistical": statistical[number]}
        values |= {"reweighted": mean, "committee": committee}
        numbers = {key: f"{value:.5f}" for key, value in values.items()}
        lengths = {"ps": f"{times[-1]:.2f}", "conserved_drift_ev": f"{conserved[-1] - conserved[left]:.4f}"}
        rows.append({"beads": one.beads, "observable": name, **numbers, **lengths})
    return rows


def main() -> None:
    """Trains, runs, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/ipi_zundel"))
    parser.add_argument("--beads", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--steps", type=int, nargs="+", default=[60_000, 20_000], help="of each number of beads")
    parser.add_argument("--skip", type=float, default=0.1, help="share of a run that is left out at its beginning")
    options = parser.parse_args()
    prepare_jax()
    options.out.mkdir(parents=True, exist_ok=True)
    frames = labelled(options.out / "frames.extxyz")
    trained(frames, options.out / "potential")
    start = read_structures(START)[0]
    rows: list[dict[str, object]] = []
    for beads, steps in zip(options.beads, options.steps, strict=True):
        one, folder = Run(beads, steps), options.out / f"beads-{beads}"
        run(one, options.out / "potential", start, folder)
        rows += rows_of(one, folder, options.skip)
        print(*rows[-len(OBSERVABLES) :], sep="\n", flush=True)
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
