"""The moment tensor potential: energies linear in scalars that are contracted from moments of the neighbours.

The energy of atom i is a constant of its species plus a sum of basis functions B_a, scalars that products of moments
M[mu, nu] are contracted to (`basis`), with coefficients that do not depend on the species:

    V_i = species[z_i] + sum_a moment[a] B_a(M),    M[mu, nu] = sum_j f_mu(r_ij; z_i, z_j) u_ij x ... x u_ij.

Radial functions f_mu are sums of Chebyshev polynomials with coefficients of their own for each ordered pair of species
(`moments`).  Source: Shapeev, Multiscale Model. Simul. 14, 1153 (2016); several species and all conventions as in
Novikov et al., Mach. Learn.: Sci. Technol. 2, 025002 (2021).

The constants of the model are factors of what is learned, so that this is of order one: ``scaling`` of the radial
functions, ``moment_scale`` of each basis function, ``last_scale`` of the energy.  With all of them the function is
exactly the above (`coefficients`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field, ValidationInfo, model_validator

from almlip_jax.errors import InputError
from almlip_jax.models.base import (
    LEAST_SQUARE,
    AtomicOutput,
    LastLayer,
    LinearLast,
    ModelSettings,
    Params,
    Survey,
)
from almlip_jax.models.constants import CONSTANTS, with_constants
from almlip_jax.models.edges import Vectors, edge_vectors
from almlip_jax.models.mtp.basis import Basis, basis, directions
from almlip_jax.models.mtp.contractions import contract, factors_of, tree
from almlip_jax.models.mtp.derivatives import derivatives
from almlip_jax.models.mtp.moments import RadialBasis, basic_moments, powers_of_ranks, radial_functions
from almlip_jax.models.mtp.ranks import shape_of
from almlip_jax.models.mtp.recognised import level_of, recognised
from almlip_jax.models.mtp.text import MtpText, read_mtp
from almlip_jax.models.separable import Derivatives
from almlip_jax.models.species_code import exact_code
from almlip_jax.settings import Settings, located, unit
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.species import SpeciesTable

_LEAST_ORDER = 0.1  # least mean square of a rank, as a share of that of neighbours at random: symmetry may leave none
_LEVELS = 28  # the highest level whose basis is made
_ONE_LINE = r"^[^\r\n]*$"
_LAST = 0.1  # spread of the linear coefficients at the start: first forces are small and the first steps stable
_Order = Annotated[int, Field(ge=0, le=1000)]
_Place = Annotated[int, Field(ge=0, le=10**7)]
_Factor = Annotated[int, Field(ge=-(10**9), le=10**9)]


class BasisSettings(Settings):
    """A basis of a file that is none of ours; see `Basis`."""

    moments: tuple[tuple[_Order, _Order, _Order, _Order], ...]
    """Numbers mu, a, b, c of each basic moment."""
    products: tuple[tuple[_Place, _Place, _Factor, _Place], ...]
    """Rows i, j, factor, k: the moment k gains factor times those of i and j."""
    scalars: tuple[_Place, ...]
    """Which moments are basis functions."""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        try:
            factors_of(self.basis)
            tree(self.basis)
        except InputError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def basis(self) -> Basis:
        """As the rest of the package has it."""
        return Basis(self.moments, self.products, self.scalars)


class MtpSettings(ModelSettings):
    """Shape of the moment tensor potential; `cutoff` is its maximal distance."""

    separable: ClassVar[bool] = True

    kind: Literal["mtp"] = "mtp"
    level: int = Field(default=16, ge=2, le=_LEVELS, multiple_of=2)
    """Highest level of a basis function: an even number; 8 is small, 16 to 20 usual."""
    radial_basis_size: int = Field(default=8, ge=2, le=64)
    """Number of Chebyshev polynomials in a radial function."""
    min_dist: float = Field(default=1.0, ge=0.0, le=20.0, json_schema_extra=unit("Angstrom"))
    """Where the interval of the polynomials begins, Angstrom: a little less than the shortest distance that occurs.
    Below it they go on as the polynomials that they are."""
    scaling: float | None = Field(default=None, gt=0, le=1e6)
    """Factor of the radial functions; by default what makes moments of the training set of order one."""
    published: bool = True
    """Whether moments with mu > 5 or nu > 10 are left out as in published tables; matters from level 26 on."""
    basis: BasisSettings | None = None
    """A basis other than that of the level, as files may have; not meant to be written by hand."""
    potential_name: str | None = Field(default=None, pattern=_ONE_LINE)
    """Name in the ``.mtp`` files of the potential; MTP_L and the level where not given."""
    potential_tag: str = Field(default="", pattern=_ONE_LINE)
    """Free text in these files."""
    template: Path | None = None
    """A file of MLIP-2 (``.mtp``), trained or not: basis, number of polynomials, distances, name and tag and, where it
    has one, scaling are read from it where they are not given here."""

    @model_validator(mode="before")
    @classmethod
    def _take_template(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, Mapping) or not isinstance(given.get("template"), str | Path):
            return given
        folder = (info.context or {}).get("folder")
        path = Path(given["template"]) if folder is None else located(given["template"], Path, folder)
        try:
            return described(read_mtp(path)) | {key: value for key, value in given.items() if key != "template"}
        except InputError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _interval(self) -> Self:
        if not self.min_dist < self.cutoff:
            raise ValueError("min_dist must be less than the cutoff.")
        return self

    def build(self, species: SpeciesTable) -> Mtp:
        """See `Mtp`."""
        return Mtp(self.model_copy(update={"potential_name": None, "potential_tag": ""}), species)  # no part of it


def described(text: MtpText) -> dict[str, Any]:
    """What a file says of the settings of a model."""
    known, radial = recognised(text.basis), text.radial_basis
    given: dict[str, Any] = {
        "radial_basis_size": radial.size,
        "min_dist": radial.min_dist,
        "cutoff": radial.max_dist,
        "level": min(_LEVELS, 2 * -(-level_of(text.basis) // 2)) if known is None else known.level,
    }
    if text.scaling is not None:
        given["scaling"] = text.scaling
    given |= {"potential_name": text.name} if text.name else {}
    given |= {"potential_tag": text.tag} if text.tag else {}
    if known is None:
        return given | {"basis": BasisSettings(**text.basis._asdict())}
    return given | {"published": known.published}


@struct.dataclass
class EdgeVectors:
    """All that the model reads of a graph's places: components of the vectors of all edges, [A, K] each."""

    components: Vectors


