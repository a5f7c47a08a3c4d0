"""Random clusters: atoms or molecules brought together in random directions until they touch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from ase import Atoms
from ase.build import sort
from ase.data import covalent_radii
from pydantic import Field, model_validator
from scipy.spatial.transform import Rotation

from almlip_jax.dynamics import RelaxationSettings
from almlip_jax.errors import InputError
from almlip_jax.generation.base import GenerationInputs, GeneratorSettings, numbers_of, refuse_disorder
from almlip_jax.structures.carried import carried, named
from almlip_jax.structures.electronic_state import electronic_state

Count = Annotated[int, Field(ge=1, le=1000)]
Share = Annotated[float, Field(ge=0, le=10)]
_PIECES = (2, 6)
_OF_ATOMS, _OF_MOLECULES = (0.9, 1.1), (1.6, 2.4)


class ClustersSettings(GeneratorSettings):
    """Free clusters of atoms, or of the start geometries as rigid molecules.

    Piece after piece is turned at random, and comes from a random direction towards the middle of those that are there
    until it touches one.  In an exploration clusters are relaxed with the ensemble, without any label; in an initial
    set they are as drawn.
    """

    needs_starts: ClassVar[bool] = False

    kind: Literal["clusters"] = "clusters"
    composition: dict[str, Count] | None = None
    """Atoms of each element, as ``{Cu: 13}``; where none is given, the start geometries are the pieces."""
    pieces: tuple[Count, Count] | None = None
    """Fewest and most molecules in a cluster, each number as likely; 2 to 6 where none is given.  The first is any of
    the start geometries, whose system the cluster belongs to; the others are neutral ones, so that there is one ion at
    most."""
    contact: tuple[Share, Share] | None = None
    """Least and most distance at which pieces touch, over the sum of two covalent radii, drawn for each piece; 0.9 to
    1.1 of atoms, 1.6 to 2.4 of molecules, where none is given."""
    relax: RelaxationSettings | None = RelaxationSettings(steps=300)
    """How they are relaxed with the ensemble; null leaves them as they are."""

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        if self.composition is not None:
            numbers_of(tuple(self.composition), "composition")
            if self.pieces is not None:
                raise ValueError("pieces are start geometries; leave them out where a composition is given.")
        if self.relax is not None and self.relax.cell != "fixed":
            raise ValueError("clusters have no cell that could be relaxed: leave relax.cell out.")
        refuse_disorder(pieces=self.pieces, contact=self.contact)
        if self.contact is not None and self.contact[0] < self.closest:
            raise ValueError(f"contact {self.contact[0]:g} is less than closest {self.closest:g}: raise it.")
        return self

    @property
    def elements(self) -> frozenset[int]:
        """Those of the composition."""
        return frozenset(numbers_of(tuple(self.composition or ()), "composition"))

    @property
    def relaxation(self) -> RelaxationSettings | None:
        """As given."""
        return self.relax

    def unsuited(self, start: Atoms) -> str | None:
        """Without a composition it has to be a free molecule with a closed shell."""
        if self.composition is not None:
            return None
        if start.pbc.any() or start.constraints:
            return "is periodic or holds atoms fixed"
        spin = electronic_state(start)[1]
        return None if spin == 1 else f"has multiplicity {spin}, which is no closed shell"

    def check(self, starts: Sequence[Atoms]) -> None:
        """Without a composition there have to be molecules, one of them neutral."""
        if self.composition is not None:
            return
        if not starts:
            raise InputError("'clusters' brings start geometries together; give these, or a composition.")
        if not _neutral(starts):
            raise InputError("'clusters' has one ion in each, but no start geometry is neutral; add one that is.")

    def generate(self, given: GenerationInputs) -> Iterable[Atoms]:
        """Clusters, with the middle of their atoms at the origin."""
        return [self._one(given.starts, given.generator) for _ in range(self.count)]

    def _one(self, starts: Sequence[Atoms], draw: np.random.Generator) -> Atoms:
        if self.composition is not None:
            symbols = [symbol for symbol, count in self.composition.items() for _ in range(count)]
            order = [Atoms(symbols[n]) for n in draw.permutation(len(symbols))]
            return sort(_together(order, self.contact or _OF_ATOMS, draw))
        fewest, most = self.pieces or _PIECES
        others, first = _neutral(starts), starts[int(draw.integers(len(starts)))]
        rows = draw.integers(len(others), size=int(draw.integers(fewest, most + 1)) - 1)
        pieces = [_bare(first), *(_bare(others[row]) for row in rows)]
        cluster = _together(pieces, self.contact or _OF_MOLECULES, draw)
        cluster.info = {"charge": electronic_state(first)[0], "spin": 1, **named(first)}
        return cluster


def _neutral(starts: Sequence[Atoms]) -> list[Atoms]:
    return [start for start in starts if electronic_state(start)[0] == 0]


def _bare(piece: Atoms) -> Atoms:
    """What a structure carries but its charge and spin, which are those of the piece alone."""
    bare = carried(piece)
    bare.info = {}
    return bare


def _together(pieces: Sequence[Atoms], contact: tuple[float, float], draw: np.random.Generator) -> Atoms:
    """Pieces brought together one after the other, each turned at random."""
    cluster = Atoms()
    for piece in pieces:
        turn = Rotation.from_quat(draw.normal(size=4)).as_matrix()
        places = (piece.positions - piece.positions.mean(axis=0)) @ turn.T
        share = float(draw.uniform(*contact))
        moved = piece.copy()
        moved.positions = places + _until_it_touches(cluster, piece.numbers, places, share, draw)
        cluster += moved
    cluster.positions -= cluster.positions.mean(axis=0)
    return cluster


def _until_it_touches(
    cluster: Atoms, numbers: np.ndarray, places: np.ndarray, share: float, draw: np.random.Generator
) -> np.ndarray:
    """Where a piece stops [3] that comes from a random direction towards the middle of a cluster, Angstrom.

    As it comes along t u from large t, two atoms that are d apart at t = 0 are at a distance c where
    t = -d.u + sqrt((d.u)^2 - d^2 + c^2); the pair that gets there first stops it.
    """
    if not len(cluster):
        return np.zeros(3)
    aim = cluster.positions.mean(axis=0)
    while True:
        direction = draw.normal(size=3)
        direction /= np.linalg.norm(direction)
        offset = aim + places[:, None] - cluster.positions  # [n, N, 3]
        least = share * (covalent_radii[numbers][:, None] + covalent_radii[cluster.numbers])
        along = offset @ direction
        under = along**2 - np.sum(offset**2, axis=-1) + least**2
        meets = under >= 0
        if meets.any():
            return aim + direction * float(np.max(np.sqrt(under[meets]) - along[meets]))
        aim = cluster.positions[draw.integers(len(cluster))]  # it passed through a hole
