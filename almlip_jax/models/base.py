"""What a model is to the rest of the package: geometry without parameters, then per-atom energies and features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import Field

from almlip_jax.errors import InputError
from almlip_jax.kinds import Spec
from almlip_jax.settings import unit
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.species import SpeciesTable

Width = Annotated[int, Field(ge=1, le=4096)]
"""Of a layer of an MLP."""

Params: TypeAlias = Any
"""A pytree of parameter arrays; with a leading member axis it belongs to an ensemble."""

Geometry: TypeAlias = Any
"""A pytree of arrays that a model derives from a graph without using a parameter."""

Survey: TypeAlias = Any
"""A pytree of sums over atoms, from which a model's constants follow; surveys of graphs add up to one of all."""


@struct.dataclass
class AtomicOutput:
    """What a model gives for each atom, and besides.

    Attributes:
        energy: [A] eV, contribution of each atom relative to its reference energy (padding atoms: any finite number).
        features: [A, F] invariant features: the inputs of the last, linear layer.
        code: [A, Q] what that layer tells central species apart by, where this is not one by one; see `linear_rows`.
        further: name -> [S, ...] of structures or [A, ...] of atoms, as the target is declared (`targets`): each of
            those that the model says it gives; padding: any finite numbers.
    """

    energy: jax.Array
    features: jax.Array
    code: jax.Array | None = None
    further: Mapping[str, jax.Array] = field(default_factory=dict)


def linear_rows(features: jax.Array, code: jax.Array | None, graph: Graph, num_species: int) -> jax.Array:
    """Products of features and species code: what the weights of a last, linear layer are multiplied by.

    Args:
        features: [A, F] of each atom.
        code: [A, Q] of its species; None where species are told apart one by one, with a weight for each of them.
        graph: whose atoms these are.
        num_species: length of the species table.

    Returns:
        [A, Q * F], in the order of weights [Q, F]; up to a factor that is the same for all atoms the gradient of an
        atom's energy with respect to them.
    """
    chosen = jax.nn.one_hot(graph.species, num_species, dtype=features.dtype) if code is None else code
    return (chosen[:, :, None] * features[:, None, :]).reshape(features.shape[0], -1)


LEAST_SQUARE = 1e-4
"""Mean square below which a sum over neighbours counts as empty: a single one close to the cutoff."""


def sums_by_degree(squares: jax.Array, incoherent: jax.Array, graph: Graph, l_max: int) -> Survey:
    """A survey of sums over neighbours.

    Args:
        squares: [(l_max + 1)^2, A] mean square of each component.
        incoherent: [(l_max + 1)^2, A] the same if the neighbours' contributions had random signs.
        graph: whose atoms these are.
        l_max: highest degree.

    Returns:
        sums over the atoms, of each degree its mean over components: ``squares`` and ``incoherent`` [l_max + 1], and
        the number of ``atoms``.
    """

    def of_degrees(values: jax.Array) -> jax.Array:
        total = jnp.sum(jnp.where(graph.atom_mask, values, 0), axis=-1)
        return jnp.stack([jnp.mean(total[l * l : (l + 1) ** 2]) for l in range(l_max + 1)])

    atoms = jnp.sum(graph.atom_mask.astype(squares.dtype))
    return {"squares": of_degrees(squares), "incoherent": of_degrees(incoherent), "atoms": atoms}


METHODS = ("geometry", "init", "survey", "standardise", "with_species", "apply", "last_scale", "linear")
ATTRIBUTES = ("cutoff", "species", "num_species", "small_members", "long_range", "local")
"""What every `Model` has; those of users need not say ``targets``, ``sees_state`` and ``constant_alone``, where there
is nothing to say."""


