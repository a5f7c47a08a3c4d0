"""Strata: groups of structures, such as those of one temperature, that have shares of what is chosen.

Who comes next is the stratum that is furthest behind its share (Sainte-Lague: the least ``(count + 1/2) / share``), of
several the first; what a stratum cannot use goes to the others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import BeforeValidator, Field, model_validator

from almlip_jax.errors import InputError
from almlip_jax.settings import Settings
from almlip_jax.structures.strata import by_size, named_strata, stratum

MOST_STRATA = 64
_LEAST_ROOM = 4  # strata that there is always room for: a new temperature compiles nothing anew


@struct.dataclass
class Strata:
    """The strata of some structures.

    Attributes:
        number: [n] int, the stratum of each structure; -1 where it belongs to none.
        shares: [G] of each stratum, in any one unit; the same for pool and labelled set.
    """

    number: jax.Array
    shares: jax.Array


@struct.dataclass
class Turns:
    """Whose turn it is, given how often each stratum has been chosen from.

    Attributes:
        number: [n] int, stratum of each candidate; those of none share the last.
        shares: [G + 1], 0 for the last: it comes when nothing is left of the others.
    """

    number: jax.Array
    shares: jax.Array

    @classmethod
    def of(cls, strata: Strata) -> Turns:
        """Those of some candidates."""
        last = strata.shares.shape[0]
        return cls(jnp.where(strata.number < 0, last, strata.number), jnp.append(strata.shares, 0))

    def counts(self, counted: jax.Array) -> jax.Array:
        """How many of those that count [n] are in each stratum, [G + 1]."""
        return jnp.zeros(self.shares.shape, jnp.int32).at[self.number].add(counted)

    def due(self, counts: jax.Array, free: jax.Array) -> jax.Array:
        """The free candidates [n] of the stratum whose turn it is."""
        there = jnp.zeros(self.shares.shape, bool).at[self.number].max(free)
        return free & (self.number == jnp.argmin(jnp.where(there, self._order(counts, 0.5), jnp.inf)))

    def surplus(self, counts: jax.Array, rows: jax.Array, left: jax.Array) -> jax.Array:
        """The choices that are left [m], rows [m] of the candidates, of the stratum that was chosen from last."""
        mine = self.number[rows]
        there = jnp.zeros(self.shares.shape, bool).at[mine].max(left)
        last = there.shape[0] - 1 - jnp.argmax(jnp.where(there, self._order(counts, -0.5), -jnp.inf)[::-1])
        return left & (mine == last)

    def ranks(self, counts: jax.Array, order: jax.Array, valid: jax.Array) -> jax.Array:
        """Rows [n] in the order in which turns are taken, where each stratum takes its own in a given order."""
        mine, counted = self.number[order], valid[order]
        before = jnp.cumsum(jax.nn.one_hot(mine, self.shares.shape[0], dtype=jnp.int32) * counted[:, None], axis=0)
        place = jnp.take_along_axis(before, mine[:, None], axis=1)[:, 0] - 1
        turn = self._quotient(counts[mine] + place + 0.5, self.shares[mine])
        return order[jnp.lexsort((jnp.arange(order.shape[0]), mine, turn, ~counted))]

    def _order(self, counts: jax.Array, more: float) -> jax.Array:
        return self._quotient(counts + more, self.shares)

    @staticmethod
    def _quotient(counts: jax.Array, shares: jax.Array) -> jax.Array:
        never = jnp.finfo(shares.dtype).max
        return jnp.where(shares > 0, counts / jnp.where(shares > 0, shares, 1), never)


class Stratification(Settings):
    """What tells strata apart, and what each has a share of."""

    by: Annotated[str, Field(min_length=1)]
    """Key of the structures' `info` that says their stratum: `bath_temperature` of walkers, `config_type`, `system`,
    whatever the structures of a pool carry."""
    edges: tuple[Annotated[float, Field(ge=-1e12, le=1e12)], ...] = ()
    """Where the key holds numbers that differ everywhere: bounds between strata, which are then called `below 450`,
    `450 to 750`, `750 and above`."""
    shares: Annotated[
        Literal["equal", "pool"] | dict[str, Annotated[float, Field(gt=0, le=1e6)]], BeforeValidator(named_strata)
    ] = "equal"
    """Share of each stratum: the same for all, as among the candidates, or numbers by its name; those that are not
    named get what the others leave."""
    of: Literal["dataset", "batch"] = "dataset"
    """What the shares are of: everything labelled together with the batch, or each batch by itself."""

    @model_validator(mode="after")
    def _strata_are_those_of_the_edges(self) -> Self:
        if list(self.edges) != sorted(set(self.edges)):
            raise ValueError("edges must rise from one to the next.")
        if self.shares == {}:
            raise ValueError("shares name no stratum; name some, or take equal.")
        strange = sorted(set(self.shares) - set(self._between)) if self.edges and isinstance(self.shares, dict) else ()
        if strange:
            raise ValueError(f"shares name '{strange[0]}'; the strata are: {', '.join(self._between)}.")
        return self

    @property
    def _between(self) -> tuple[str, ...]:
        """Names of the strata that edges make."""
        bounds = [f"{edge:g}" for edge in self.edges]
        inner = [f"{low} to {high}" for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
        return (f"below {bounds[0]}", *inner, f"{bounds[-1]} and above")

    def name(self, value: Any) -> str | None:
        """The stratum of a structure, from what its key holds; None where it has none.

        Raises:
            InputError: it is neither text nor a number, or no number where there are edges.
        """
        if value is None:
            return None
        try:
            name = stratum(value)
            if not self.edges:
                return name
            number = float(name)
        except (TypeError, ValueError) as error:
            wanted = "a number" if self.edges else "text or a number"
            raise InputError(f"'{self.by}' of a structure holds {value!r}, which is not {wanted}.") from error
        return None if math.isnan(number) else self._between[int(np.searchsorted(self.edges, number, side="right"))]

    def strata(
        self, pool: Sequence[Any], labelled: Sequence[Any], rows: tuple[int, int], chosen: int = 0
    ) -> tuple[Strata, Strata]:
        """Strata of candidates and of labelled structures.

        Args:
            pool: what `by` holds for each candidate; None where there is no such key.
            labelled: likewise.
            rows: how many rows there are of each.
            chosen: how many of the labelled ones, the last, count for the shares of a batch.

        Raises:
            InputError: no candidate has a stratum, no structure has one that `shares` name, or there are more than 64.
        """
        of_pool, of_labelled = [self.name(value) for value in pool], [self.name(value) for value in labelled]
        counts = Counter(name for name in of_pool if name is not None)
        if pool and not counts:
            raise InputError(f"no candidate has '{self.by}', by which the selector is stratified; name another key.")
        if len(counts) > MOST_STRATA and not isinstance(self.shares, dict):
            raise InputError(
                f"'{self.by}' has {len(counts)} values among the candidates, of which at most {MOST_STRATA} can have "
                "shares; put edges between strata, or name another key."
            )
        shares = self._shares(counts)
        if pool and not any(name in counts or name in of_labelled for name in shares):  # else they are used up
            known = ", ".join(sorted(counts)[:MOST_STRATA]) + (", ..." if len(counts) > MOST_STRATA else "")
            raise InputError(f"shares name {', '.join(shares)}, but candidates have '{self.by}' of {known}.")
        numbers = {name: number for number, name in enumerate(shares)}
        earlier = 0 if self.of == "dataset" else len(of_labelled) - chosen
        room = max(_LEAST_ROOM, 1 << (len(shares) - 1).bit_length())
        weights = np.pad(np.array(list(shares.values()), np.float32), (0, room - len(shares)))

        def numbered(names: Sequence[str | None], most: int) -> Strata:
            found = np.full(max(most, len(names)), -1, np.int32)
            found[: len(names)] = [-1 if name is None else numbers.get(name, -1) for name in names]
            return Strata(jax.device_put(found), jax.device_put(weights))

        return (
            numbered(of_pool, rows[0]),
            numbered([None] * earlier + of_labelled[earlier:], rows[1]),
        )

    def _shares(self, counts: Counter[str]) -> dict[str, float]:
        """Of each stratum that has one, in their order: numbers by size, then text."""
        shares: dict[str, float]
        if isinstance(self.shares, dict):
            shares = self.shares
        else:
            shares = {name: float(number) if self.shares == "pool" else 1.0 for name, number in counts.items()}
        order = self._between if self.edges else sorted(shares, key=by_size)
        return {name: shares[name] for name in order if name in shares}
