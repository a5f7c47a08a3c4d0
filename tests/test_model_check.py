"""A model of a user's own is checked before it is trained: what breaks a promise is refused, with a sentence."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from ase.build import bulk, molecule

from almlip_jax import check_model
from almlip_jax.ensembles import Ensemble
from almlip_jax.errors import InputError
from almlip_jax.models import ModelSettings, build_model
from almlip_jax.models.user import UserModelSettings
from almlip_jax.structures.graph import lone_atoms, without_places
from almlip_jax.structures.species import SpeciesTable

PAGE = (Path(__file__).parents[1] / "docs" / "tutorials" / "model.md").read_text()
CODE = re.search(r"```python\n(# my_models.py\n.*?)^```$", PAGE, re.DOTALL | re.MULTILINE).group(1)
WATER = molecule("H2O")
WATER.rattle(0.1, seed=1)
CRYSTAL = bulk("Cu", cubic=True)
CRYSTAL.rattle(0.1, seed=2)

_HALF_THE_ROWS = """    def linear(self, params, geometry, graph):
        return super().linear(params, geometry, graph)[:, ::2]

"""


@pytest.fixture
def refusal(with_module: Any) -> Any:
    """What is said of the page's model where some of its code is other code."""
    made = iter(range(100))

    def of(*changes: tuple[str, str], structures: Any = WATER) -> str | list[str]:
        code = CODE
        for old, new in changes:
            assert code.count(old) == 1, old
            code = code.replace(old, new)
        name = f"changed_{next(made)}"
        with_module(name, code)
        model = {"kind": "user", "function": f"{name}:make", "cutoff": 3.0, "parameters": {"functions": 3, "width": 3}}
        try:
            return check_model(model, structures)
        except InputError as error:
            return str(error)

    return of


def test_the_page_keeps_all_promises(refusal):
    assert refusal() == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("hidden = ", "hidden = jnp.sum(graph.vectors) + ", "reads the vectors, positions or cell of its graph"),
        ("graph.vectors, far)", "graph.vectors, 0)", "not finite; empty slots of a graph hold vectors of length 0"),
        ("jnp.sum(arrows**2, axis=-1)", "jnp.linalg.norm(arrows, axis=-1)", "forces are not finite; empty slots"),
        ("= jnp.tanh(hidden)", "= jnp.tanh(hidden) + graph.charge[graph.structure][:, None]", "charge or spin"),
        ("jnp.sum(arrows**2, axis=-1)", "arrows[..., 0]", "energies change where structures are turned"),
        ("polynomial_cutoff(distance, self.cutoff), 0", "1.0, 0", "two atoms at the cutoff"),
        ("(jnp.maximum(survey", "(0 * jnp.maximum(survey", "are not finite"),
        ('{"mean": mean, "spread"', '{"mean": mean[0], "spread"', "other names or shapes"),
        ('return params["constants"]["scale"]', 'return 2 * params["constants"]["scale"]', "column . of `linear`"),
        ("AtomicOutput(energy, features)", "AtomicOutput(energy, features**2)", "of `linear`"),
        ("    def last_scale", f"{_HALF_THE_ROWS}    def last_scale", "`linear` gives other rows than `features`"),
        ("AtomicOutput(energy, f", "AtomicOutput(energy + 0 * energy.sum() + geometry.sum(), f", "`local`"),
        ('"bias": 1, "last": 1', '"bias": 1', "`with_species` gives parameters of other names or shapes"),
        ("(params, fresh, self.species", "(fresh, fresh, wanted", "`with_species` changes energies"),
    ],
)
def test_what_breaks_a_promise_is_refused(refusal, old, new, told):
    assert re.search(told, str(refusal((old, new))))


def test_forces_that_a_derivative_of_ones_own_gets_wrong_are_refused(refusal):
    cut = "fade = jnp.where(graph.edge_mask, polynomial_cutoff(distance, self.cutoff), 0)"
    stopped = cut.replace("polynomial_cutoff(distance", "polynomial_cutoff(jax.lax.stop_gradient(distance)")
    assert "forces are not the derivatives of energies" in refusal((cut, stopped))