class Model(Protocol):
    """A graph goes in, per-atom energies and features come out; pure functions throughout.

    `geometry` depends on no parameter.  An ensemble therefore computes it once for all of its members, and in the
    backward pass each member pays only for its transposed map.
    """

    @property
    def cutoff(self) -> float:
        """Angstrom; edges beyond it do not exist."""
        ...

    @property
    def species(self) -> SpeciesTable:
        """The elements it knows."""
        ...

    @property
    def num_species(self) -> int:
        """Length of the species table."""
        ...

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of what it gives besides the energy and what is derived from it (`targets`)."""
        ...

    @property
    def small_members(self) -> bool:
        """Whether parameters act only on what has been summed over neighbours, so that a member's arrays are small."""
        ...

    @property
    def sees_state(self) -> bool:
        """Whether energies depend on ``graph.charge`` and ``graph.spin``."""
        ...

    @property
    def constant_alone(self) -> bool:
        """Whether features of isolated atoms are constants that every atom of their species has, and nothing else.

        The last layer then has an energy for each species.
        """
        ...

    @property
    def long_range(self) -> bool:
        """Whether the geometry reads ``graph.positions`` and ``graph.cell``, which other models are not shown."""
        ...

    @property
    def local(self) -> bool:
        """Whether an atom's energy and features depend on its own edges and the species at their ends alone."""
        ...

    def geometry(self, graph: Graph) -> Geometry:
        """Functions that hold no parameter, differentiable in what they read of the places of a graph.

        That is ``graph.vectors``; and, of a model of long range, ``graph.positions`` and ``graph.cell``: forces and
        virial follow from the derivatives by all of these.  The energy must not change with the origin of the
        positions, or with the image of the cell that an atom stands in.
        """
        ...

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of one model, for densities and energies of order one."""
        ...

    def survey(self, graph: Graph) -> Survey:
        """What `standardise` has to know of some structures, as sums over their atoms."""
        ...

    def standardise(self, params: Params, survey: Survey, energy_scale: float) -> Params:
        """The parameters with their constants set from data: training does not change them again.

        Args:
            params: of one model.
            survey: of the structures to be learned from, the sum of those of all batches; inputs are scaled to order
                one on them, but no further up than disorder would do (perfect crystals have no density of some
                degrees).
            energy_scale: eV, by how much the energy of an atom varies.
        """
        ...

    def with_species(self, params: Params, fresh: Params, wanted: SpeciesTable) -> Params:
        """Parameters for more species that predict the same as before for the old ones.

        Args:
            params: of one model.
            fresh: parameters of the same architecture for ``wanted``: what new species begin with.  Its constants are
                set for structures that hold these, and those of ``params`` are what is kept: where a constant
                multiplies what is new, this makes up for the difference.
            wanted: species table that holds all of the old ones.

        Raises:
            InputError: a species would be lost, or there are too many to be told apart as the old ones are.
        """
        ...

    def apply(self, params: Params, geometry: Geometry, graph: Graph) -> AtomicOutput:
        """Energies and features from the geometry; must not read the places of the graph (vectors, positions, cell).

        They are not shown to a model that gives nothing besides; what it does give (``further``) may read them.
        """
        ...

    def last_scale(self, params: Params) -> jax.Array:
        """Of the last layer, []: energies are this times the sum of its weights times `linear_rows`, and the rest."""
        ...

    def linear(self, params: Params, geometry: Geometry, graph: Graph) -> jax.Array:
        """Gradient of each atom's energy with respect to the weights of the last, linear layer, [A, d].

        Last-layer features, extrapolation grades and last-layer posteriors are made of these rows.
        """
        ...


def check_attributes(model: Any, what: str) -> None:
    """Refuses a model that lacks what every model has, by which programs are kept and evaluations decide.

    Args:
        model: of anybody's.
        what: it is, with which the sentence begins.

    Raises:
        InputError: names the first thing that is missing.
    """
    for name in METHODS:
        if not callable(getattr(model, name, None)):
            raise InputError(f"{what} that has no {name}() ({type(model).__name__}).")
    for name in ATTRIBUTES:
        if not hasattr(model, name):
            raise InputError(f"{what} that does not say '{name}' ({type(model).__name__}); see `models.Model`.")
    try:
        hash(model)
    except TypeError as error:
        raise InputError(
            f"{what} without a hash, by which programs are kept; freeze its dataclass ({error})."
        ) from error


class LastLayer(NamedTuple):
    """The last, linear layer of a model, with a leading axis of an ensemble.

    Attributes:
        weights: [d], in the order of `linear_rows`.
        levels: [S] eV, what it adds to the energy of an atom of each species whatever its features.
    """

    weights: jax.Array
    levels: jax.Array


def silent_last(model: Any) -> InputError:
    """The error of a model that does not say what its last layer has learned."""
    return InputError(
        f"the model {type(model).__name__} does not say what its last layer has learned (method `last`, see "
        "`models.LinearLast`), which a teacher's frames need that are seen again: add it, or leave teacher.replay at 0."
    )


class LinearLast(ABC):
    """A model whose last layer is linear in its features, with weights for what tells central species apart.

    What is said of it by default holds for every model, if not at the best speed: it gives an energy alone, looks at
    edges alone, and sees neither charge nor spin; nothing is assumed of how far an atom sees, or of its arrays.
    """

    @property
    def targets(self) -> tuple[str, ...]:
        """See `Model.targets`."""
        return ()

    @property
    def small_members(self) -> bool:
        """See `Model.small_members`: a model that is called large is evaluated member by member on a CPU."""
        return False

    @property
    def sees_state(self) -> bool:
        """See `Model.sees_state`."""
        return False

    @property
    def constant_alone(self) -> bool:
        """See `Model.constant_alone`."""
        return False

    @property
    def long_range(self) -> bool:
        """See `Model.long_range`."""
        return False

    @property
    def local(self) -> bool:
        """See `Model.local`: of a model that is called local, many atoms are evaluated in blocks."""
        return False

    @property
    def last_names(self) -> tuple[str, ...]:
        """Parameters without which the energy is 0; none where the model does not say."""
        return ()

    @property
    @abstractmethod
    def num_species(self) -> int:
        """Length of the species table."""

    @abstractmethod
    def apply(self, params: Params, geometry: Any, graph: Graph) -> AtomicOutput:
        """See `Model.apply`."""

    @abstractmethod
    def last_scale(self, params: Params) -> jax.Array:
        """See `Model.last_scale`."""

    def last(self, params: Params) -> LastLayer:
        """What is learned of the last layer: its energies are `last_scale` times weights times rows, plus levels.

        Trainings in which a second label source has a last layer of its own look at it, and nothing else does.

        Raises:
            InputError: the model does not say.
        """
        raise silent_last(self)

    def linear(self, params: Params, geometry: Any, graph: Graph) -> jax.Array:
        """Gradient of each atom's energy with respect to the weights of the last layer, [A, d]; see `Model.linear`."""
        output = self.apply(params, geometry, graph)
        return self.last_scale(params) * linear_rows(output.features, output.code, graph, self.num_species)


