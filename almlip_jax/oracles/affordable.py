"""Labels as far as a budget of seconds goes: which structures come first, and when to stop.

Structures of dynamics come in an order of which each beginning is spread evenly over all trajectories and along each:
one of each trajectory in turn, of each in the van der Corput sequence (places with their bits reversed).  They are
labelled in groups, whose sizes follow from the seconds of the labels before, so that the same labels make the same
groups: a program that was killed asks for the same structures again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

from ase import Atoms

from almlip_jax.oracles.executor import Labeller, LabelResult, Provenance
from almlip_jax.oracles.md import is_spent


def evenly(counts: Sequence[int]) -> list[int]:
    """Places of structures that stand trajectory after trajectory, in the order in which they are labelled.

    Args:
        counts: structures of each trajectory.

    >>> evenly([4, 2])
    [0, 4, 2, 5, 1, 3]
    """
    first, turns = 0, []
    for count in counts:
        turns.append([first + place for place in _van_der_corput(count)])
        first += count
    return [place for turn in zip_longest(*turns) for place in turn if place is not None]


def _van_der_corput(count: int) -> list[int]:
    """The places 0 to ``count - 1``, each next one far from those before."""
    bits = max(count - 1, 0).bit_length()
    reversed_bits = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits))
    return [place for place in reversed_bits if place < count]


def label_within(
    labeller: Labeller,
    structures: Sequence[Atoms],
    provenance: Provenance,
    seconds: float,
    on_label: Callable[[LabelResult], object] | None = None,
) -> list[LabelResult]:
    """Labels structures, the first ones first, until their labels have taken some seconds.

    Those of labels that are in the store count as they were stored.  The label that reaches the budget is kept; where
    labels take longer than those before them, or several are calculated side by side, a few more may go beyond it.

    Args:
        labeller: the label source and the store.
        structures: what to label, in the order in which it is wanted.
        provenance: of all, as for `Labeller.label`.
        seconds: that labels may take in all, each by itself; none is asked for where there are none left.
        on_label: called for each new label as it arrives.

    Returns:
        the results of the first structures, in their order; fewer than there are structures where the seconds ended it.

    Raises:
        InputError, StorageError, PendingLabels: as `Labeller.label`.
    """
    results: list[LabelResult] = []
    spent = 0.0
    while len(results) < len(structures) and not is_spent(spent, max(seconds, 0.0)):
        known = len(results)
        # Half of what is left at the pace so far, and no more than there are labels to tell the pace.
        affordable = known if spent == 0 else int(min(known, 0.5 * (seconds - spent) / (spent / known)))
        results += labeller.label(structures[known : known + max(affordable, 1)], provenance, on_label)
        spent = sum(result.seconds for result in results)
    return results
