"""The list of slow tests, by whose durations the set is cut into parts."""

from __future__ import annotations

import json
import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_the_list_of_slow_tests_names_tests_that_exist():
    listed = json.loads((TESTS / "slow_seconds.json").read_text())
    for name, seconds in listed.items():
        path, *_, function = name.split("[")[0].split("::")
        assert f"def {function}(" in (TESTS.parent / path).read_text(), name
        assert 0 < seconds < 600, name


def test_the_list_of_slow_tests_follows_the_pages():
    """Snippets are named by their line, which an edit of the page moves."""
    pages = {path.name: path.read_text().splitlines() for path in (TESTS.parent / "docs").rglob("*.md")}
    for name in json.loads((TESTS / "slow_seconds.json").read_text()):
        if found := re.search(r"\[(\S+\.md):(\d+)\]$", name):
            page, line = found.groups()
            assert pages[page][int(line) - 1].startswith("```"), name
