"""Models of other packages and of users: trained, saved and read again as our own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from almlip_jax.errors import InputError
from almlip_jax.models import ModelSettings
from almlip_jax.potential import Potential

PLUGIN = (
    (Path(__file__).parents[1] / "training" / "pair_model.py").read_text()
    + '''
from typing import Literal

from almlip_jax.models import ModelSettings

class PairSettings(ModelSettings):
    """Pairs alone."""

    kind: Literal["pairs"] = "pairs"
    width: int = 6

    def build(self, species):
        return Pairs(species, self.cutoff, self.width)
'''
)
USE = """
import sys
import numpy as np
from ase.build import molecule
from ase.calculators.emt import EMT
from almlip_jax.ensembles import EnsembleSettings
from almlip_jax.fitting import fit_potential
from almlip_jax.models import ModelSettings, build_model
from almlip_jax.potential import Potential
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import TrainingSettings

frames = []
for seed in range(8):
    atoms = molecule("H2O")
    atoms.rattle(0.08, seed=seed)
    atoms.calc = EMT()
    atoms.get_forces()
    frames.append(atoms)
settings = ModelSettings.parse({"kind": "pairs", "cutoff": 4.0, "repulsion": True})
user = ModelSettings.parse({"kind": "user", "function": "other_kinds:Pairs", "cutoff": 4.0, "repulsion": True})
water = SpeciesTable((1, 8))
assert build_model(settings, water, (1,)) == build_model(user, water, (1,))
training = TrainingSettings(max_steps=200, batch_size=4, validation_fraction=0.25, learning_rate=0.02)
def spread(): return float(np.std([atoms.get_forces() for atoms in frames]))
potential, result = fit_potential(frames, settings, EnsembleSettings(size=2), training, 0)
potential.save(sys.argv[1])
again = Potential.load(sys.argv[1]).evaluate(frames)
error = float(np.sqrt(np.mean([(a - b.get_forces()) ** 2 for a, b in zip(again.forces, frames)])))
assert np.array_equal(np.concatenate(again.forces), np.concatenate(potential.evaluate(frames).forces))
print(error / spread())
"""


def test_a_model_of_another_package_trains_and_is_read_again(with_package: Callable, tmp_path: Path) -> None:
    command = [sys.executable, "-c", USE, str(tmp_path / "potential")]
    done = subprocess.run(command, capture_output=True, text=True, env=with_package(PLUGIN))
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 0.6  # of their spread: a few steps teach something
    with pytest.raises(InputError, match="kind 'pairs', which the package 'other-kinds' adds; install that"):
        Potential.load(tmp_path / "potential")


def test_a_users_model_is_what_it_is_asked_for() -> None:
    settings = ModelSettings.parse({"kind": "user", "function": "not_there:make"})
    with pytest.raises(InputError, match="'not_there:make' cannot be imported"):
        settings.build(None)
    settings = ModelSettings.parse({"kind": "user", "function": "builtins:dict", "parameters": {"width": 3}})
    with pytest.raises(InputError, match=r"returns a dict that has no geometry\(\)"):
        settings.build(None)
    assert ModelSettings.parse({"cutoff": 4}).kind == "shared_density"
