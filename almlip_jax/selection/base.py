"""The protocol of selection: candidates in, indices out, nothing else known.

A selector is a pure, jittable function ``(key, pool, labelled) -> Selection``; a filter is a pure, jittable function
``(key, pool, labelled) -> pool`` that only narrows `Candidates.valid`.  Both are made by functions that take the static
choices (how many, by which score, on which features), in the manner of optax; `chain` composes them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal, ParamSpec, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike
from pydantic import Field

from almlip_jax.errors import InputError
from almlip_jax.feature_names import AtomFeatureName, FeatureName
from almlip_jax.kinds import Spec, UserCode
from almlip_jax.scores import AnyScoreName
from almlip_jax.selection.strata import Strata, Stratification
from almlip_jax.settings import Settings

P = ParamSpec("P")
R = TypeVar("R")
TEACHER_FORCES, TEACHER_ENERGY = "teacher_forces", "teacher_energy"
TEACHER_SCORES = (TEACHER_FORCES, TEACHER_ENERGY)
"""Names among `Candidates.scores` of how far the ensemble is from a teacher, where one was asked: root mean square
difference of the force components, eV/Angstrom; difference of the energies per atom, both relative to the reference
energies of their sources, eV/atom.  Not a number where the teacher had no label."""
_REMEMBERED = 256  # selectors that are kept to be given again; more than a study compares


@struct.dataclass
class Environments:
    """Rows of the atoms of structures, for what looks at surroundings of atoms rather than at structures as a whole.

    Attributes:
        rows: name -> [A, d] feature matrix, one row an atom; rows of no structure hold anything.
        species: [A] int, atomic numbers: surroundings of unlike elements are never alike.
        members: [n, N] int, rows of the atoms of each structure; -1 where it has fewer.
    """

    rows: Mapping[str, jax.Array]
    species: jax.Array
    members: jax.Array

    @classmethod
    def of(
        cls,
        rows: Mapping[str, Sequence[ArrayLike]],
        species: Sequence[Sequence[int] | np.ndarray],
        *,
        structures: int = 0,
        atoms: int = 0,
        largest: int = 0,
    ) -> Environments:
        """Environments of some structures, in arrays that have room for more.

        Args:
            rows: name -> for each structure [N, d].
            species: for each structure [N], atomic numbers.
            structures: structures that there is room for; just enough by default.
            atoms: atoms of all of them, likewise.
            largest: atoms of one of them, likewise.

        Raises:
            InputError: there are more atoms than room, or there is no structure: nothing tells the columns of the rows.

        >>> Environments.of({"latent": [[[0.0], [1.0]], [[2.0]]]}, [[8, 1], [8]]).members.tolist()
        [[0, 1], [2, -1]]
        """
        if rows and not len(species):
            raise InputError(
                "environments of no structure have rows of no known length; give one structure, and make it invalid "
                "among the candidates."
            )
        sizes = np.array([len(one) for one in species], np.int64)
        total, most = int(sizes.sum()), int(sizes.max(initial=0))
        number, atoms, largest = max(structures, len(sizes)), atoms or max(total, 1), largest or max(most, 1)
        if total > atoms or most > largest:
            raise InputError(f"{total} atoms, {most} of one structure, do not fit into {atoms} and {largest} rows.")
        columns = np.arange(largest)
        members = np.full((number, largest), -1, np.int32)
        members[: len(sizes)] = np.where(columns < sizes[:, None], (np.cumsum(sizes) - sizes)[:, None] + columns, -1)

        def padded(values: Sequence[ArrayLike]) -> jax.Array:
            joined = np.concatenate([np.asarray(one) for one in values]) if len(values) else np.zeros(0, np.int32)
            return jax.device_put(np.pad(joined, [(0, atoms - total)] + [(0, 0)] * (joined.ndim - 1)))

        return cls({name: padded(values) for name, values in rows.items()}, padded(species), jax.device_put(members))


@struct.dataclass
class Candidates:
    """A pool to select from, or the labelled set that is its context.

    Attributes:
        features: name -> [n, d] feature matrix, one row a structure.
        scores: name -> [n] acquisition scores; larger is more uncertain.
        cost: [n] expected price of a label, in any one unit.
        valid: [n] bool, false for padding and for what a filter has put aside.
        id: [n] int, a stable identity; breaks ties (the smallest wins), so that pool order does not matter.
        scalars: name -> [] quantities of the campaign so far that belong to no candidate, such as a weight.
        environments: rows of the atoms, where a selector looks at these.
        strata: groups that have shares, where a selector looks at these.
    """

    features: Mapping[str, jax.Array]
    scores: Mapping[str, jax.Array]
    cost: jax.Array
    valid: jax.Array
    id: jax.Array
    scalars: Mapping[str, jax.Array] = field(default_factory=dict)
    environments: Environments | None = None
    strata: Strata | None = None

    @classmethod
    def of(
        cls,
        features: Mapping[str, ArrayLike] | None = None,
        scores: Mapping[str, ArrayLike] | None = None,
        environments: Environments | None = None,
        strata: Strata | None = None,
    ) -> Candidates:
        """Candidates of equal cost, all of them valid; their ids are their rows.

        Args:
            features: name -> [n, d].
            scores: name -> [n].
            environments: of their atoms.
            strata: that they belong to.

        >>> pool = Candidates.of({"latent": [[0.0, 1.0], [2.0, 0.0]]}, {"force_std_max": [0.1, 0.3]})
        >>> pool.valid.tolist(), pool.id.tolist()
        ([True, True], [0, 1])
        """
        columns = {name: jnp.asarray(values) for name, values in (features or {}).items()}
        ranks = {name: jnp.asarray(values) for name, values in (scores or {}).items()}
        held = [*columns.values(), *ranks.values(), *([] if environments is None else [environments.members])]
        held += [] if strata is None else [strata.number]
        number = next((len(values) for values in held), 0)
        made = cls(columns, ranks, jnp.ones(number), jnp.ones(number, bool), jnp.arange(number))
        return made.replace(environments=environments, strata=strata)  # type: ignore[attr-defined, no-any-return]


@struct.dataclass
class Selection:
    """What a selector chose, best first.

    Attributes:
        indices: [k] int, rows of the pool; never the same twice where valid.
        valid: [k] bool, false where the pool had fewer than k candidates.
        gain: [k] value the selector gave each choice at the time it was made (its meaning is the selector's).
    """

    indices: jax.Array
    valid: jax.Array
    gain: jax.Array


class Selector(Protocol):
    """Chooses k candidates, k being static."""

    def __call__(self, key: jax.Array, pool: Candidates, labelled: Candidates) -> Selection:
        """The choice, for a random key, a pool and what is labelled already."""
        ...


class Filter(Protocol):
    """Narrows the pool: returns it with fewer `Candidates.valid`, and otherwise unchanged."""

    def __call__(self, key: jax.Array, pool: Candidates, labelled: Candidates) -> Candidates:
        """The narrowed pool."""
        ...


def memoised(factory: Callable[P, R]) -> Callable[P, R]:
    """The factory, giving one object for the same arguments, so that ``select(max_det(10), ...)`` compiles once."""
    return cast(Callable[P, R], lru_cache(maxsize=_REMEMBERED)(factory))


class Stage(Settings):
    """Settings of a filter or a selector, which say what they look at."""

    @property
    def score_names(self) -> tuple[AnyScoreName, ...]:
        """Scores that it looks at, as far as settings show."""
        return ()

    @property
    def feature_names(self) -> tuple[FeatureName, ...]:
        """Feature maps that it looks at."""
        return ()

    @property
    def atom_feature_names(self) -> tuple[AtomFeatureName, ...]:
        """Feature maps whose rows of atoms it looks at."""
        return ()

    @property
    def asks_teacher(self) -> bool:
        """Whether it looks at what a teacher says of the candidates (`TEACHER_SCORES`)."""
        return False


class FilterSettings(Stage, Spec):
    """Settings of any filter."""

    @property
    def prefers(self) -> bool:
        """Whether it keeps the more uncertain of the candidates."""
        return False

    @abstractmethod
    def build(self) -> Filter:
        """The filter.

        Raises:
            InputError: a user's function cannot be imported or built.
        """


class SelectorSettings(Stage, Spec):
    """Settings of any selector."""

    @property
    def innermost(self) -> SelectorSettings:
        """The selector itself, without what is around it."""
        return self

    @property
    def draws_at_random(self) -> bool:
        """Whether a batch is as uncertain as its pool on average, whatever the potential says."""
        return False

    @property
    def cost_exponent(self) -> float | None:
        """Power of the number of atoms where costs are not known, of one that weighs by cost; None of others."""
        return None

    @property
    def stratification(self) -> Stratification | None:
        """What has shares of the batch, of one that gives some; None of others."""
        return None

    @property
    def follows_errors(self) -> bool:
        """Whether `scalars` look at errors on structures kept for validation, which then have to be there."""
        return False

    def scalars(self, errors: Sequence[float]) -> Mapping[str, float]:
        """Numbers that it takes of the rounds so far, by name (`Candidates.scalars`).

        Args:
            errors: force errors on the structures kept for validation, one for each round so far, eV/Angstrom; not a
                number where a round has none.
        """
        return {}

    @abstractmethod
    def build(self, k: int) -> Selector:
        """The selector, for batches of k.

        Raises:
            InputError: a user's function cannot be imported or built.
        """


class LeafSelector(SelectorSettings):
    """Selectors that may stand at the end of a chain."""


class SteppingSelector(LeafSelector):
    """Selectors that choose one candidate after the other, so that strata can take turns."""


class WeighedSelector(SteppingSelector):
    """Selectors whose gains a cost can weigh."""


class Enclosing(Stage):
    """Looks at what the selector inside it looks at."""

    if TYPE_CHECKING:
        selector: SelectorSettings

    @property
    def innermost(self) -> SelectorSettings:
        """That of the selector inside."""
        return self.selector.innermost

    @property
    def score_names(self) -> tuple[AnyScoreName, ...]:
        """Those of the selector inside."""
        return self.selector.score_names

    @property
    def feature_names(self) -> tuple[FeatureName, ...]:
        """Those of the selector inside."""
        return self.selector.feature_names

    @property
    def atom_feature_names(self) -> tuple[AtomFeatureName, ...]:
        """Those of the selector inside."""
        return self.selector.atom_feature_names

    @property
    def draws_at_random(self) -> bool:
        """Where the selector inside does."""
        return self.selector.draws_at_random

    @property
    def cost_exponent(self) -> float | None:
        """That of the selector inside."""
        return self.selector.cost_exponent

    @property
    def stratification(self) -> Stratification | None:
        """That of the selector inside."""
        return self.selector.stratification

    @property
    def follows_errors(self) -> bool:
        """Where the selector inside does."""
        return self.selector.follows_errors

    def scalars(self, errors: Sequence[float]) -> Mapping[str, float]:
        """Those of the selector inside."""
        return self.selector.scalars(errors)


class ByScore(Stage):
    """Looks at a score."""

    score: AnyScoreName = "force_std_mean"
    """Score that it looks at."""

    @property
    def score_names(self) -> tuple[AnyScoreName, ...]:
        """The one."""
        return (self.score,)


class ByFeatures(Stage):
    """Looks at features."""

    features: FeatureName = "last_layer_gradient"
    """Which feature map stands for a structure."""

    @property
    def feature_names(self) -> tuple[FeatureName, ...]:
        """The one."""
        return (self.features,)


class ByEnvironments(Stage):
    """Looks at the surroundings of atoms."""

    features: AtomFeatureName = "power_spectrum"
    """Which feature map stands for the surroundings of an atom."""

    @property
    def atom_feature_names(self) -> tuple[AtomFeatureName, ...]:
        """The one."""
        return (self.features,)


class ByDesign(ByFeatures):
    """Looks at features through a linear model with noise."""

    sigma: float = Field(default=1e-3, ge=1e-6, le=1000.0)
    """Noise, relative to features of mean square norm 1; below 1e-6, float64 does not resolve it."""


class _UserStage(UserCode, Stage):
    features: tuple[FeatureName, ...] = ("latent", "last_layer_gradient")
    """Feature maps that it looks at."""
    atom_features: tuple[AtomFeatureName, ...] = ()
    """Feature maps whose rows of atoms it looks at, in ``environments`` of the candidates."""
    scores: tuple[AnyScoreName, ...] = ()
    """Scores that it looks at: a potential that does not give one, or gives 0 everywhere, is then refused."""

    @property
    def score_names(self) -> tuple[AnyScoreName, ...]:
        """Those named."""
        return self.scores

    @property
    def feature_names(self) -> tuple[FeatureName, ...]:
        """Those named."""
        return self.features

    @property
    def atom_feature_names(self) -> tuple[AtomFeatureName, ...]:
        """Those named."""
        return self.atom_features


class UserSelector(_UserStage, LeafSelector):
    """A user's own factory ``(k, **parameters) -> Selector``."""

    also_given: ClassVar[tuple[str, ...]] = ("k",)

    kind: Literal["user"] = "user"

    def build(self, k: int) -> Selector:
        """What the factory makes."""
        return self.kept(lambda: cast(Selector, self.call_for_function("key", "pool", "labelled", k=k)), k)


class UserFilter(_UserStage, FilterSettings):
    """A user's own factory ``(**parameters) -> Filter``."""

    kind: Literal["user"] = "user"

    def check_code(self) -> None:
        """Makes the filter."""
        self.build()

    def build(self) -> Filter:
        """What the factory makes."""
        return self.kept(lambda: cast(Filter, self.call_for_function("key", "pool", "labelled")))
