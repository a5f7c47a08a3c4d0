"""Weights of the structures in the loss of each model, by which the models of an ensemble differ."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from almlip_jax.errors import InputError
from almlip_jax.kinds import Named, UserCode

if TYPE_CHECKING:
    from almlip_jax.ensembles.settings import EnsembleSettings

Seed = tuple[int, ...]
"""Integers that generators of random numbers are made of."""


class BootstrapSettings(Named):
    """How much each structure counts for each model of an ensemble."""

    looks_at: ClassVar[frozenset[str]] = frozenset()
    """Keys of `ensemble` that it alone looks at."""
    tells_apart: ClassVar[bool] = True
    """Whether models of equal parameters become different ones by it."""

    @abstractmethod
    def weights(self, settings: EnsembleSettings, structures: int, seed: Seed) -> np.ndarray:
        """Weights for every model, [L, structures], of mean 1, so that the loss keeps its size.

        Those of a structure follow from the seed and its position alone, so that they stay as the dataset grows:
        ``np.random.default_rng([*seed, position])`` draws them.  More may be asked for than there are structures.

        Args:
            settings: of the ensemble, of two models at least.
            structures: number of structures.
            seed: decides what is drawn.

        Raises:
            InputError: a user's factory cannot be imported, or its function gives no weights.
        """


class NoBootstrap(BootstrapSettings):
    """All structures count alike."""

    tells_apart: ClassVar[bool] = False

    kind: Literal["none"] = "none"

    def weights(self, settings: EnsembleSettings, structures: int, seed: Seed) -> np.ndarray:
        """Ones."""
        return np.ones((settings.size, structures))


class GammaBootstrap(BootstrapSettings):
    """Gamma-distributed weights of variance `bootstrap_variance`; at 1 the Bayesian bootstrap (Rubin, Ann. Statist. 9,
    130, 1981) up to its norm.
    """

    looks_at: ClassVar[frozenset[str]] = frozenset({"bootstrap_variance"})

    kind: Literal["gamma"] = "gamma"

    def weights(self, settings: EnsembleSettings, structures: int, seed: Seed) -> np.ndarray:
        """Of shape 1 / variance and mean 1."""
        variance = settings.bootstrap_variance
        draws = [draw.gamma(1 / variance, variance, size=settings.size) for draw in _draws(seed, structures)]
        return np.stack(draws, axis=1)


class PoissonBootstrap(BootstrapSettings):
    """How often each structure is drawn where as many as there are are drawn with replacement, in the limit of many."""

    kind: Literal["poisson"] = "poisson"

    def weights(self, settings: EnsembleSettings, structures: int, seed: Seed) -> np.ndarray:
        """Numbers of mean 1."""
        draws = [draw.poisson(1.0, size=settings.size) for draw in _draws(seed, structures)]
        return np.stack(draws, axis=1).astype(np.float64)


class UserBootstrap(UserCode, BootstrapSettings):
    """A user's own factory ``(models, **parameters) -> weights``, a function ``(seed, structures)`` in numpy.

    Of integers and a number of structures it makes the weights of that many for each of the ``models``, [models,
    structures], of mean 1.  Those of a structure must not change where there are more of them: each has a generator of
    its own, ``np.random.default_rng([*seed, position])``.
    """

    also_given: ClassVar[tuple[str, ...]] = ("models",)

    kind: Literal["user"] = "user"

    def check_code(self) -> None:
        """Asks the function for weights of a few models and structures."""
        super().check_code()
        few, more = (
            checked_weights(self._asked(_CHECKED, number, (0, 1)), (_CHECKED, number), f"'{self.function}'")
            for number in (5, 9)
        )
        if not np.array_equal(more[:, :5], few):
            raise InputError(
                f"the weights that '{self.function}' gives for the first structures change where there are more; draw "
                "those of each from a generator of its own, numpy.random.default_rng([*seed, position])."
            )

    def weights(self, settings: EnsembleSettings, structures: int, seed: Seed) -> np.ndarray:
        """What the function gives."""
        found: np.ndarray = self._asked(settings.size, structures, seed)
        return found

    def _asked(self, models: int, structures: int, seed: Seed) -> Any:
        function: Callable[[Seed, int], Any] = self.call_for_function("seed", "structures", models=models)
        with self.tried_on(f"{structures} structures"):
            return function(seed, structures)


_CHECKED = 3  # models for which a user's function is tried


def checked_weights(found: Any, shape: tuple[int, int], by: str) -> np.ndarray:
    """Weights of models and structures as an array.

    Args:
        found: what somebody's kind gives.
        shape: numbers of models and of structures.
        by: who gives it.

    Raises:
        InputError: it is of another shape, or not all of it are numbers >= 0.
    """
    wanted = "a table of weights, numbers >= 0,"
    try:
        weights = np.asarray(found, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{by} must give {wanted} but gives a {type(found).__name__}.") from error
    if weights.shape != shape:
        raise InputError(f"{by} must give {wanted} of shape {shape} (models, structures), not {weights.shape}.")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise InputError(f"{by} must give {wanted} but some of them are negative or no number.")
    return weights


def _draws(seed: Seed, structures: int) -> Iterator[np.random.Generator]:
    """One for each structure: gamma draws by rejection, and a longer table must begin with the shorter one."""
    return (np.random.default_rng([*seed, position]) for position in range(structures))
