"""What a label is expected to cost: learned from the seconds of those that are there, by a model where none is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms

from almlip_jax.oracles import LabelStore

_STEEPEST = 7.0  # power of the number of atoms; no label source grows faster


@dataclass(frozen=True)
class PaidLabel:
    """What a label has cost.

    Attributes:
        composition: chemical formula.
        atoms: how many.
        seconds: of the label source, failed tries included.
    """

    composition: str
    atoms: int
    seconds: float


def paid_labels(store: LabelStore, without: Collection[str] = ()) -> list[PaidLabel]:
    """The labels of a store whose time was measured; those of test sets stand for dynamics, and do not count.

    Args:
        store: whose labels.
        without: identities of labels that do not count either.
    """
    measured = (row for row in store.labelled() if row.label.seconds > 0 and row.label.identity not in without)
    rows = (row for row in measured if row.provenance.get("purpose") != "test")
    return [PaidLabel(row.atoms.get_chemical_formula(), len(row.atoms), row.label.seconds) for row in rows]


def paid_by_teacher(store: LabelStore) -> list[PaidLabel]:
    """What a call of a teacher has cost, of each row of its store; those of dynamics count several calls."""
    rows = (row for row in store.labelled() if row.label.seconds > 0 and row.label.calls > 0)
    return [PaidLabel(r.atoms.get_chemical_formula(), len(r.atoms), r.label.seconds / r.label.calls) for r in rows]


def expected_costs(frames: Sequence[Atoms], paid: Iterable[PaidLabel], exponent: float) -> np.ndarray:
    """Expected cost of the labels of some structures, [n], in one unit: seconds, where any are known.

    A composition that has been labelled costs what it did on average.  Others lie on the power law, through the means
    of the compositions, of least squares in logarithms; its power is ``exponent`` where all have one size.

    Args:
        frames: structures.
        paid: labels with their times; without any, costs are ``atoms ** exponent``.
        exponent: power of the number of atoms where the times do not tell.
    """
    sizes = np.array([len(frame) for frame in frames], np.float64)
    times: dict[tuple[str, int], list[float]] = {}
    for label in paid:
        times.setdefault((label.composition, label.atoms), []).append(label.seconds)
    if not times:
        return sizes**exponent
    means = {name: float(np.mean(seconds)) for (name, _), seconds in times.items()}
    x = np.log([size for _, size in times])
    y = np.log(list(means.values()))
    spread = np.sum((x - x.mean()) ** 2)
    power = np.sum((x - x.mean()) * (y - y.mean())) / spread if spread > 0 else exponent
    power = float(np.clip(power, 0, _STEEPEST))
    law = np.exp(y.mean() + power * (np.log(sizes) - x.mean()))
    names = [frame.get_chemical_formula() for frame in frames]
    return np.array([means.get(name, cost) for name, cost in zip(names, law, strict=True)])
