"""The family of explorations.

Packages whose kinds are below it import this module while ours are still being imported, so it imports none of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from almlip_jax.kinds import Spec

if TYPE_CHECKING:
    import jax
    from ase import Atoms

    from almlip_jax.campaign.workshop import Workshop
    from almlip_jax.dynamics import RelaxationSettings
    from almlip_jax.ensembles import EnsembleSettings
    from almlip_jax.potential import Potential

Stage: TypeAlias = "Callable[[Workshop, int, Potential], Mapping[str, Any]]"
"""Of a campaign: what it takes is its tools, the number of the round and its potential."""


@dataclass(frozen=True)
class Beginning:
    """What an exploration of another package is given in a round.

    Attributes:
        potential: of the round.
        starts: start geometries of ``system.structures``.
        labelled: the structures that it was trained on.
        key: random stream of the round.
        round: its number, from 0.
    """

    potential: Potential
    starts: Sequence[Atoms]
    labelled: Sequence[Atoms]
    key: jax.Array
    round: int


class ExplorationChoice(Spec):
    """Where candidates come from.

    Kinds of other packages say how they `explore`, and how many candidates there can be at most.
    """

    bound: ClassVar[str] = "its most_candidates"
    """What bounds the number of structures that it may find."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if not cls.is_open() and cls.explore is ExplorationChoice.explore and cls.stage is ExplorationChoice.stage:
            raise TypeError(f"exploration {cls.__name__} has neither explore() nor a stage() of its own.")

    def stage(self) -> Stage:
        """The stage of a campaign that explores: it writes candidates and returns numbers of the round's record."""
        from almlip_jax.campaign.offers import find

        return partial(find, self)

    def explore(self, given: Beginning) -> Iterable[Atoms]:
        """Structures that may be worth a label; those that are known already are left out, the others scored.

        Whatever is drawn at random follows from ``given.key``, so that a round done again gives the same.
        """
        raise TypeError(f"exploration of kind '{self.kind}' has a stage() of its own instead.")

    @property
    def pool_files(self) -> tuple[Path, ...]:
        """The files of a fixed pool that candidates are taken from; none where they are found otherwise."""
        return ()

    @property
    def starts_file(self) -> Path | None:
        """A file whose structures walkers begin at."""
        return None

    @property
    def relaxation(self) -> RelaxationSettings | None:
        """How starts are relaxed before walkers leave them; None where they are not."""
        return None

    def check(self, members: EnsembleSettings, further: Collection[str] = ()) -> None:
        """Refuses what would judge by an uncertainty that the ensemble does not have; raises ValueError.

        ``further`` is what the model gives besides the energy.
        """

    @abstractmethod
    def most_candidates(self, pool: int) -> int:
        """Candidates that there can be at most in a round, of a fixed pool of some size."""
