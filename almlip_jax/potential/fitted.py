"""What is fitted after a training and kept with a potential: calibrations, novelty scores, marks of its training set.

Each kind is a class that states its name, the version of its format, and how it is taken apart into arrays and numbers
and put together again; `fitted_kind` makes it known.  A `Fitted` remembers which parameters it was fitted to: a
potential carries nothing that was fitted to others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self, TypeVar, runtime_checkable

import jax
import numpy as np

from almlip_jax.errors import InputError
from almlip_jax.feature_names import FeatureName
from almlip_jax.kinds import load_plugins
from almlip_jax.models import Params
from almlip_jax.models.charge_energy import CHARGE_ENERGY


@runtime_checkable
class FittedKind(Protocol):
    """Something fitted, taken apart into arrays and JSON and put together again.

    Attributes:
        kind: name of the kind, in files.
        version: of its format; raised where an older program would misread it.
    """

    kind: ClassVar[str]
    version: ClassVar[int]

    def arrays(self) -> Mapping[str, np.ndarray]:
        """What is kept as arrays, by name; may be large."""
        ...

    def numbers(self) -> Mapping[str, Any]:
        """What is kept to be read by people: JSON."""
        ...

    @classmethod
    def restored(cls, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> Self:
        """What `arrays` and `numbers` were taken from.

        Raises:
            Exception: of any kind, where they do not fit.
        """
        ...


_KINDS: dict[str, type[FittedKind]] = {}

Kind = TypeVar("Kind", bound=type[FittedKind])


def fitted_kind(kind: Kind) -> Kind:
    """Makes a kind known to `Potential.load`, under its name."""
    _KINDS[kind.kind] = kind
    return kind


@dataclass(frozen=True)
class Fitted:
    """Something fitted to an ensemble.

    Attributes:
        value: what was fitted.
        params: `params_digest` of the parameters that it was fitted to.
    """

    value: FittedKind
    params: str

    def description(self) -> dict[str, Any]:
        """All but its arrays, as JSON."""
        return {
            "kind": self.value.kind,
            "version": self.value.version,
            "params": self.params,
            "numbers": dict(self.value.numbers()),
        }

    @classmethod
    def described(cls, text: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Fitted:
        """What `description` was made of.

        Raises:
            InputError: the kind is not known, or its format is of a later version.
        """
        load_plugins()
        kind = _KINDS.get(str(text["kind"]))
        if kind is None or int(text["version"]) > kind.version:
            raise InputError(f"'{text['kind']}' of format {text['version']} is not known to this version")
        return cls(kind.restored(arrays, text["numbers"]), str(text["params"]))


def params_digest(params: Params) -> str:
    """A hash of parameters: 16 hexadecimal digits that tell those of one ensemble from those of another.

    Charges that cost nothing do not count, for which potentials of earlier versions had no place.
    """
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        if getattr(path[-1], "key", None) == CHARGE_ENERGY and not array.any():
            continue
        found.update(f"{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


@fitted_kind
@dataclass(frozen=True)
class Calibration:
    """Of the force uncertainty, by name: the numbers of `uncertainty.force_calibration`, and of how many structures."""

    kind: ClassVar[str] = "calibration"
    version: ClassVar[int] = 1
    values: Mapping[str, Any] = field(default_factory=dict)

    def arrays(self) -> Mapping[str, np.ndarray]:
        """None."""
        return {}

    def numbers(self) -> Mapping[str, Any]:
        """All of it."""
        return self.values

    @classmethod
    def restored(cls, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> Self:
        """The calibration of some numbers."""
        float(numbers.get("slope", 0.0))
        return cls(dict(numbers))


TRAINING_ROWS: FeatureName = "last_layer_gradient"
"""Which features `TrainingSet.rows` are."""


@fitted_kind
@dataclass(frozen=True)
class TrainingSet:
    """What comparisons with the structures of a training set need of them; n structures, labels were not looked at.

    Attributes:
        scores: name -> [n], committee scores and novelty scores.
        rows: [n, d] features `TRAINING_ROWS`.
    """

    kind: ClassVar[str] = "training_set"
    version: ClassVar[int] = 1
    scores: Mapping[str, np.ndarray]
    rows: np.ndarray

    def arrays(self) -> Mapping[str, np.ndarray]:
        """Scores and rows."""
        return {"rows": self.rows} | {f"scores/{name}": values for name, values in self.scores.items()}

    def numbers(self) -> Mapping[str, Any]:
        """How many structures there are."""
        return {"structures": len(self.rows)}

    @classmethod
    def restored(cls, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> Self:
        """From scores and rows."""
        scores = {name.removeprefix("scores/"): values for name, values in arrays.items() if name != "rows"}
        rows = arrays["rows"]
        if rows.ndim != 2 or any(values.shape != rows.shape[:1] for values in scores.values()):
            raise ValueError("scores and rows are not of as many structures")
        return cls(scores, rows)
