"""The mean of several label sources, whose errors are not the same and cancel in part: above all a nearer teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from ase import Atoms
from pydantic import Field, model_validator

from almlip_jax.errors import LabelError
from almlip_jax.oracles.base import LONGEST_LABEL, LabelSource, Results, SourceSettings, judged, reason_of
from almlip_jax.settings import unit

T = TypeVar("T")

_OF_THE_WHOLE = ("timeout", "attempts")


class MeanSettings(SourceSettings):
    """The weighted mean of what several label sources give for the same structure, calculated one after the other.

    Energies, forces and stresses are means, and so are dipoles where every part gives them; a label has no stress where
    one of the parts has none.  Whatever refuses a structure, or fails on it, refuses or fails the label.
    """

    kind: Literal["mean"] = "mean"

    of: tuple[SourceSettings, ...] = Field(min_length=2, max_length=100)
    """The label sources; any that calculate labels here, each with its own ``max_force``.  Time limit and attempts are
    those of the mean."""

    timeout: float = Field(default=3600.0, gt=0, le=LONGEST_LABEL, json_schema_extra=unit("s"))
    """Longest time that one label may take with all of its parts, in seconds."""

    weights: tuple[Annotated[float, Field(gt=0, le=1e6)], ...] | None = None
    """Weight of each; their sum is taken as one.  Equal where not given."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.of):
            raise ValueError(f"there are {len(self.weights)} weights of {len(self.of)} label sources; give each one.")
        for part in self.of:
            if part.in_process or not part.drives_dynamics:
                raise ValueError(f"a source of kind '{part.kind}' calculates no labels here; take one that does.")
            for name in _OF_THE_WHOLE:
                if getattr(part, name) != type(part).model_fields[name].get_default():
                    raise ValueError(f"{name} is a key of the mean, not of its parts; move it there.")
        folders = {part.files_below() for part in self.of} - {None}
        if len(folders) > 1:
            listed = " and ".join(sorted(map(str, folders)))
            raise ValueError(f"scratch is {listed}; a worker keeps its files in one folder, give the parts the same.")
        return self

    @property
    def shares(self) -> tuple[float, ...]:
        """What each counts; they add up to one."""
        weights = self.weights or (1.0,) * len(self.of)
        return tuple(weight / sum(weights) for weight in weights)

    def asks(self) -> tuple[SourceSettings, ...]:
        """The parts."""
        return self.of

    def gives(self, target: str) -> bool:
        """What all of them give."""
        return all(part.gives(target) for part in self.of)

    def identity(self) -> dict[str, Any]:
        """Those of the parts, and what each counts."""
        return {"kind": self.kind, "of": [part.identity() for part in self.of], "shares": list(self.shares)}

    def particulars(self, atoms: Atoms) -> dict[str, Any]:
        """Those of the parts that have any."""
        own = {str(number): part.particulars(atoms) for number, part in enumerate(self.of)}
        return {number: particulars for number, particulars in own.items() if particulars}

    def version(self) -> str:
        """Those of the parts."""
        return "; ".join(part.version() for part in self.of)

    def bound_to(self) -> str | None:
        """Those of the parts that labels are bound to."""
        bound = [part.bound_to() for part in self.of]
        return None if set(bound) == {None} else "; ".join(one or "" for one in bound)

    def files_below(self) -> Path | None:
        """The folder of the parts that have one."""
        return next((folder for part in self.of if (folder := part.files_below()) is not None), None)

    def check(self, atoms: Atoms) -> None:
        """Refuses what one of the parts refuses."""
        for part in self.of:
            _told(part, lambda part=part: part.check(atoms))  # type: ignore[misc]

    def with_grid_of(self, atoms: Atoms) -> MeanSettings:
        """With those of the parts."""
        return self.model_copy(update={"of": tuple(part.with_grid_of(atoms) for part in self.of)})

    def preview(self, atoms: Atoms) -> str:
        """What each of the parts would calculate."""
        counted = zip(self.shares, self.of, strict=True)
        return "\n\n".join(f"{share:.4g} of the mean: {part.preview(atoms)}" for share, part in counted)

    def build(self) -> LabelSource:
        """A function that asks one part after the other."""
        built = [(part, part.build()) for part in self.of]

        def label(atoms: Atoms) -> Results:
            found = [
                _told(part, lambda ask=ask, part=part: judged(ask(atoms), len(atoms), part.max_force))  # type: ignore[misc]
                for part, ask in built
            ]
            return self._mean(found)

        return label

    def _mean(self, found: list[Results]) -> Results:
        def of(values: list[Any]) -> Any:
            return sum(share * value for share, value in zip(self.shares, values, strict=True))

        stresses = [one.stress for one in found]
        common = set[str].intersection(*(set(one.further) for one in found))
        return Results(
            energy=of([one.energy for one in found]),
            forces=of([one.forces for one in found]),
            stress=None if any(stress is None for stress in stresses) else of(stresses),
            further={name: np.asarray(of([one.further[name] for one in found])) for name in sorted(common)},
        )


def _told(part: SourceSettings, ask: Callable[[], T]) -> T:
    """What a part says, and which it is where it does not.

    Raises:
        LabelError: it does not.
    """
    try:
        return ask()
    except Exception as error:  # a label source may raise anything
        raise LabelError(f"{part.kind}: {reason_of(error)}") from error
