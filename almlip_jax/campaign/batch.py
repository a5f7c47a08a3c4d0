"""From structures and a potential to a batch: evaluated structures as the pytrees that selectors see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms

from almlip_jax.campaign.cost import PaidLabel, expected_costs
from almlip_jax.campaign.systems import deal
from almlip_jax.dynamics.knowledge import fitted_scores
from almlip_jax.errors import InputError
from almlip_jax.features import Described, FeatureRequest
from almlip_jax.potential import Evaluated, Potential
from almlip_jax.potential.evaluator import rows_of
from almlip_jax.scores import needs_no_fit
from almlip_jax.selection import (
    Candidates,
    Environments,
    Selection,
    Selector,
    SelectorSettings,
    Stratification,
    select,
)
from almlip_jax.settings import Settings, sections
from almlip_jax.structures.carried import system_of
from almlip_jax.training import VALIDATION_ERROR


def features_of(settings: SelectorSettings, seed: int) -> FeatureRequest:
    """The features that a selector looks at."""
    return FeatureRequest.of(settings.feature_names, seed, atoms=settings.atom_feature_names)


@dataclass(frozen=True)
class AtomRoom:
    """Rows for the atoms of structures, where selectors look at these.

    Attributes:
        atoms: of all structures together.
        largest: of one.
    """

    atoms: int
    largest: int

    @classmethod
    def of(cls, sizes: Sequence[int], structures: int, *, each_once: bool) -> AtomRoom:
        """Room for some structures.

        Args:
            sizes: atoms of structures that there may be.
            structures: how many there may be at a time.
            each_once: whether a structure may be there once only; else all may be as large as the largest.
        """
        largest = max(sizes, default=1)
        once = sorted(sizes, reverse=True)[:structures] if each_once else []
        return cls(max(sum(once) if each_once else structures * largest, 1), largest)

    def holding(self, frames: Sequence[Atoms]) -> AtomRoom:
        """The same; where some frames do not fit, powers of two that hold them."""
        total, most = sum(len(frame) for frame in frames), max((len(frame) for frame in frames), default=1)
        return AtomRoom(
            *(
                room if needed <= room else 1 << (needed - 1).bit_length()
                for room, needed in ((self.atoms, total), (self.largest, most))
            )
        )


def remarks_of(settings: Settings) -> tuple[str, ...]:
    """Keys of structures' `info` that selectors look at, wherever they stand in some settings."""
    return tuple(dict.fromkeys(one.by for _, one in sections(settings, Stratification)))


def candidates(
    frames: Sequence[Atoms],
    evaluated: Evaluated | Described,
    capacity: int | None = None,
    *,
    room: AtomRoom | None = None,
    cost: np.ndarray | None = None,
    scores: Mapping[str, np.ndarray] | None = None,
    scalars: Mapping[str, float] | None = None,
) -> Candidates:
    """The pytree that selectors see.

    Args:
        frames: structures.
        evaluated: what the potential gives for them, features included; before there is one, these alone.
        capacity: rows to pad to, so that shapes stay the same from round to round; just enough by default.
        room: rows of atoms to pad to, likewise, where there are features of atoms.
        cost: [n] expected price of each label; the number of atoms by default.
        scores: name -> [n] of further scores.
        scalars: what goes with the structures as a whole.
    """
    rows = max(capacity or 0, len(frames))
    missing = rows - len(frames)
    price = np.array([len(frame) for frame in frames]) if cost is None else cost

    def padded(values: np.ndarray) -> jax.Array:
        return jax.device_put(np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)))

    return Candidates(
        features={name: padded(values) for name, values in evaluated.features.items()},
        scores={name: padded(values) for name, values in {**evaluated.scores, **(scores or {})}.items()},
        cost=padded(price.astype(np.float32)),
        valid=padded(np.ones(len(frames), bool)),
        id=jnp.arange(rows, dtype=jnp.int32),
        scalars={name: jnp.asarray(value) for name, value in (scalars or {}).items()},
        environments=_environments(frames, evaluated, rows, room) if evaluated.atom_features else None,
    )


def of_training_set(
    settings: SelectorSettings, potential: Potential, frames: Sequence[Atoms], labelled: Sequence[Atoms]
) -> dict[str, np.ndarray]:
    """Scores [n] of candidates that a selector looks at and that are fitted to what is labelled, by name.

    Raises:
        InputError: nothing is labelled.
    """
    asked = [name for name in settings.score_names if not needs_no_fit(name)]
    if not asked:
        return {}
    if not labelled:
        raise InputError(f"the selector looks at {asked[0]}, which compares with what is labelled; give some.")
    found = potential.scored(frames, fitted_scores(asked, potential, labelled)).scores
    return {name: np.asarray(found[name]) for name in asked}


