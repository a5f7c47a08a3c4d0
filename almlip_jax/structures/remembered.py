"""What a potential remembers of its training: a sample of labelled structures, kept with it for later trainings."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice, zip_longest
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.structures.electronic_state import electronic_state, multiplicity, stated_state
from almlip_jax.structures.extxyz import write_frame
from almlip_jax.structures.validation import holding
from almlip_jax.structures.weights import loss_weights, weight_names
from almlip_jax.targets import label_names


def remember(
    new: Sequence[Atoms], number: int, generator: np.random.Generator, old: Sequence[Atoms] = ()
) -> tuple[Atoms, ...]:
    """A sample of the structures that a potential was trained on, with their labels and without remarks.

    Half of it comes from those it remembered before and half from new ones, as far as there are enough; within each
    half all compositions, electronic states and config types have their turn before any has the next.

    Args:
        new: trained on; those without labels or weight are passed over.
        number: size of the sample.
        generator: draws them.
        old: remembered before, and trained on again.

    Returns:
        old ones first, each part in its order.
    """
    ours, theirs = ([_plain(atoms) for atoms in part if _teaches(atoms)] for part in (old, new))
    known, first = [*ours, *theirs], len(ours)
    turns = (_in_turn(known, range(first), generator), _in_turn(known, range(first, len(known)), generator))
    alternating = (n for n in chain.from_iterable(zip_longest(*turns)) if n is not None)
    return tuple(known[n] for n in sorted(islice(alternating, number)))


def composition(atoms: Atoms) -> tuple[int, ...]:
    """Atomic numbers in order: the same for all structures of one formula."""
    return tuple(np.sort(atoms.numbers).tolist())


def as_text(structures: Iterable[Atoms]) -> str:
    """Structures as the content of an extended XYZ file, with every digit."""
    file = io.StringIO()
    for number, atoms in enumerate(structures):
        write_frame(file, atoms, f"remembered structure {number}")
    return file.getvalue()


def _teaches(atoms: Atoms) -> bool:
    return bool(_labels(atoms)) and any(loss_weights(atoms, "a structure").values())


def _labels(atoms: Atoms) -> dict[str, Any]:
    results: Mapping[str, Any] = {} if atoms.calc is None else atoms.calc.results
    return {name: results[name] for name in label_names() if results.get(name) is not None}


def bare(atoms: Atoms) -> Atoms:
    """What a potential looks at: elements, positions, cell, periodic directions, and charge and spin in ``info``."""
    plain = Atoms(numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    plain.info = dict(stated_state(atoms))
    if "spin" not in plain.info and multiplicity(atoms) != 1:  # initial moments say it, which are not kept
        plain.info["spin"] = multiplicity(atoms)
    return plain


def _plain(atoms: Atoms) -> Atoms:
    """What a training looks at."""
    plain = bare(atoms)
    plain.info = {
        **{name: atoms.info[name] for name in ("config_type", *weight_names()) if name in atoms.info},
        **plain.info,
    }
    if "config_type" in plain.info:
        plain.info["config_type"] = str(plain.info["config_type"])
    plain.calc = holding(plain, _labels(atoms))
    return plain


def _in_turn(structures: Sequence[Atoms], places: Iterable[int], generator: np.random.Generator) -> list[int]:
    """Places in an order in which compositions and config types take turns; turns and structures are drawn."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for n in places:
        one = structures[n]
        kind = (one.info.get("config_type"), *composition(one), *electronic_state(one))
        groups.setdefault(kind, []).append(n)
    drawn = [generator.permutation(group).tolist() for group in groups.values()]
    rounds = zip_longest(*(drawn[g] for g in generator.permutation(len(drawn))))
    return [n for n in chain.from_iterable(rounds) if n is not None]
