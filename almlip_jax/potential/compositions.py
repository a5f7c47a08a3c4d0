"""Which compositions a potential has learned of: how their energies are shared between elements may change as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.structures.electronic_state import total_charge

_COMPOSITIONS = "compositions"
_NEW = 1e-6  # of a composition as a vector of length one: what is left of it beside those that are known


def compositions_note(structures: Iterable[Atoms], before: Sequence[Atoms] = ()) -> dict[str, Any]:
    """The entry of metadata on compositions and charges that a potential was trained on.

    It holds as many as are independent of each other: reference energies that suit these suit all others.

    Args:
        structures: trained on; those without an energy tell nothing of it.
        before: what it had learned of already, as `noted_compositions` gives it.
    """
    telling = (one for one in structures if one.calc is not None and "energy" in one.calc.results)
    told = [*map(_composition, before), *sorted(set(map(_composition, telling)))]
    elements = sorted({symbol for counts, _ in told for symbol, _ in counts})
    known, kept = np.zeros((0, len(elements) + 2)), []
    for counts, charge in told:
        found = dict(counts)
        row = np.array([*(found.get(symbol, 0) for symbol in elements), max(charge, 0), max(-charge, 0)], float)
        row /= np.linalg.norm(row)
        for _ in range(2):  # once leaves what rounding left
            row -= (known @ row) @ known
        if (left := np.linalg.norm(row)) > _NEW:
            known = np.vstack([known, row / left])
            kept.append({"elements": found, "charge": charge})
    return {_COMPOSITIONS: kept}


def _composition(atoms: Atoms) -> tuple[tuple[tuple[str, int], ...], int]:
    """Numbers of atoms by element, and the charge."""
    return tuple(sorted(Counter(atoms.symbols).items())), total_charge(atoms)


def noted_compositions(metadata: Mapping[str, Any]) -> list[Atoms]:
    """Compositions that metadata hold, as structures without places; none where nothing is known of them."""
    return [
        Atoms("".join(f"{symbol}{count}" for symbol, count in one["elements"].items()), info={"charge": one["charge"]})
        for one in metadata.get(_COMPOSITIONS, ())
    ]
