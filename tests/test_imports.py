"""Starting up imports no more than it needs, and leaves other packages as they are."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "program",
    [
        "import almlip_jax, jax_md, e3nn_jax",
        pytest.param("import jax_md, e3nn_jax; import almlip_jax", marks=pytest.mark.slow),
    ],
    ids=["first", "last"],
)
def test_whole_packages_are_what_they_always_are(program):
    run(
        f"{program}\n"
        "import almlip_jax.dynamics, almlip_jax.models.bilinear\n"
        "import jax_md.quantity, jax_md.energy\n"
        "assert jax_md.quantity.kinetic_energy and jax_md.energy.soft_sphere and jax_md.simulate.nve\n"
        "assert e3nn_jax.clebsch_gordan(1, 1, 2).shape == (3, 3, 5) and e3nn_jax.Irreps('0e')"
    )


def test_names_are_imported_when_they_are_used_and_slow_parts_stay_outside():
    loaded, missing = run(
        "import sys, almlip_jax\n"
        "assert 'jax' not in sys.modules and 'Learner' in dir(almlip_jax)\n"
        "import almlip_jax.oracles.worker\n"
        "first = [name for name in ('jax', 'scipy', 'ase.db') if name in sys.modules]\n"
        "from almlip_jax import Learner, label, select, thresholds, know\n"
        "import almlip_jax.dynamics, almlip_jax.potential, almlip_jax.fitting\n"
        "slow = 'sympy', 'jax_md', 'e3nn_jax', 'matplotlib', 'pyscf'\n"
        "print(*first, *[name for name in slow if name in sys.modules])\n"
        "assert all(hasattr(almlip_jax, name) for name in almlip_jax.__all__)\n"
        "try:\n    almlip_jax.Lerner\nexcept AttributeError as error:\n    print(error)"
    ).splitlines()
    assert loaded == "" and "has no attribute 'Lerner'" in missing


@pytest.mark.parametrize("first", ["import almlip_jax", "import jax, almlip_jax"], ids=["alone", "after jax"])
def test_the_compiler_keeps_quiet_unless_asked(first):
    level = f"{first}, os; print(os.environ['TF_CPP_MIN_LOG_LEVEL'])"
    assert run(level) == "3\n"
    assert run(f"import os; os.environ['TF_CPP_MIN_LOG_LEVEL'] = '0'; {level}") == "0\n"


def rooms() -> dict[str, int]:
    """The floor of every room, in the order of the table of `docs/design.md`."""
    table = (ROOT / "docs" / "design.md").read_text().partition("\n## Kinds")[0].splitlines()
    rows = [line.split("|")[1] for line in table if line.startswith("| `")]
    return {name.rstrip("/"): floor for floor, row in enumerate(rows) for name in re.findall(r"`([\w/]+)`", row)}


def imported(statements: list[ast.stmt]) -> Iterator[str]:
    """Rooms that are imported when a module is loaded: not for types alone, nor when something is called."""
    for node in statements:
        if isinstance(node, ast.If):
            yield from imported(node.orelse if "TYPE_CHECKING" in ast.dump(node.test) else node.body + node.orelse)
        elif isinstance(node, ast.Try | ast.With):
            yield from imported(node.body)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            of = getattr(node, "module", None)
            names = (
                [of] if of not in (None, "almlip_jax") else [f"{of or ''}.{one.name}".strip(".") for one in node.names]
            )
            yield from (name.split(".")[1] for name in names if name.startswith("almlip_jax.") and "__" not in name)


def test_no_room_imports_one_above_it():
    floors, upward = rooms(), []
    for file in sorted((ROOT / "almlip_jax").rglob("*.py")):
        room = file.relative_to(ROOT / "almlip_jax").with_suffix("").parts[0]
        if not room.startswith("__"):
            others = set(imported(ast.parse(file.read_text()).body))
            assert {room, *others} <= set(floors), f"{file} or what it imports is not in the table"
            upward += [(file.name, other) for other in others if floors[other] > floors[room]]
    assert not upward and len(floors) > 50