def with_strata(
    settings: SelectorSettings,
    among: tuple[Sequence[Atoms], Candidates],
    around: tuple[Sequence[Atoms], Candidates],
    chosen: int = 0,
) -> tuple[Candidates, Candidates]:
    """Candidates and labelled structures with their strata, where the selector gives shares to some.

    Args:
        settings: of the selector.
        among: structures to choose from, and what the selector sees of them.
        around: those that are labelled, likewise.
        chosen: how many of these, the last ones, stand in the batch already.

    Raises:
        InputError: no candidate has a stratum, none has one that gets a share, or there are too many.
    """
    strata = settings.stratification
    if strata is None:
        return among[1], around[1]
    values = [[frame.info.get(strata.by) for frame in frames] for frames, _ in (among, around)]
    rows = len(among[1].valid), len(around[1].valid)
    of_pool, of_labelled = strata.strata(values[0], values[1], rows, chosen)
    return replace(among[1], strata=of_pool), replace(around[1], strata=of_labelled)


@dataclass(frozen=True)
class Looked:
    """Structures of which a selector is shown what is known of them.

    Attributes:
        frames: the structures.
        evaluated: what the potential gives for them, features included; before there is one, these alone.
        rows: to pad to, see `candidates`.
        room: of their atoms, likewise.
    """

    frames: Sequence[Atoms]
    evaluated: Evaluated | Described
    rows: int | None = None
    room: AtomRoom | None = None


def shown(
    settings: SelectorSettings,
    pool: Looked,
    known: Looked | None,
    *,
    fitted_to: tuple[Potential, Sequence[Atoms]] | None = None,
    paid: Callable[[], Iterable[PaidLabel]] = tuple,
    scores: Mapping[str, np.ndarray] | None = None,
    scalars: Mapping[str, float] | None = None,
    chosen: int = 0,
) -> tuple[Candidates, Candidates]:
    """What a selector is shown: candidates with what it asks for, and what is labelled, each with their strata.

    Args:
        settings: of the selector.
        pool: structures to choose from, at least one.
        known: those that are labelled, or count as such; where there are none, one row that counts for nothing.
        fitted_to: the potential and what is labelled, which scores that are fitted to it compare with.
        paid: labels whose times say what others cost, where the selector weighs by it.
        scores: name -> [n] of further scores of candidates.
        scalars: what goes with the structures as a whole.
        chosen: how many of ``known``, the last ones, stand in the batch already.

    Raises:
        InputError: see `of_training_set` and `with_strata`.
    """
    frames, exponent = pool.frames, settings.cost_exponent
    cost = None if exponent is None else expected_costs(frames, paid(), exponent)
    fitted = {} if fitted_to is None else of_training_set(settings, fitted_to[0], frames, fitted_to[1])
    among = candidates(
        frames, pool.evaluated, pool.rows, cost=cost, scores={**(scores or {}), **fitted}, room=pool.room
    )
    if known is not None and known.frames:
        around = candidates(known.frames, known.evaluated, known.rows, scalars=scalars, room=known.room)
        return with_strata(settings, (frames, among), (known.frames, around), chosen)
    rows, room = (None, None) if known is None else (known.rows, known.room)
    first = candidates(frames[:1], rows_of(pool.evaluated, [0]), rows, scalars=scalars, room=room)
    return with_strata(settings, (frames, among), ((), replace(first, valid=jnp.zeros_like(first.valid))))


def _environments(
    frames: Sequence[Atoms], evaluated: Evaluated | Described, rows: int, room: AtomRoom | None
) -> Environments:
    held = AtomRoom(0, 0) if room is None else room.holding(frames)
    numbers = [frame.numbers for frame in frames]
    return Environments.of(evaluated.atom_features, numbers, structures=rows, atoms=held.atoms, largest=held.largest)


def validation_error(metadata: Mapping[str, Any]) -> float:
    """Force error on the structures kept for validation, eV/Angstrom, as noted with a potential; NaN where none is."""
    error = metadata.get(VALIDATION_ERROR)
    return float("nan") if error is None else float(error)


def undecided(gains: Sequence[float | None], candidates: int) -> str | None:
    """A sentence that a selector could not tell candidates apart, so that their order decided; None where it could."""
    if len(gains) >= candidates or not gains or any(gain != 0 for gain in gains):
        return None
    return (
        f"the selector finds nothing in which the {candidates} candidates differ (all gains are 0) and has taken "
        "some of them in their order; other features or another score may tell more."
    )


