"""From basic moments to the basis functions: the tree of contractions, a layer of products after the other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import accumulate

import jax
import jax.numpy as jnp

from almlip_jax.errors import InputError
from almlip_jax.materialise import materialised
from almlip_jax.models.layout import join
from almlip_jax.models.mtp.basis import Basis
from almlip_jax.models.mtp.tables import Table, Term, bilinear_rows, chosen_rows, quadratic_rows

_FEW, _MANY = 4, 8  # `Table.together` of short rows and of long ones, whose partial sums else leave the caches
_LONG = 16  # terms of a row, on average


@dataclass(frozen=True, eq=False)
class Tree:
    """The products of a basis in layers: those of a layer take factors of the layers before.

    Attributes:
        basic: number of basic moments.
        layers: each maps all moments known before to further ones.
        scalars: places of the basis functions among the basic moments and those of all layers, in this order.
    """

    basic: int
    layers: tuple[Table, ...]
    scalars: tuple[int, ...]

    @cached_property
    def parts(self) -> tuple[range, ...]:
        """Places of the basic moments, and of those of each layer."""
        ends = list(accumulate([self.basic, *(len(layer.terms) for layer in self.layers)]))
        return tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False))

    @cached_property
    def products(self) -> dict[int, tuple[Term, ...]]:
        """Terms of each moment that is not basic."""
        found = zip(self.parts[1:], self.layers, strict=True)
        return {place: terms for part, layer in found for place, terms in zip(part, layer.terms, strict=True)}

    @cached_property
    def back(self) -> tuple[tuple[Table, tuple[int, ...]], ...]:
        """From cotangents of the basis functions to those of all moments, the last layer first.

        For each layer the table that maps cotangents found before and all moments, and which basis function each of its
        moments is (-1: none).
        """
        uses: dict[int, list[tuple[int, int, float]]] = {}
        for moment, terms in self.products.items():
            for i, j, factor in terms:
                uses.setdefault(i, []).append((moment, j, factor))
                uses.setdefault(j, []).append((moment, i, factor))
        place: dict[int, int] = {}
        found, function = [], {moment: n for n, moment in enumerate(self.scalars)}
        for part in reversed(self.parts):
            rows = tuple(tuple((place[k], other, x) for k, other, x in uses.get(moment, ())) for moment in part)
            together = _MANY if sum(map(len, rows)) > _LONG * len(rows) else _FEW
            table = Table(rows, len(place), self.parts[-1].stop, together)
            found.append((table, tuple(function.get(m, -1) for m in part)))
            place |= {moment: len(place) + n for n, moment in enumerate(part)}
        return tuple(found)


@lru_cache(maxsize=32)
def tree(basis: Basis) -> Tree:
    """The layers of a basis; products that no basis function needs are left out.

    Raises:
        InputError: a product takes what is not known before it, or a basis function comes twice.
    """
    terms = _terms(basis)
    depth: dict[int, int] = dict.fromkeys(range(len(basis.moments)), 0)
    for moment, products in terms.items():  # in the order of the basis: factors come before
        depth[moment] = 1 + max(depth[factor] for i, j in products for factor in (i, j))
    needed = _needed(basis, terms)
    place = {moment: moment for moment in range(len(basis.moments))}
    layers = []
    for layer in range(1, 1 + max(depth.values())):
        chosen = [moment for moment in terms if depth[moment] == layer and moment in needed]
        known = len(place)
        rows = (tuple((place[i], place[j], float(x)) for (i, j), x in terms[moment].items()) for moment in chosen)
        layers.append(Table(tuple(rows), known, known))
        place |= {moment: known + n for n, moment in enumerate(chosen)}
    return Tree(len(basis.moments), tuple(layers), tuple(place[moment] for moment in basis.scalars))


def _terms(basis: Basis) -> dict[int, Counter[tuple[int, int]]]:
    """Products of each moment that is not basic, with equal ones together, in an order in which factors come before."""
    basic, terms = len(basis.moments), dict[int, Counter[tuple[int, int]]]()
    used: set[int] = set()
    for i, j, factor, k in basis.products:
        unknown = [one for one in (i, j) if not 0 <= one < basic and one not in terms]
        if unknown or k < basic or k in used or k in (i, j):
            raise InputError(
                f"the product ({i}, {j}, {factor}, {k}) takes a moment that is not complete before it, or adds to one "
                "that was taken; correct alpha_index_times."
            )
        used.update((i, j))
        terms.setdefault(k, Counter())[min(i, j), max(i, j)] += factor
    absent = [one for one in basis.scalars if not 0 <= one < basic and one not in terms]
    if absent or len(set(basis.scalars)) < len(basis.scalars):
        wrong = absent[0] if absent else Counter(basis.scalars).most_common(1)[0][0]
        raise InputError(f"basis function {wrong} is no moment, or comes twice; correct alpha_moment_mapping.")
    return terms


def _needed(basis: Basis, terms: dict[int, Counter[tuple[int, int]]]) -> set[int]:
    needed = set(basis.scalars)
    for moment in reversed(terms):
        if moment in needed:
            needed.update(factor for pair in terms[moment] for factor in pair)
    return needed


@lru_cache(maxsize=32)
def factors_of(basis: Basis) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Of each basis function the moments (mu, nu) that it multiplies.

    Raises:
        InputError: as `tree`, or a sum is over products of different moments.
    """
    found: dict[int, tuple[tuple[int, int], ...]] = {}
    found |= {n: ((mu, sum(along)),) for n, (mu, *along) in enumerate(basis.moments)}
    for moment, products in _terms(basis).items():
        several = {tuple(sorted(found[i] + found[j])) for i, j in products}
        if len(several) > 1:
            raise InputError(f"moment {moment} sums products of different moments; correct alpha_index_times.")
        found[moment] = several.pop()
    return tuple(found[moment] for moment in basis.scalars)


