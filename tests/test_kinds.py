"""Kinds register themselves, also those of other packages, and stand in configs, schema and messages like our own."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated, Literal, get_args

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from almlip_jax.dynamics.gates import GateSettings
from almlip_jax.features import FeatureMap
from almlip_jax.kinds import Named, Spec
from almlip_jax.names import Known
from almlip_jax.settings import Settings, settings_in
from almlip_jax.templates import KINDS


class Shape(Spec):
    """A family."""


class Round(Shape):
    """Kinds within a family."""


class Circle(Round):
    kind: Literal["circle"] = "circle"
    radius: float = Field(default=1.0, gt=0)


class Group(Round):
    kind: Literal["group"] = "group"
    parts: tuple[Shape, ...] = ()


class Square(Shape):
    kind: Literal["square"] = "square"


class Drawing(Settings):
    shape: Shape = Square()
    round: Round = Circle()


def test_a_field_takes_every_kind_of_its_family():
    found = Drawing.model_validate({"shape": {"kind": "group", "parts": [{"kind": "circle", "radius": 2}]}})
    assert found.shape == Group(parts=(Circle(radius=2),))
    assert Drawing.model_validate(found.model_dump(mode="json")) == found
    assert Drawing.model_validate({"round": {"radius": 3}}).round == Circle(radius=3)  # the kind of the default
    assert set(settings_in(Shape)) == {Circle, Group, Square} and set(settings_in(Round)) == {Circle, Group}
    schema = Drawing.model_json_schema()["properties"]
    assert set(schema["shape"]["discriminator"]["mapping"]) == {"circle", "group", "square"}


@pytest.mark.parametrize(
    ("given", "location", "problem"),
    [
        ({"shape": {"kind": "circel"}}, ("shape",), "union_tag_invalid"),
        ({"round": {"kind": "square"}}, ("round",), "union_tag_invalid"),
        (
            {"shape": {"kind": "group", "parts": [{"kind": "circle", "radius": -1}]}},
            ("shape", "group", "parts", 0, "circle", "radius"),
            "greater_than",
        ),
    ],
)
def test_problems_are_found_where_they_are(given, location, problem):
    with pytest.raises(ValidationError) as caught:
        Drawing.model_validate(given)
    (error,) = caught.value.errors()
    assert (error["loc"], error["type"]) == (location, problem)


def test_two_kinds_of_one_name_are_refused():
    with pytest.raises(TypeError, match="'square' of Shape is defined by"):
        type("Other", (Shape,), {"__annotations__": {"kind": Literal["square"]}, "kind": "square"})


def test_a_kind_that_leaves_something_undefined_is_refused():
    """Where it is defined, so that a package that adds it is named, and not where its settings are read."""
    with pytest.raises(TypeError, match=r"Every, kind 'every', does not define plain\(\)"):

        class Every(GateSettings):
            kind: Literal["every"] = "every"

    assert "every" not in GateSettings.kinds()


def test_a_kind_that_is_defined_anew_takes_the_place_of_the_old_one():
    """As in a notebook whose cell is run again."""
    for unit in ("m", "cm"):
        content = {
            "__module__": "notebook",
            "__qualname__": "Line",
            "__annotations__": {"kind": Literal["line"], "unit": str},
        }
        line = type("Line", (Shape,), content | {"kind": "line", "unit": unit})
        assert Drawing.model_validate({"shape": {"kind": "line"}}).shape == line(unit=unit)


def test_names_that_are_declared_pass_and_others_are_hinted_at():
    colours: list[str] = []
    field = TypeAdapter(Annotated[str, Known("colour", lambda: colours)])
    assert field.validate_python("anything") == "anything"  # where nobody declares any
    colours += ["red", "blue"]
    assert field.validate_python("red") == "red" and field.json_schema()["enum"] == ["red", "blue"]
    with pytest.raises(ValidationError, match="'bleu' is not a colour; did you mean 'blue'"):
        field.validate_python("bleu")
    with pytest.raises(ValueError, match="another feature map 'latent'"):
        FeatureMap("latent", "again", lambda seen, _: seen.prediction.energy.T)


OF_EVERY_FAMILY = """
from typing import Literal
from almlip_jax.kinds import Named, Spec

def nothing(self, *_, **__):
    return None

