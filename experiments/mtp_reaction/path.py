"""The path of CH4 + CN -> CH3 + HCN and dynamics around it, both with GFN2-xTB (doublet) in ASE."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.md.andersen import Andersen
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.optimize import LBFGS
from tblite.ase import TBLite

CARBON, HYDROGEN, CYANIDE = 0, 1, 5  # the methyl carbon, the hydrogen that moves, the carbon that takes it
GRID = np.round(np.arange(-1.5, 1.25, 0.1), 2)  # Angstrom, difference of the two distances of that hydrogen
STIFFNESS = 100.0  # eV/Angstrom^2
FIRST = Atoms(
    "CHHHHCN",
    [[0, 0, 0], [0, 0, 1.2]]
    + [[1.03 * np.cos(phi), 1.03 * np.sin(phi), -0.33] for phi in 2 * np.pi / 3 * np.arange(3)]
    + [[0.02, 0.01, 2.7], [0.03, 0, 3.87]],  # a little bent, so that nothing stays collinear for want of a force
    info={"charge": 0, "spin": 2},
)


def calculator() -> TBLite:
    """The label source, as `oracle: {kind: tblite}` has it."""
    return TBLite(method="GFN2-xTB", multiplicity=2, verbosity=0)


class Held(Calculator):
    """GFN2-xTB with a spring on the difference of the two distances of the hydrogen that moves."""

    implemented_properties = ("energy", "forces")

    def __init__(self, target: float) -> None:
        super().__init__()
        self.target, self.inner = target, calculator()

    def calculate(
        self, atoms: Atoms, properties: Sequence[str] = (), system_changes: Sequence[str] = all_changes
    ) -> None:
        """Energy and forces with the spring."""
        super().calculate(atoms, properties, system_changes)
        bare = atoms.copy()
        bare.calc = self.inner
        forces = bare.get_forces()
        first = atoms.positions[HYDROGEN] - atoms.positions[CARBON]
        second = atoms.positions[CYANIDE] - atoms.positions[HYDROGEN]
        a, b = np.linalg.norm(first), np.linalg.norm(second)
        excess, slope = a - b - self.target, np.zeros_like(forces)
        slope[CARBON] -= first / a
        slope[HYDROGEN] += first / a + second / b
        slope[CYANIDE] -= second / b
        energy = bare.get_potential_energy() + 0.5 * STIFFNESS * excess**2
        self.results = {"energy": energy, "forces": forces - STIFFNESS * excess * slope}


def difference(atoms: Atoms) -> float:
    """Distance of the hydrogen from the methyl carbon less that from the other, Angstrom."""
    return float(atoms.get_distance(CARBON, HYDROGEN) - atoms.get_distance(HYDROGEN, CYANIDE))


def relaxed_path() -> list[Atoms]:
    """Structures relaxed at each difference of `GRID`, from the complex outwards, without labels."""
    middle, found = int(np.argmin(np.abs(GRID + 0.3))), {}
    for order in (range(middle, len(GRID)), range(middle, -1, -1)):
        atoms = found.get(middle, FIRST).copy()
        for n in order:
            atoms.calc = Held(GRID[n])
            LBFGS(atoms, logfile=None, maxstep=0.1).run(fmax=0.02, steps=200)
            found[n] = atoms.copy()
            atoms = atoms.copy()
    return [found[n] for n in range(len(GRID))]


def andersen_frames(starts: Sequence[Atoms], seed: int, *, steps: int = 400, every: int = 40) -> list[Atoms]:
    """Frames of dynamics with GFN2-xTB at 300 K with the Andersen thermostat, 0.5 fs a step, from each start."""
    frames, rng = [], np.random.default_rng(seed)
    for start in starts:
        atoms = start.copy()
        atoms.calc = calculator()
        MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=rng)
        dynamics = Andersen(atoms, 0.5 * units.fs, temperature_K=300, andersen_prob=0.005, rng=rng)
        for _ in range(steps // every):
            dynamics.run(every)
            frames.append(Atoms(atoms.numbers, atoms.positions, info=dict(start.info)))
    return frames