@dataclass(frozen=True)
class Chooser:
    """A selector that is asked again and again, with arrays that keep their shapes.

    Attributes:
        settings: of the selector.
        batch: structures in a batch.
        candidates: rows for the structures to choose from.
        labelled: rows for those that are labelled.
        atoms_of_candidates: rows for their atoms.
        atoms_of_labelled: likewise.
    """

    settings: SelectorSettings
    batch: int
    candidates: int
    labelled: int
    atoms_of_candidates: AtomRoom
    atoms_of_labelled: AtomRoom

    @cached_property
    def selector(self) -> Selector:
        """Chooses a batch."""
        return self.settings.build(self.batch)


def choose_for_systems(
    choose_from: Callable[[str | None, np.ndarray], list[tuple[int, float]]],
    owners: Sequence[str | None],
    shares: Mapping[str, float],
    most: int,
) -> list[tuple[int, float]]:
    """Rows of the pool that go into a batch that systems share, each with its gain, in the order of their turns.

    Each system gets the first of those that the selector chooses among its candidates; what it cannot use goes to the
    others, and in the end to candidates of no system.

    Args:
        choose_from: what a selector chooses, best first, where only some rows [n] may be chosen; of which system.
        owners: the systems of the candidates.
        shares: of the systems.
        most: structures in the batch.
    """
    ranked: dict[str | None, list[tuple[int, float]]] = {}
    for name in (*shares, None):
        mine = np.array([owner == name for owner in owners], bool)
        ranked[name] = choose_from(name, mine) if mine.any() else []
    room = {name: len(ranked[name]) for name in shares}
    turns: list[str | None] = [*deal(shares, most, room)]
    turns += [None] * min(most - len(turns), len(ranked[None]))
    left = {name: iter(rows) for name, rows in ranked.items()}
    return [next(left[name]) for name in turns]


def choose(selector: Selector, key: jax.Array, pool: Candidates, labelled: Candidates) -> list[tuple[int, float]]:
    """Rows of the pool that a selector chose, best first, each with its gain.

    Raises:
        InputError: it is a user's own and gives something else than a `Selection`, chooses what is no candidate, or one
            twice.
    """
    chosen = select(selector, key, pool, labelled)
    if not isinstance(chosen, Selection):
        raise InputError(f"a selector gives a Selection (indices, valid, gain), not a {type(chosen).__name__}.")
    shapes = [np.shape(part) for part in (chosen.indices, chosen.valid, chosen.gain)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise InputError(f"indices, valid and gain of a Selection are of one length [k], not {shapes}.")
    found = zip(chosen.indices, chosen.valid, chosen.gain, strict=True)
    rows = [(int(index), float(gain)) for index, valid, gain in found if valid]
    met: set[int] = set()
    for row, _ in rows:
        if not (0 <= row < len(pool.valid) and pool.valid[row]):
            raise InputError(f"the selector chose row {row}, which is no candidate; let it look at pool.valid.")
        if row in met:
            raise InputError(f"the selector chose row {row} twice; let it choose each candidate once.")
        met.add(row)
    return rows


def choose_shared(
    selector: Selector,
    key_of: Callable[..., jax.Array],
    frames: Sequence[Atoms],
    shown: tuple[Candidates, Candidates],
    shares: Mapping[str, float],
    most: int,
) -> list[tuple[int, float]]:
    """Rows of the structures that a selector chooses, each with its gain; named systems share them.

    Args:
        selector: chooses.
        key_of: gives the random key of the choice, and with the name of a system that of the choice of its structures.
        frames: to choose from.
        shown: what the selector sees of them, and of those that are labelled.
        shares: of named systems, see `choose_for_systems`; without any the selector chooses among all.
        most: structures.
    """
    among, around = shown
    if not shares:
        return choose(selector, key_of(), among, around)[:most]

    def choose_from(system: str | None, mine: np.ndarray) -> list[tuple[int, float]]:
        theirs = among.valid & np.pad(mine, (0, len(among.valid) - len(mine)))
        return choose(selector, key_of(system or ""), replace(among, valid=theirs), around)

    return choose_for_systems(choose_from, [system_of(frame) for frame in frames], shares, most)


def taken(frames: Sequence[Atoms], chosen: Sequence[tuple[int, float]], place: str = "") -> list[Atoms]:
    """Copies of the frames that were chosen (`choose`), with ``info["gain"]`` and, under a name, their place."""
    batch = []
    for index, gain in chosen:
        frame = frames[index].copy()
        frame.info |= ({place: index} if place else {}) | {"gain": gain}
        batch.append(frame)
    return batch