def contract(basis: Basis, moments: jax.Array, condition: jax.Array | None = None) -> jax.Array:
    """The basis functions of some atoms.

    Args:
        basis: with n basic moments and S basis functions.
        moments: [n, A] basic moments in the order of the basis.
        condition: bool scalar that the compiler cannot know and that holds for all that is looked at, where there is
            one: products are then arrays of their own, however many operations read basis functions (`materialised`).

    Returns:
        [S, A]; differentiable in the moments any number of times.
    """
    return _contract(tree(basis), moments, condition)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(found: Tree, moments: jax.Array, condition: jax.Array | None) -> jax.Array:
    return _forward(found, moments, condition)[0]


def _forward(found: Tree, moments: jax.Array, condition: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The basis functions, and all moments."""
    function = partial(_all_moments, found)
    known = function(moments) if condition is None else materialised(function, condition, moments)
    return chosen_rows(found.scalars, known.shape[0], known), known


def _all_moments(found: Tree, known: jax.Array) -> jax.Array:
    for layer in found.layers:
        further = quadratic_rows(layer, known)
        known = jax.lax.optimization_barrier(join((known, further), (known.shape[0], further.shape[0]), 0))
    return known


def _backward(found: Tree, known: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None]:
    """Of each moment once, layer by layer from the last one, over all products that take it."""
    later, own = None, cotangent
    for table, seeds in found.back:
        own = chosen_rows(seeds, cotangent.shape[0], cotangent)
        if later is None:
            later = own
            continue
        own = own + bilinear_rows(table, later, known)
        later = jax.lax.optimization_barrier(join((later, own), (later.shape[0], own.shape[0]), 0))
    return own, None


_contract.defvjp(_forward, _backward)


def contract_atoms(basis: Basis, moments: jax.Array) -> jax.Array:
    """The basis functions [A, S] of basic moments [A, n], see `contract`."""
    return jnp.swapaxes(contract(basis, jnp.swapaxes(moments, 0, 1)), 0, 1)
