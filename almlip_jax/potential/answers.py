"""What an evaluation of one structure has to say, taken out of the array of its program as it is asked for.

A program gives all its numbers in one array (`Following`), and engines read a few of them in each step: a dictionary of
all would cost a tenth of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from ase import Atoms

from almlip_jax.potential import spanning
from almlip_jax.scores import Score, atom_scores, score_of, scores
from almlip_jax.structures.followed import cell_volume
from almlip_jax.targets import Target, has_target, targets

if TYPE_CHECKING:
    from almlip_jax.potential.active_set import ActiveStructures
    from almlip_jax.potential.potential import Potential

Reader: TypeAlias = "Callable[[Answer], Any]"
"""Takes a result out of an answer; None where the structure does not have it."""


def of_atoms(name: str) -> str:
    """What results call a score of atoms, which structures may have under the same name."""
    return f"atom_{name}" if score_of(name) is not None else name


@dataclass(frozen=True)
class Layout:
    """Where the arrays of a tree lie in one flat array: beginning, end and shape by path, as ``scores/energy_std``."""

    places: Mapping[str, tuple[int, int, tuple[int, ...]]]

    @classmethod
    def of(cls, tree: Any) -> Layout:
        """That of a tree's leaves, one after the other."""
        places, begin = {}, 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            end = begin + math.prod(leaf.shape)
            places["/".join(str(step.key) for step in path)] = begin, end, tuple(leaf.shape)
            begin = end
        return cls(places)

    def under(self, group: str) -> list[str]:
        """Names of the arrays of a group."""
        return [path.removeprefix(f"{group}/") for path in self.places if path.startswith(f"{group}/")]