for family in [one for above in (Spec, Named) for one in above.__subclasses__() if one is not Named]:
    content = {name: nothing for name in (*family.__abstractmethods__, "explore")}
    content |= {"__module__": __name__, "__annotations__": {"kind": Literal["of_package"]}, "kind": "of_package"}
    type(f"Another{family.__name__}", (family,), content)
"""


def test_every_section_that_comes_in_kinds_takes_those_of_packages(with_kinds):
    """No field of any config is of one kind alone, or of some, and none of the families is out of reach of a config."""
    with_kinds(OF_EVERY_FAMILY)
    known = {}
    for config in KINDS.values():
        _settings_below(config, known)
    annotations = [field.annotation for model in known for field in model.model_fields.values()]
    held = {one for annotation in annotations for one in _classes(annotation) if issubclass(one, Spec)}
    assert not [one.__name__ for one in held if not one.is_open()]
    families = {one for above in (Spec, Named) for one in above.__subclasses__()} - {Named}
    families = {one for one in families if one.__module__.startswith("almlip_jax.")}
    assert len(families) >= 20 and families <= held
    assert all(family.parse({"kind": "of_package"}).package() == "other-kinds" for family in families)


def _settings_below(model, known):
    """All settings that those of a config may hold, and that these may."""
    known[model] = True
    for field in model.model_fields.values():
        for one in _classes(field.annotation):
            for choice in one.alternatives() if issubclass(one, Spec) else (one,):
                if issubclass(choice, Settings) and choice not in known:
                    _settings_below(choice, known)
    return known


def _classes(annotation):
    """The classes that an annotation names, in whatever they are put."""
    inside = get_args(annotation)
    return [one for part in inside for one in _classes(part)] if inside else [annotation] * isinstance(annotation, type)


PLUGIN = '''
from typing import Literal
from almlip_jax.campaign.choice import ExplorationChoice
from almlip_jax.features import FeatureMap
from almlip_jax.selection import Selector, WeighedSelector, top_k

FeatureMap("energies", "energies of the members", lambda seen, _: seen.prediction.energy.T)

class LowestSettings(WeighedSelector):
    """The lowest energy deviation."""

    kind: Literal["lowest"] = "lowest"
    weight: float = -1.0

    def build(self, k: int) -> Selector:
        def select(key, pool, labelled):
            scores = {"energy_std": self.weight * pool.scores["energy_std"]}
            return top_k(k, "energy_std")(key, pool.replace(scores=scores), labelled)

        return select
'''
USE = """
import almlip_jax.dynamics  # which is imported by what the package imports
import jax, numpy as np
from almlip_jax.campaign.settings import SelectionSettings
from almlip_jax.selection import Candidates, select

chosen = SelectionSettings.model_validate({"batch": 2, "selector": {"kind": "lowest"}})
pool = Candidates({}, {"energy_std": np.array([3.0, 1.0, 2.0])}, np.ones(3), np.ones(3, bool), np.arange(3))
print(select(chosen.selector.build(2), jax.random.key(0), pool, pool).indices.tolist())
print("lowest" in SelectionSettings.model_json_schema()["properties"]["selector"]["discriminator"]["mapping"])
far = SelectionSettings.model_validate({"selector": {"kind": "max_dist", "features": "energies"}})
print(far.selector.feature_names)
try:
    SelectionSettings.model_validate({"selector": {"kind": "lowst"}})
except ValueError as error:
    print("'lowest'" in str(error))
"""


def test_another_package_adds_a_kind(with_package):
    environment = with_package(PLUGIN)
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, env=environment)
    assert done.stdout.split("\n")[:4] == ["[1, 2]", "True", "('energies',)", "True"], done.stderr[-2000:]


def test_a_package_that_fails_is_named(with_package):
    """Once its kinds are asked for: loading our modules asks nothing of packages, which import them in turn."""
    environment = with_package("raise RuntimeError('no licence')")
    modules = "cli", "campaign", "campaign.report", "sweep", "simulation", "steps", "learner", "figures.command"
    code = "".join(f"import almlip_jax.{name}\n" for name in modules) + "print('loaded')\n" + USE
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("loaded")
    assert "the kinds of package 'other-kinds' cannot be loaded (RuntimeError: no licence)" in done.stderr
