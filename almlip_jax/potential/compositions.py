"""Which compositions a potential has learned of: how their energies are shared between elements may change as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.structures.electronic_state import total_charge

_COMPOSITIONS = "compositions"


def compositions_note(structures: Iterable[Atoms], before: Sequence[Atoms] = ()) -> dict[str, Any]:
    """The entry of metadata on compositions and charges that a potential was trained on.

    It holds as many as are independent of each other: reference energies that suit these suit all others.

    Args:
        structures: trained on.
        before: what it had learned of already, as `noted_compositions` gives it.
    """
    told = {(tuple(Counter(sorted(atoms.symbols)).items()), total_charge(atoms)) for atoms in structures}
    earlier = [(tuple(Counter(sorted(atoms.symbols)).items()), total_charge(atoms)) for atoms in before]
    elements = sorted({symbol for counts, _ in [*earlier, *told] for symbol, _ in counts})
    rows, kept = np.zeros((0, len(elements) + 2)), []
    for counts, charge in [*earlier, *sorted(told)]:
        found = dict(counts)
        row = np.array([*(found.get(symbol, 0) for symbol in elements), max(charge, 0), max(-charge, 0)])
        more = np.vstack([rows, row / np.linalg.norm(row)])
        if np.linalg.matrix_rank(more, tol=1e-8) > len(rows):
            rows = more
            kept.append({"elements": found, "charge": charge})
    return {_COMPOSITIONS: kept}


def noted_compositions(metadata: Mapping[str, Any]) -> list[Atoms]:
    """Compositions that metadata hold, as structures without places; none where nothing is known of them."""
    return [
        Atoms("".join(f"{symbol}{count}" for symbol, count in one["elements"].items()), info={"charge": one["charge"]})
        for one in metadata.get(_COMPOSITIONS, ())
    ]
