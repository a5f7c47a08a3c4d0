"""The plateau rule on tables of finished sweeps: where it ends them, and where it leaves them alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from almlip_jax.campaign.settings import PlateauSettings

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "plateau"))
from run import FALL, TABLES, Course, fired_before, fires, never_flat, rows

RULE = PlateauSettings()


@pytest.fixture(scope="module")
def table() -> list[dict]:
    return rows(RULE)


def test_query_by_committee_ends_where_its_error_flattens(table):
    ends = [row["now"] for row in table if (row["table"], row["selector"]) == ("zundel", "top_k")]
    assert len(ends) == 8 and sum(end is not None and 7 <= end <= 14 for end in ends) >= 7


def test_errors_that_fall_go_on_falling(table):
    """In two seeds of the Zundel cation the test error falls faster in every round from 7 to 14."""
    assert set(TABLES) == {row["table"] for row in table}
    studies = [row for row in table if row["table"] != "acac, short training"]
    early = [row for row in studies if row["now"] is not None and not row["fall_now"] <= FALL]
    assert {(row["table"], row["seed"]) for row in early} <= {
        ("zundel", n) for n in never_flat("zundel", "top_k", range(7, 15))
    }
    assert not [row for row in studies if row["table"] != "zundel" and row["now"] is not None]


def test_random_selection_ends_nothing(table):
    drawn = [row for row in table if row["selector"] == "random"]
    assert drawn and all(row["now"] is None and row["before"] is not None for row in drawn)


def test_the_table_in_the_repository_is_this_one(table):
    from almlip_jax.files import read_csv

    kept = read_csv(Path(__file__).parents[2] / "experiments" / "plateau" / "results.csv")
    assert [(r["table"], r["selector"], int(r["seed"])) for r in kept] == [
        (r["table"], r["selector"], r["seed"]) for r in table
    ]
    assert [r["now"] if r["now"] not in ("", None) else None for r in kept] == [r["now"] for r in table]


def test_a_ratio_that_was_never_large_tells_nothing():
    course = Course([1.1, 1.0, 0.95, 0.93], [1.0, 0.9, 0.85, 0.82], {"t": [1, 1, 1, 1]})
    assert fired_before(course) == 1 and fires(course, RULE) is None