def test_what_need_not_be_there_is_remarked_on(refusal):
    without = re.search(r"        leading = .*?\n        return .*?\n", CODE).group(0)
    said = refusal((without, "        raise NotImplementedError\n"), ("def last(self", "def not_last(self"))
    assert [one.partition(" is not there")[0] for one in said] == ["`with_species`", "`last`"]


def test_an_attribute_that_is_missing_is_named(with_module):
    body = CODE.replace("class Network(LinearLast)", "class Network").replace("    local = True", "    here = True")
    with_module("bare", body)
    settings = ModelSettings.parse({"kind": "user", "function": "bare:make"})
    with pytest.raises(InputError, match=r"'bare:make' returns a Network that has no linear\(\)"):
        settings.build(SpeciesTable((1, 8)))
    with_module("bare_again", body.replace("    def last_scale", "    def linear(self): ...\n\n    def last_scale"))
    settings = ModelSettings.parse({"kind": "user", "function": "bare_again:make"})
    with pytest.raises(InputError, match="a model that does not say 'long_range'"):
        settings.build(SpeciesTable((1, 8)))
    with_module("loose", CODE.replace("@dataclass(frozen=True)", "@dataclass"))
    with pytest.raises(InputError, match="without a hash, by which programs are kept"):
        ModelSettings.parse({"kind": "user", "function": "loose:make"}).build(SpeciesTable((1, 8)))


def test_models_without_equality_are_made_once(with_module):
    """Programs are kept by models: one made anew in each round would compile them anew."""
    with_module("unequal", CODE.replace("@dataclass(frozen=True)", "@dataclass(eq=False)"))
    given = {"kind": "user", "function": "unequal:make", "parameters": {"width": 4}}
    one, two = (UserModelSettings.model_validate(given) for _ in range(2))
    assert one.build(SpeciesTable((1, 8))) is two.build(SpeciesTable((1, 8)))
    assert one.anew(SpeciesTable((1, 8))) != one.build(SpeciesTable((1, 8)))
    wider = UserModelSettings.model_validate(given | {"parameters": {"width": 5}})
    assert wider.build(SpeciesTable((1, 8))).width == 5
    assert one.build(SpeciesTable((1, 6))).species == SpeciesTable((1, 6))


def test_places_are_hidden_where_forces_would_not_follow():
    hidden = without_places(lone_atoms(1, jnp.dtype(jnp.float32)))
    assert len(jax.tree.leaves(hidden)) == 10  # the places alone are gone
    for look in (jnp.sum, lambda places: places.shape, lambda places: places[0], lambda places: 2 * places):
        for part in (hidden.vectors, hidden.positions, hidden.cell):
            with pytest.raises(InputError, match="forces would not follow"):
                look(part)


@dataclass(frozen=True)
class Peeking:
    """A model of ours that looks at positions where it holds parameters."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def apply(self, params: Any, geometry: Any, graph: Any) -> Any:
        output = self.inner.apply(params, geometry, graph)
        return replace(output, energy=output.energy + graph.positions[:, 0])


def test_an_ensemble_shows_no_places_to_what_holds_parameters():
    model = build_model(ModelSettings.parse({"kind": "mtp", "level": 2, "radial_basis_size": 2}), SpeciesTable((1, 8)))
    ensemble, graph = Ensemble(Peeking(model), 1), lone_atoms(2, jnp.dtype(jnp.float32))
    params = ensemble.init(jax.random.key(0))
    for function in (ensemble.predict, ensemble.atom_energies):
        with pytest.raises(InputError, match="in `apply`, which forces would not follow"):
            function(params, graph)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        {"size": "tiny", "cutoff": 4.0},
        {"size": "tiny", "layers": 1, "electronic_state": True, "species_channels": 1, "repulsion": True},
        {"size": "tiny", "cutoff": 4.0, "dipole": True},
        {"kind": "mace", "channels": 2, "cutoff": 3.0, "l_max": 1, "correlation": 2},
        {"kind": "nequip", "channels": 2, "cutoff": 3.0, "layers": 2, "l_max": 1},
        {"kind": "mtp", "level": 4, "cutoff": 3.0, "min_dist": 0.8},
    ],
    ids=lambda model: "-".join(map(str, model.values())),
)
def test_our_own_keep_all_promises(model):
    periodic = not model.get("dipole")
    assert check_model(model, [WATER, CRYSTAL] if periodic else [WATER]) == []
