"""Label factors of the study of teachers, from made-up errors whose answer is known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "teacher_labels"))

import factors


def table(seeds: int = 4) -> pd.DataFrame:
    """Errors 1000 / sqrt(n) from scratch and a quarter of that with a teacher, which scatter by seed alike."""
    rows = []
    for seed in range(seeds):
        for way, share in (("scratch", 1.0), ("teacher", 0.25)):
            for labels in (10, 20, 40, 80, 160):
                error = (1 + 0.1 * seed) * share * 1000 / np.sqrt(labels)
                rows.append(("acac", seed, labels, "random", way, "600K", error))
    return pd.DataFrame(rows, columns=[*factors.CELL, "forces_rmse"])


def test_a_quarter_of_the_error_is_a_sixteenth_of_the_labels() -> None:
    """Errors that fall with the root of the number of labels: of 160 labels, the 10 that were tried first do."""
    scratch = factors.curves(table()[table().way == "scratch"], "forces_rmse")[0]
    assert factors.factor(scratch, 10, 250 / np.sqrt(10)) == pytest.approx((16.0, False))
    assert factors.factor(scratch, 20, 250 / np.sqrt(20)) == pytest.approx((8.0, True))  # more labels than are known
    assert factors.factor(scratch, 1, 1000 / np.sqrt(30)) == pytest.approx((30.0, False))
    said = factors.wanted(table())
    assert "| acac | 600K | random | teacher | 20 / 160: 0.71 (0.71 to 0.71) | at least 16.0" in said
    assert "| 0.25 (0.25 to 0.25) | 4 |" in said


def test_tables_are_put_together_without_repeats(tmp_path: Path) -> None:
    """Of rows of one training that are in two tables the first counts."""
    whole = table(2)
    whole[whole.seed == 0].to_csv(tmp_path / "a.csv", index=False)
    whole.assign(forces_rmse=1.0).to_csv(tmp_path / "b.csv", index=False)
    found = factors.merged([tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "none.csv"])
    assert len(found) == len(whole)
    assert (found[found.seed == 0].forces_rmse > 1).all() and (found[found.seed == 1].forces_rmse == 1).all()
