"""Selectors of a user's own: what they choose is looked at, and they are compiled once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almlip_jax.campaign.batch import choose
from almlip_jax.errors import InputError
from almlip_jax.given import given_settings
from almlip_jax.selection import Candidates, Selection, SelectorSettings, top_k
from almlip_jax.steps import _selector

CODE = """
import jax
import jax.numpy as jnp
from almlip_jax.selection import Selection

traced = []

def highest(k, score="force_std_max"):
    def select(key, pool, labelled):
        traced.append(k)
        gain, rows = jax.lax.top_k(jnp.where(pool.valid, pool.scores[score], -jnp.inf), k)
        return Selection(rows, pool.valid[rows], gain)
    return select

def certain():
    def narrow(key, pool, labelled):
        return pool.replace(valid=pool.valid & (pool.scores["force_std_max"] < 0.5))
    return narrow
"""


def pool(valid: Any = (True, True, False, True)) -> Candidates:
    found = Candidates.of(scores={"force_std_max": [0.1, 0.4, 0.9, 0.2]})
    return found.replace(valid=jnp.asarray(valid))


def of_rows(*rows: int, gain: Any = None) -> Any:
    """A selector that chooses rows whatever there is."""

    def select(key: Any, pool: Candidates, labelled: Candidates) -> Selection:
        indices = jnp.asarray(rows)
        return Selection(indices, jnp.ones(len(rows), bool), jnp.zeros(len(rows)) if gain is None else gain)

    return select


@pytest.mark.parametrize(
    ("selector", "told"),
    [
        (of_rows(0, 2), "row 2, which is no candidate; let it look at pool.valid"),
        (of_rows(0, -1), "row -1, which is no candidate"),
        (of_rows(0, 4), "row 4, which is no candidate"),
        (of_rows(3, 1, 3), "row 3 twice"),
        (of_rows(3, 1, gain=jnp.zeros(3)), "of one length"),
        (of_rows(3, 1, gain=jnp.zeros((2, 1))), "of one length"),
    ],
)
def test_what_is_no_choice_is_refused(selector, told):
    """Campaigns, sweeps and commands take rows from here, and would label others than were meant."""
    with pytest.raises(InputError, match=told):
        choose(selector, jax.random.key(0), pool(), pool())


def test_a_choice_is_taken_as_it_is():
    assert [row for row, _ in choose(of_rows(3, 1), jax.random.key(0), pool(), pool())] == [3, 1]
    found = choose(top_k(4, "force_std_max"), jax.random.key(0), pool(), pool())
    np.testing.assert_allclose(found, [(1, 0.4), (3, 0.2), (0, 0.1)], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"kind": "user", "function": "my_selectors:highest"}, [1, 3]),
        (
            {
                "kind": "chain",
                "filters": [{"kind": "user", "function": "my_selectors:certain"}],
                "selector": {"kind": "user", "function": "my_selectors:highest"},
            },
            [1, 3],
        ),
    ],
    ids=["alone", "behind a filter"],
)
def test_a_factory_is_compiled_once(with_module, settings, rows):
    """Each round of a script reads its settings anew."""
    with_module("my_selectors", CODE)
    import my_selectors

    my_selectors.traced.clear()
    for _ in range(3):
        _, chosen_by = _selector(settings, 2, None, ())
        assert [row for row, _ in chosen_by(jax.random.key(0), pool(), pool())] == rows
    assert my_selectors.traced == [2]
    _, chosen_by = _selector(settings, 3, None, ())
    assert len(chosen_by(jax.random.key(0), pool(), pool())) == 3, "another number is another program"
    assert my_selectors.traced == [2, 3]


def test_parameters_tell_selectors_apart(with_module):
    with_module("my_selectors", CODE)
    given = {"kind": "user", "function": "my_selectors:highest"}
    one, again = (given_settings(SelectorSettings, given, "selector").build(2) for _ in range(2))
    other = given_settings(SelectorSettings, given | {"parameters": {"score": "energy_std"}}, "selector").build(2)
    assert one is again and one is not other


def test_a_factory_that_looks_for_what_is_not_there_is_told_so(with_module):
    with_module("my_selectors", CODE)
    given = {"kind": "user", "function": "my_selectors:highest", "parameters": {"score": "charm"}}
    _, chosen_by = _selector(given, 2, None, ())
    with pytest.raises(InputError, match="charm"):
        chosen_by(jax.random.key(0), pool(), pool())
