"""What all settings of gates have, and those of a user's own."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal, Self, cast

from pydantic import Field, model_validator

from almlip_jax.dynamics.gates.hysteresis import Hysteresis
from almlip_jax.dynamics.gates.protocol import Gate
from almlip_jax.dynamics.seen import MOST_STEPS
from almlip_jax.kinds import Spec, UserCode
from almlip_jax.scores import AnyScoreName, largest_of, with_atoms


class GateSettings(Spec):
    """Settings of any gate."""

    score: AnyScoreName = "force_std_max"
    """Score that it compares with the thresholds."""
    persistence: int = Field(default=1, ge=1, le=MOST_STEPS)
    """Steps in a row above the stop threshold that end a walker."""
    release: float | None = Field(default=None, gt=0, le=1)
    """Fraction of the record threshold below which the score must fall before the walker records again."""
    species: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = {}
    """Thresholds of single elements, relative to those of the run: ``{H: 0.5}`` halves them for hydrogen."""

    @model_validator(mode="after")
    def _of_atoms(self) -> Self:
        if self.species and largest_of(self.score) is None:
            raise ValueError(f"species thresholds need a score of atoms ({', '.join(with_atoms())}), not {self.score}.")
        return self

    @abstractmethod
    def plain(self) -> Gate:
        """The gate without persistence and release.

        Raises:
            InputError: a user's function cannot be imported or built.
        """

    def build(self) -> Gate:
        """The gate, with `Hysteresis` around it where asked for; errors as for `plain`."""
        if self.persistence == 1 and self.release is None:
            return self.plain()
        return Hysteresis(self.plain(), self.score, self.persistence, self.release)


class UserGate(UserCode, GateSettings):
    """A user's own factory ``(score, **parameters) -> Gate``."""

    kind: Literal["user"] = "user"

    def check_code(self) -> None:
        """Makes the gate."""
        self.plain()

    def plain(self) -> Gate:
        """What the factory makes."""
        return cast(Gate, self.call_for(("init", "apply"), score=self.score))
