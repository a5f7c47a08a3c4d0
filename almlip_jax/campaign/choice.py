"""The family of explorations.

Packages whose kinds are below it import this module while ours are still being imported, so it imports none of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from almlip_jax.kinds import Spec

if TYPE_CHECKING:
    import jax
    from ase import Atoms

    from almlip_jax.campaign.explorers import Explorers
    from almlip_jax.campaign.inputs import Inputs
    from almlip_jax.campaign.round import Budget, Round, Trained
    from almlip_jax.dynamics import RelaxationSettings, WalkerGroup
    from almlip_jax.ensembles import EnsembleSettings
    from almlip_jax.generation import GeneratorSettings
    from almlip_jax.potential import Potential


@dataclass(frozen=True)
class Beginning:
    """What an exploration of another package is given in a round.

    Attributes:
        potential: of the round.
        starts: start geometries of ``system.structures``.
        labelled: the structures that it was trained on.
        key: random stream of the round.
        round: its number, from 0.
        under_way: structures whose labels are being made (`campaign.overlap`).
    """

    potential: Potential
    starts: Sequence[Atoms]
    labelled: Sequence[Atoms]
    key: jax.Array
    round: int
    under_way: Sequence[Atoms] = ()


@dataclass(frozen=True)
class ExplorationInputs:
    """What the stage of an exploration may look at and use.

    Attributes:
        here: the round: its files, random streams and progress.
        trained: its potential, and evaluations that it shares with the selection.
        inputs: start geometries, structures that walkers start at, and the fixed pool.
        withheld: what identifies structures that must not become candidates (`geometry_key`): those of the test set,
            and those whose labels are under way.
        explorers: keep what was compiled, and how large its arrays have become.
        budget: labels that the round may ask for.
        under_way: structures whose labels are being made.
        held_out: structures that no candidate may be the same as, however it is written down: those of the test set.
    """

    here: Round
    trained: Trained
    inputs: Inputs
    withheld: frozenset[bytes]
    explorers: Explorers
    budget: Budget
    under_way: Sequence[Atoms] = ()
    held_out: Container[Atoms] = ()


class ExplorationChoice(Spec):
    """Where candidates come from.

    Kinds of other packages say how they `explore`, and how many candidates there can be at most.
    """

    bound: ClassVar[str] = "its most_candidates"
    """What bounds the number of structures that it may find."""
    counts_frames: ClassVar[bool] = False
    """Whether its rounds have ``frames_planned`` and ``frames_below`` (`RoundRecord`), which `share_below` judges."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if not cls.is_open() and cls.explore is ExplorationChoice.explore and cls.stage is ExplorationChoice.stage:
            raise TypeError(f"exploration {cls.__name__} has neither explore() nor a stage() of its own.")

    def stage(self, given: ExplorationInputs) -> Mapping[str, Any]:
        """Explores in a round of a campaign.

        Writes the candidates, if there are any, to ``given.here.folder.pool``, and gives fields of the round's record
        (`RoundRecord`): ``candidates``, how many there are, and whatever else is known.  A stage may be done again
        after a kill, and then has to find the same.
        """
        from almlip_jax.campaign.offers import find

        return find(self, given)

    def explore(self, given: Beginning) -> Iterable[Atoms]:
        """Structures that may be worth a label; those that are known already are left out, the others scored.

        Whatever is drawn at random follows from ``given.key``, so that a round done again gives the same.
        """
        raise TypeError(f"exploration of kind '{self.kind}' has a stage() of its own instead.")

    @property
    def needs_starts(self) -> bool:
        """Whether it begins at start geometries."""
        return True

    @property
    def pool_files(self) -> tuple[Path, ...]:
        """The files of a fixed pool that candidates are taken from; none where they are found otherwise."""
        return ()

    @property
    def starts_file(self) -> Path | None:
        """A file whose structures walkers begin at."""
        return None

    @property
    def walkers_to_deal(self) -> Sequence[Collection[str]] | None:
        """For each walker, the named systems that it may be of, or none where of any; None where no walkers are."""
        return None

    @property
    def walker_groups(self) -> Sequence[WalkerGroup]:
        """Groups of walkers of ours, in the order of `walkers_to_deal`; none where there are no such walkers."""
        return ()

    @property
    def starts_labelled(self) -> bool:
        """Whether walkers start at labelled structures whose atoms stand in the order of a start geometry."""
        return False

    @property
    def generators(self) -> Sequence[GeneratorSettings]:
        """Generators that make structures in its rounds."""
        return ()

    @property
    def species_named(self) -> Collection[str]:
        """Elements that thresholds of its gate are given for."""
        return ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user is told of its settings before anything begins."""
        return ()

    def check_geometries(self, geometries: Sequence[Atoms]) -> None:
        """Refuses start geometries that it can do nothing with; raises InputError."""

    def check_systems(self, names: Collection[str]) -> None:
        """Refuses what looks at systems that there are not; raises ValueError."""

    @property
    def couples_walkers(self) -> bool:
        """Whether what one walker does acts on the others."""
        return False

    @property
    def novelty(self) -> tuple[str, ...]:
        """Scores that it looks at, or monitors, of those that are fitted to a training set."""
        return ()

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