class Answer(Mapping[str, Any]):
    """Results of one structure by the names that ASE gives them, float64; see `PotentialCalculator`.

    It is of the structure as it was: where atoms or cell are to be changed in place, read it before, or copy it
    (``dict``).

    Args:
        atoms: the structure.
        packed: all numbers of its evaluation, [n] float64.
        layout: where they lie.
        readers: what takes each result out of them.
        references: eV, of each atom's element, [N].
        reference: eV, their sum.
    """

    def __init__(
        self,
        atoms: Atoms,
        packed: np.ndarray,
        layout: Layout,
        readers: Mapping[str, Reader],
        references: np.ndarray,
        reference: float,
    ) -> None:
        self.atoms, self.number, self.references, self.reference = atoms, len(atoms), references, reference
        self._packed, self.layout, self._readers = packed, layout, readers

    def __getitem__(self, name: str) -> Any:
        value = self._readers[name](self)
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return (name for name, read in self._readers.items() if read(self) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def results(self) -> dict[str, Any]:
        """All of it."""
        every = ((name, read(self)) for name, read in self._readers.items())
        return {name: value for name, value in every if value is not None}

    def array(self, path: str) -> np.ndarray:
        """An array of the tree that the program gave."""
        begin, end, shape = self.layout.places[path]
        return self._packed[begin:end].reshape(shape)

    def scalar(self, path: str) -> float:
        """The first number of an array."""
        return float(self._packed[self.layout.places[path][0]])

    def take(self, places: np.ndarray) -> np.ndarray:
        """Some of all its numbers, by where the layout has them."""
        return self._packed.take(places)

    def of_atoms(self, path: str) -> np.ndarray:
        """An array that begins with the atoms, without the slots that no atom has."""
        return self.array(path)[: self.number]

    def largest(self, path: str) -> float:
        """The largest number of the atoms in an array."""
        return float(self.of_atoms(path).max())

    @cached_property
    def volume(self) -> float | None:
        """Of the cell in Angstrom^3, of slabs and wires too, as ASE has it; None where its vectors do not span one."""
        cell = self.atoms.cell.array
        volume = cell_volume(cell)
        return volume if volume > _FLAT * math.prod(math.hypot(*row) for row in cell.tolist()) else None

    @cached_property
    def own_energies(self) -> np.ndarray:
        """Of members and atoms, [M, N] eV."""
        return self.array("atom_energies")[:, : self.number] + self.references


def readers_of(part: str, layout: Layout, potential: Potential) -> dict[str, Reader]:
    """What takes the results of a part of an evaluation (`Following`) out of the numbers that it gives."""
    readers: dict[str, Reader] = {}
    if part != "energies":
        readers |= {"energy": _energy, "free_energy": _energy}
        readers |= {"forces": partial(Answer.of_atoms, path="forces")}
        readers |= {"stress": lambda answer: _stress(answer, "virial", 0)}
        found = layout.under("further")
        readers |= {one.label: _of_target(one) for one in targets(found)}
    if part == "scores":
        readers |= _of_scores(layout, potential)
        readers |= {
            "member_energy": lambda answer: answer.array("member_energy")[:, 0] + answer.reference,
            "member_forces": lambda answer: answer.array("member_forces")[:, : answer.number],
            "member_stress": lambda answer: _stress(answer, "member_virial", (slice(None), 0)),
        }
    if part == "atoms":
        readers |= {"stresses": lambda answer: _stress(answer, "atom_virial", slice(answer.number))}
    if part in ("energies", "atoms"):
        mean: Reader = lambda answer: float(answer.own_energies.mean(axis=0).sum())  # noqa: E731
        readers |= {
            "energy": mean,
            "free_energy": mean,
            "energies": lambda answer: answer.own_energies.mean(axis=0),
            "energies_std": lambda answer: answer.own_energies.std(axis=0),
            "member_energies": lambda answer: answer.own_energies,
            "member_energy": lambda answer: answer.own_energies.sum(axis=1),
        }
    return readers


def _energy(answer: Answer) -> float:
    return answer.scalar("energy") + answer.reference


def _stress(answer: Answer, path: str, which: Any) -> np.ndarray | None:
    """Stress of virials [..., 3, 3], [..., 6] eV/Angstrom^3; None without a cell."""
    if answer.volume is None:
        return None
    found: np.ndarray = answer.array(path)[which][..., _FIRST, _SECOND] / -answer.volume
    return found


_FLAT = 1e-10  # volume of the unit vectors of a cell whose directions depend on each other, but for rounding
_FIRST, _SECOND = np.array([0, 1, 2, 1, 0, 0]), np.array([0, 1, 2, 2, 2, 1])  # Voigt's order


def _of_target(target: Target) -> Reader:
    """Of a target besides energy and what is derived from it."""

    def read(answer: Answer) -> Any:
        if not has_target(answer.atoms, target):
            return None
        path = f"further/{target.name}"
        return answer.array(path)[0] if target.per == "structure" else answer.of_atoms(path)

    return read


def _of_scores(layout: Layout, potential: Potential) -> dict[str, Reader]:
    """Scores of the structure and of its atoms, not a number where they are of a target that it does not have."""
    whole: dict[str, Reader] = {}
    each: dict[str, Reader] = {}
    for name in layout.under("scores"):
        whole[name] = partial(Answer.scalar, path=f"scores/{name}")
    for name in layout.under("atom_scores"):
        each[name] = partial(Answer.of_atoms, path=f"atom_scores/{name}")
        if name in potential.novelty:
            whole[name] = partial(Answer.largest, path=f"atom_scores/{name}")
    active = potential.active_set
    if active is not None and active.settings.parameters == "all":  # takes derivatives of its own
        grades = _grades(potential, active)
        whole[active.settings.score] = lambda answer: float(grades(answer)[0][0])
        each[active.settings.score] = lambda answer: grades(answer)[1][0] if grades(answer)[1] else None
    for declared, readers in ((scores(), whole), (atom_scores(), each)):
        for score in declared:
            if score.target is not None and score.name in readers:
                readers[score.name] = _where_there(score, readers[score.name])
    found = {**whole, **{of_atoms(name): reader for name, reader in each.items()}}
    if potential.force_error(np.ones(1)) is not None:
        found["force_error"] = lambda answer: potential.force_error(each["force_total"](answer))
    return found


def _grades(potential: Potential, active: ActiveStructures) -> Callable[[Answer], Any]:
    """Grades over all parameters, of structure and atoms; once for each answer."""

    def grades(answer: Answer) -> Any:
        if "grades" not in answer.__dict__:
            answer.__dict__["grades"] = spanning.grades_of(potential, active, [answer.atoms])
        return answer.__dict__["grades"]

    return grades


def _where_there(score: Score, read: Reader) -> Reader:
    """Reads a score of structures that have its target, and not a number of others."""
    of_it = [target for target in targets() if target.name == score.target]

    def guarded(answer: Answer) -> Any:
        value = read(answer)
        there = all(has_target(answer.atoms, target) for target in of_it)
        return value if there or value is None else value * float("nan")

    return guarded
