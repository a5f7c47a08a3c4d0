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

PLUGIN = '''
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from almlip_jax.models import AtomicOutput, LinearLast, ModelSettings
from almlip_jax.structures.species import SpeciesTable

@dataclass(frozen=True)
class Pairs(LinearLast):
    """A sum over Gaussians of distances, linear in them, for each pair of species."""

    cutoff: float
    species: SpeciesTable
    width: int
    small_members = True
    long_range = False
    sees_state = False
    local = True

    @property
    def num_species(self):
        return len(self.species)

    def geometry(self, graph):
        far = jnp.array([0.0, 0.0, self.cutoff], graph.vectors.dtype)
        r = jnp.sqrt(jnp.sum(jnp.where(graph.edge_mask[..., None], graph.vectors, far) ** 2, axis=-1))
        fade = jnp.where(graph.edge_mask, (1 - (r / self.cutoff) ** 2) ** 3, 0)
        basis = jnp.exp(-4 * (r[..., None] - jnp.linspace(0.5, self.cutoff, self.width, dtype=r.dtype)) ** 2)
        other = jax.nn.one_hot(graph.species[graph.neighbors], self.num_species, dtype=r.dtype)
        return jnp.einsum("ak,akb,aks->asb", fade, basis, other).reshape(len(r), -1)

    def init(self, key):
        return {"last": 0.1 * jax.random.normal(key, (self.num_species, self.num_species * self.width))}

    def survey(self, graph):
        return jnp.zeros(())

    def standardise(self, params, survey, energy_scale):
        return params

    def with_species(self, params, fresh, wanted):
        raise NotImplementedError

    def apply(self, params, geometry, graph):
        return AtomicOutput(jnp.sum(geometry * params["last"][graph.species], axis=-1), geometry)

    def last_scale(self, params):
        return jnp.ones(())

class PairSettings(ModelSettings):
    """Pairs alone."""

    kind: Literal["pairs"] = "pairs"
    width: int = 6

    def build(self, species):
        return Pairs(self.cutoff, species, self.width)

def make(species, cutoff, width=6):
    return Pairs(cutoff, species, width)
'''
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
user = ModelSettings.parse({"kind": "user", "function": "other_kinds:make", "cutoff": 4.0, "repulsion": True})
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