def how_given(target: str) -> str:
    """What to do to have a model that gives a target which not every model gives."""
    flagged = any(target in kind.model_fields for kind in ModelSettings.kinds().values())
    return f"set model.{target}: true" if flagged else "take a model that gives it"


class ModelSettings(Spec):
    """Settings of any model; the shared-density model where they name no kind."""

    default_kind: ClassVar[str | None] = "shared_density"
    separable: ClassVar[bool] = False
    """Whether the model is linear in most parameters and says so (`separable.Separable`)."""

    cutoff: float = Field(default=5.0, ge=1.0, le=20.0, json_schema_extra=unit("Angstrom"))
    """Radius of an atom's surroundings, Angstrom."""
    repulsion: bool = False
    """Whether the Ziegler-Biersack-Littmark repulsion of bare nuclei is added at short distances."""

    @abstractmethod
    def build(self, species: SpeciesTable) -> Model:
        """The model for a species table, without the repulsion.

        Raises:
            InputError: a user's model cannot be imported or built.
        """

    @property
    def further(self) -> tuple[str, ...]:
        """Names of what the model gives besides the energy and what is derived from it, its `Model.targets`."""
        return ()

    def kept_beside(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """What stays of these settings where others are given: all that is not decided by a setting that changes."""
        return self.model_dump()

    def changed(self, changes: Mapping[str, Any]) -> ModelSettings:
        """Settings with other values; of another kind, these keep the cutoff alone.

        Raises:
            ValidationError: they are not valid.
        """
        same = changes.get("kind", self.kind) == self.kind
        return ModelSettings.parse((self.kept_beside(changes) if same else {"cutoff": self.cutoff}) | dict(changes))