@struct.dataclass
class Coefficients:
    """A moment tensor potential of some species as its formulas and files have it, without reference energies.

    Attributes:
        scaling: [].
        radial: [Z, Z, mu, R], of a central species and that of a neighbour.
        species: [Z] eV.
        moment: [S] eV.
    """

    scaling: jax.Array
    radial: jax.Array
    species: jax.Array
    moment: jax.Array


@dataclass(frozen=True)
class Mtp(LinearLast):
    """The model as pure functions; see the module's text.

    Parameters of one model: ``radial`` [Z, Z, mu, R], ``moment`` [S], ``species`` [Z]; constants ``scaling`` [],
    ``moment_scale`` [S], ``last_scale`` [].

    Attributes:
        settings: shape of the model.
        species: the species table.
    """

    settings: MtpSettings
    species: SpeciesTable
    targets: ClassVar[tuple[str, ...]] = ()
    small_members: ClassVar[bool] = True
    constant_alone: ClassVar[bool] = True  # all moments are 0
    long_range: ClassVar[bool] = False
    local: ClassVar[bool] = True
    sees_state: ClassVar[bool] = False

    @property
    def cutoff(self) -> float:
        """Angstrom."""
        return self.settings.cutoff

    @property
    def num_species(self) -> int:
        """Length of the species table."""
        return len(self.species)

    @property
    def basis(self) -> Basis:
        """Moments, products and scalars."""
        s = self.settings
        return basis(s.level, s.published) if s.basis is None else s.basis.basis

    @property
    def radial_basis(self) -> RadialBasis:
        """What radial functions are made of."""
        return RadialBasis(self.settings.radial_basis_size, self.settings.min_dist, self.settings.cutoff)

    def geometry(self, graph: Graph) -> EdgeVectors:
        """The vectors of the edges: what they give without a parameter is made with them, once for all members."""
        return EdgeVectors(edge_vectors(graph, self.cutoff))

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of one model: radial coefficients of variance 1/R, small linear ones, no energy of species.

        >>> from almlip_jax.structures.species import SpeciesTable
        >>> params = MtpSettings(level=8).build(SpeciesTable((3,))).init(jax.random.key(0))
        >>> params["radial"].shape, params["moment"].shape
        ((1, 1, 2, 8), (9,))
        """
        kinds, size, number = self.num_species, self.settings.radial_basis_size, len(self.basis.scalars)
        one, two = jax.random.split(key)
        radial = jax.random.normal(one, (kinds, kinds, self.basis.radial_functions, size)) / np.sqrt(size)
        scaling = 1.0 if self.settings.scaling is None else self.settings.scaling
        constants = {"scaling": jnp.full((), scaling), "moment_scale": jnp.ones(number), "last_scale": jnp.ones(())}
        moment = _LAST * jax.random.normal(two, (number,))
        return {"radial": radial, "moment": moment, "species": jnp.zeros(kinds), CONSTANTS: constants}

    def survey(self, graph: Graph) -> Survey:
        """Mean squares of the moments of each rank for random radial coefficients.

        Returns:
            sums over atoms: ``squares`` [highest rank + 1], ``incoherent`` [], the same if neighbours stood at random,
            and the number of ``atoms``.
        """
        vectors = self.geometry(graph).components
        edges = radial_functions(self.radial_basis, graph.edge_mask, vectors)
        told = self._neighbors(graph, edges.radial.dtype)
        functions = (told[:, :, None] * edges.radial[:, None]).reshape(len(told), -1, told.shape[-1])
        squares = []
        for rank, powers in enumerate(powers_of_ranks(shape_of(self.basis), edges.direction)):
            orders = np.array([orders for _, orders in directions(rank)], powers.dtype)
            sums = orders * jnp.einsum("ask,ank->asn", functions, powers) ** 2
            squares.append(jnp.sum(jnp.where(graph.atom_mask[:, None, None], sums, 0)))
        alone = jnp.where(graph.atom_mask, jnp.sum(edges.radial**2, axis=(1, 2)), 0) / self.settings.radial_basis_size
        atoms = jnp.sum(graph.atom_mask.astype(sums.dtype))
        squares_of_ranks = jnp.stack(squares) / self.settings.radial_basis_size
        return {"squares": squares_of_ranks, "incoherent": jnp.sum(alone), "atoms": atoms}

    def standardise(self, params: Params, survey: Survey, energy_scale: float) -> Params:
        """Sets the scales of moments, basis functions and energy; see `Model.standardise`.

        A moment is divided by its root mean square for random radial coefficients, which depends on its rank alone:
        that of rank 0 is what ``scaling`` makes up for, and basis functions are divided by what is left of theirs.
        """
        mean = jnp.maximum(survey["squares"], _LEAST_ORDER * survey["incoherent"]) / jnp.maximum(survey["atoms"], 1)
        size = jnp.sqrt(jnp.maximum(mean, LEAST_SQUARE))
        scaling = 1 / size[0] if self.settings.scaling is None else jnp.asarray(self.settings.scaling, size.dtype)
        highest = len(size)
        counts = np.zeros((len(self.basis.scalars), highest))  # moments of each rank in each basis function
        for row, factors in zip(counts, factors_of(self.basis), strict=True):
            for _, nu in factors:
                row[nu] += 1
        moment_scale = jnp.exp(-counts.astype(size.dtype) @ jnp.log(size * scaling))
        last = energy_scale / jnp.sqrt(len(self.basis.scalars) + self.num_species)
        return with_constants(params, scaling=scaling, moment_scale=moment_scale, last_scale=last)

    def with_species(self, params: Params, fresh: Params, wanted: SpeciesTable) -> Params:
        """Parameters for more species that predict the same as before for the old ones; see `Model.with_species`.

        Radial functions of new species have the size that they have in a fresh model.
        """
        lost = [s for s, z in zip(self.species.symbols, self.species.numbers, strict=True) if z not in wanted.numbers]
        if lost:
            raise InputError(f"the species {', '.join(lost)} of the first potential are missing in the new table.")
        places = wanted.index(np.asarray(self.species.numbers))
        new = fresh["radial"] * (fresh[CONSTANTS]["scaling"] / params[CONSTANTS]["scaling"])
        radial = new.at[np.ix_(places, places)].set(params["radial"])
        return params | {"radial": radial, "species": fresh["species"].at[places].set(params["species"])}

    def apply(self, params: Params, geometry: EdgeVectors, graph: Graph) -> AtomicOutput:
        """Energies [A], and features [A, S + Z]: the basis functions in their scales, and the species, one-hot."""
        exact = exact_code(graph, self.species, geometry.components[0].dtype)
        functions = self.functions(params, geometry, graph)
        constants = jax.lax.stop_gradient(params[CONSTANTS])
        scaled = functions * constants["moment_scale"][:, None]
        energy = constants["last_scale"] * (params["moment"] @ scaled + exact @ params["species"])
        features = jnp.concatenate([scaled.T, exact], axis=1)
        return AtomicOutput(energy, features, jnp.ones_like(exact[:, :1]))

    def functions(self, params: Params, geometry: EdgeVectors, graph: Graph) -> jax.Array:
        """The basis functions B of each atom, [S, A]."""
        return contract(self.basis, self.moments(params, geometry, graph), jnp.any(graph.atom_mask))

    def moments(self, params: Params, geometry: EdgeVectors, graph: Graph) -> jax.Array:
        """The basic moments of each atom, [n, A]."""
        told = self._neighbors(graph, geometry.components[0].dtype)
        scaled = jax.lax.stop_gradient(params[CONSTANTS]["scaling"]) * jnp.swapaxes(params["radial"], 1, 2)
        exact = exact_code(graph, self.species, told.dtype)
        by_atom = (exact @ scaled.reshape(len(scaled), -1)).reshape(-1, *scaled.shape[1:])  # [A, mu, Z, R]
        return basic_moments(self.basis, self.radial_basis, by_atom, told, geometry.components, graph.edge_mask)

    def _neighbors(self, graph: Graph, dtype: Any) -> jax.Array:
        """The species of neighbours, one-hot, [A, Z, K]."""
        return jax.nn.one_hot(graph.species[graph.neighbors], self.num_species, axis=1, dtype=dtype)

    @property
    def last_names(self) -> tuple[str, ...]:
        """See `LinearLast.last_names`."""
        return "moment", "species"

    def last_scale(self, params: Params) -> jax.Array:
        """Of moment and species coefficients alike."""
        scale: jax.Array = params[CONSTANTS]["last_scale"]
        return scale

    def last(self, params: Params) -> LastLayer:
        """Moment coefficients and those of species, which are among the features."""
        weights = jnp.concatenate([params["moment"], params["species"]])
        return LastLayer(weights, jnp.zeros_like(params["species"]))

    def separate(self, params: Params) -> tuple[jax.Array, jax.Array]:
        """Moment coefficients and those of species [S + Z], and radial ones [P]; see `separable.Separable`."""
        return jnp.concatenate([params["moment"], params["species"]]), params["radial"].reshape(-1)

    def put_together(self, params: Params, linear: jax.Array, others: jax.Array) -> Params:
        """See `separable.Separable`."""
        moment, species = linear[: -self.num_species], linear[-self.num_species :]
        return params | {"moment": moment, "species": species, "radial": others.reshape(params["radial"].shape)}

    def derivatives(self, params: Params, graph: Graph) -> Derivatives:
        """See `separable.Separable` and `mtp.derivatives`."""
        return derivatives(self, params, graph)

    def coefficients(self, params: Params) -> Coefficients:
        """What the parameters and constants of one model say together."""
        constants = params[CONSTANTS]
        last = constants["last_scale"]
        moment = last * constants["moment_scale"] * params["moment"]
        return Coefficients(constants["scaling"], params["radial"], last * params["species"], moment)
