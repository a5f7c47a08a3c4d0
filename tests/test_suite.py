"""The list of slow tests, by whose durations the set is cut into parts."""

from __future__ import annotations

import json
from pathlib import Path

TESTS = Path(__file__).parent


def test_the_list_of_slow_tests_names_tests_that_exist():
    listed = json.loads((TESTS / "slow_seconds.json").read_text())
    for name, seconds in listed.items():
        path, *_, function = name.split("[")[0].split("::")
        assert f"def {function}(" in (TESTS.parent / path).read_text(), name
        assert 0 < seconds < 600, name
