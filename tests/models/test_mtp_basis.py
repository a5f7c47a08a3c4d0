"""Bases of moment tensor potentials: how many scalars, that they are scalars, and what their contractions stand for."""

from __future__ import annotations

import numpy as np
import pytest

from almlip_jax.models.mtp.basis import Basis, basis, scalars
from almlip_jax.models.mtp.text import template

COUNTS = {2: 1, 4: 2, 6: 5, 8: 9, 10: 16, 12: 29, 14: 52, 16: 92}  # of scalars, in published templates
SIZES = {8: (11, 18, 14), 10: (25, 41, 42), 12: (46, 84, 117)}  # basic moments, all moments, products: likewise


def values(found: Basis, vectors: np.ndarray, radial: np.ndarray) -> np.ndarray:
    """The basis functions of neighbours at vectors [n, 3] with radial functions [mu, n]."""
    moments = [np.sum(radial[mu] * np.prod(vectors ** np.array(along), axis=1)) for mu, *along in found.moments]
    moments += [0.0] * (1 + max((i3 for *_, i3 in found.products), default=0) - len(moments))
    for i1, i2, factor, i3 in found.products:
        assert max(i1, i2) < i3
        moments[i3] += factor * moments[i1] * moments[i2]
    return np.array([moments[i] for i in found.scalars])


def neighbourhood(seed: int, n: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 3)), rng.normal(size=(4, n))


@pytest.mark.parametrize("level", COUNTS)
def test_as_many_scalars_as_in_published_templates(level):
    assert len(scalars(level)) == len(set(scalars(level))) == len(basis(level).scalars) == COUNTS[level]


@pytest.mark.parametrize("level", SIZES)
def test_as_few_moments_and_products_as_in_published_templates(level):
    found = basis(level)
    moments = len(found.moments) + len({i3 for *_, i3 in found.products})
    assert (len(found.moments), moments, len(found.products)) == SIZES[level]


@pytest.mark.parametrize("level", [8, 12, 16])
def test_rotations_and_reflections_change_no_function(level):
    found = basis(level)
    vectors, radial = neighbourhood(level)
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    before = values(found, vectors, radial)
    for matrix in (turn, -turn):
        np.testing.assert_allclose(values(found, vectors @ matrix, radial), before, rtol=1e-9, atol=1e-9)
    assert np.all(np.abs(before) > 1e-9) and not np.allclose(values(found, 1.1 * vectors, radial), before)


@pytest.mark.parametrize("unit", [False, True])
def test_functions_are_independent_but_for_one_relation_of_unit_vectors(unit):
    """The trace of M[0, 2] is M[0, 0] then, and no 4 x 4 minor of a 3 x 3 matrix is there to be other than zero."""
    found, table = basis(16), []
    for seed in range(250):
        vectors, radial = neighbourhood(seed, 12)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True) if unit else 1.0
        table.append(values(found, vectors / lengths, radial))
    singular = np.linalg.svd(table / np.linalg.norm(table, axis=0), compute_uv=False)
    assert np.sum(singular > 1e-6 * singular[0]) == COUNTS[16] - unit


def test_every_function_is_the_sum_over_neighbours_that_its_graph_says():
    """The scalar of moments i and edges ij is the sum over a neighbour k_i each of prod f(r_ki) prod (r_ki . r_kj)."""
    vectors, radial = neighbourhood(1, 5)
    dots = vectors @ vectors.T
    found, chosen = values(basis(16), vectors, radial), scalars(16)
    for value, graph in zip(found, chosen, strict=True):
        letters, operands, subscripts = "abcd", [radial[mu] for mu in graph.mus], list("abcd"[: len(graph.mus)])
        for j in range(len(graph.mus)):
            for i in range(j):
                operands.append(dots ** graph.edges[i][j])
                subscripts.append(letters[i] + letters[j])
        expected = np.einsum(f"{','.join(subscripts)}->", *operands, optimize=False)
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-9), graph


def test_the_template_says_what_the_basis_has():
    lines = dict(line.split(" = ") for line in template(8).splitlines() if " = " in line)
    assert lines["version"] == "1.1.0" and lines["\tradial_funcs_count"] == "2"
    assert lines["alpha_index_basic"].startswith("{{0, 0, 0, 0}, {0, 1, 0, 0}, {0, 0, 1, 0}, {0, 0, 0, 1}, ")
    assert lines["alpha_moment_mapping"].count(",") + 1 == int(lines["alpha_scalar_moments"]) == COUNTS[8]
    assert lines["alpha_index_times"].count("{") - 1 == int(lines["alpha_index_times_count"])
    with pytest.raises(ValueError, match="lowest level"):
        basis(1)
