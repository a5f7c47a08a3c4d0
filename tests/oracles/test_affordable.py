"""Labels as far as a budget of seconds goes: their order, their number, and what a second call asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ase import Atoms
from label_calculators import RAISE, calls

from almlip_jax.oracles import Labeller, LabelResult, LabelStore, LocalSettings, evenly, label_within
from almlip_jax.oracles.sources.calculator import CalculatorSettings

Waters = Callable[..., list[Atoms]]
FRAMES = {"purpose": "frames"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LabelStore]:
    with LabelStore(tmp_path / "labels.db") as opened:
        yield opened


@pytest.mark.parametrize("counts", [[0], [1], [], [7, 0, 7], [5, 16, 9]])
def test_each_beginning_is_spread_over_trajectories_and_time(counts: list[int]) -> None:
    order = evenly(counts)
    assert sorted(order) == list(range(sum(counts)))
    firsts = [sum(counts[:n]) for n in range(len(counts))]
    for end in range(len(order) + 1):
        bounds = list(zip(firsts, counts, strict=True))
        taken = [sorted(place - first for place in order[:end] if 0 <= place - first < n) for first, n in bounds]
        unfinished = [len(one) for one, count in zip(taken, counts, strict=True) if len(one) < count]
        assert not unfinished or max(unfinished) - min(unfinished) <= 1
        for one, count in zip(taken, counts, strict=True):
            if one:
                gaps = [after - before for before, after in zip(one, [*one[1:], count], strict=True)]
                assert one[0] == 0 and max(gaps) <= 2 * count / len(one) + 1


class Priced:
    """A labeller whose labels cost what it is told, each structure known by its x coordinate."""

    def __init__(self, price: Callable[[int], float]) -> None:
        self.price, self.groups = price, []  # type: ignore[var-annotated]

    def label(self, structures: Sequence[Atoms], provenance: Any, on_label: Any = None) -> list[LabelResult]:
        self.groups.append(len(structures))
        numbers = [int(atoms.positions[0, 0]) for atoms in structures]
        return [LabelResult(None, None, str(number), False, self.price(number)) for number in numbers]


def labelled(price: Callable[[int], float], count: int, seconds: float) -> tuple[list[LabelResult], list[int]]:
    labeller: Any = Priced(price)
    structures = [Atoms("H", [(n, 0, 0)]) for n in range(count)]
    return label_within(labeller, structures, FRAMES, seconds), labeller.groups


def test_the_label_that_reaches_the_budget_is_the_last() -> None:
    found, groups = labelled(lambda n: 0.5, 1000, 50.0)
    assert [result.identity for result in found] == [str(n) for n in range(100)]
    assert groups[:4] == [1, 1, 2, 4] and len(groups) < 15  # many at a time: workers are busy
    assert len(labelled(lambda n: 0.5, 30, 50.0)[0]) == 30
    assert len(labelled(lambda n: 70.0, 30, 50.0)[0]) == 1
    assert labelled(lambda n: 0.5, 30, 0.0) == labelled(lambda n: 0.5, 30, -3.0) == ([], [])
    assert len(labelled(lambda n: 5.0 if n == 0 else 0.1, 1000, 50.0)[0]) == 451  # compiles with the first
    failing = labelled(lambda n: 0.0 if n < 3 else 2.0, 1000, 50.0)[0]  # those that failed took no time
    assert 28 <= len(failing) <= 29
    dearer = sum(result.seconds for result in labelled(lambda n: 0.1 if n < 20 else 1.0, 1000, 50.0)[0])
    assert 50 <= dearer < 60


def test_a_second_call_finds_what_was_bought(
    waters: Waters, springs: CalculatorSettings, store: LabelStore, tmp_path: Path
) -> None:
    """A cut after any label leaves a beginning of the same order, and its seconds count as they were stored."""
    slow = springs.model_copy(update={"parameters": {**springs.parameters, "delay": 0.05}})
    frames = waters(40)
    frames[1].info["charge"] = RAISE
    with Labeller(slow, store, LocalSettings(workers=1)) as labeller:
        label_within(labeller, frames, FRAMES, 0.12)
        first = len(calls(tmp_path))
        assert 1 <= first <= 4
        found = label_within(labeller, frames, FRAMES, 0.4)
        assert first < len(found) == len(calls(tmp_path)) <= 10 and found[1].error is not None
        again = label_within(labeller, frames, FRAMES, 0.4)
    assert len(calls(tmp_path)) == len(found)
    assert [result.seconds for result in again] == [result.seconds for result in found]
