"""When would `stopping.plateau` have ended the sweeps?  ``python experiments/plateau/run.py``.

Reads the uncertainties of batch and pool from the committed tables of other studies, and judges them round by round as
a campaign would: by the rule as it is, and by what it was before (the batch at most 1.2 times the pool in two rounds in
a row).  Then it looks, which a campaign cannot, at the test error: by how much it had fallen a round, over the three
rounds before, on the test set where it fell most.  One row a table, selector and seed in ``results.csv``.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from almlip_jax.campaign.settings import PlateauSettings
from almlip_jax.campaign.stopping import level_of
from almlip_jax.files import read_csv

HERE = Path(__file__).resolve().parent
TABLES = {
    "zundel": "qbc_zundel/results.csv",
    "acac": "which_selector/acac.csv",
    "si": "which_selector/si.csv",
    "li": "which_selector/li.csv",
    "acac, other features": "which_selector/features/acac.csv",
    "acac, short training": "which_selector/short_training/acac.csv",
}
FALL = 0.05  # of the test error a round; what is above still falls
_WINDOW = 3  # rounds over which that fall is averaged


@dataclass(frozen=True)
class Course:
    """One point of a sweep.

    Attributes:
        batch, pool: mean `force_std_mean` of batch and pool in each round that selected.
        errors: test set -> force error in each round, eV/Angstrom.
    """

    batch: list[float]
    pool: list[float]
    errors: dict[str, list[float]]

    def fall(self, end: int) -> float:
        """Largest fall a round of a test error over the rounds up to one; not a number before there are so many."""
        if end < _WINDOW:
            return math.nan
        return max(1 - (e[end] / e[end - _WINDOW]) ** (1 / _WINDOW) for e in self.errors.values())


def courses(path: Path) -> dict[tuple[str, int], Course]:
    """The points of a table by selector and seed."""
    found: dict[tuple[str, int], Course] = {}
    first: dict[tuple[str, int], str] = {}
    for row in read_csv(path):
        point = (str(row["selector"]), int(row["seed"]))
        course = found.setdefault(point, Course([], [], {}))
        course.errors.setdefault(str(row["test"]), []).append(float(row["forces_rmse"]))
        selected = row["sigma_batch"] not in (None, "") and math.isfinite(float(row["sigma_batch"]))
        if first.setdefault(point, str(row["test"])) == row["test"] and selected:
            course.batch.append(float(row["sigma_batch"]))
            course.pool.append(float(row["sigma_pool"]))
    return found


def fires(course: Course, rule: PlateauSettings) -> int | None:
    """First round in which the rule holds."""
    for end in range(1, len(course.batch) + 1):
        level = level_of(course.batch[:end], course.pool[:end], rule.rounds)
        if level is not None and level.flat(rule):
            return end - 1
    return None


def fired_before(course: Course, ratio: float = 1.2, patience: int = 2) -> int | None:
    """First round in which the rule held that looked at the ratio of batch and pool alone."""
    ratios = [b / p for b, p in zip(course.batch, course.pool, strict=True)]
    for end in range(patience, len(ratios) + 1):
        if max(ratios[end - patience : end]) <= ratio:
            return end - 1
    return None


def rows(rule: PlateauSettings) -> list[dict[str, str | int | float | None]]:
    """The verdicts on every point of every table; the rule is refused where the batch is drawn at random."""
    table: list[dict[str, str | int | float | None]] = []
    for name, path in TABLES.items():
        for (selector, seed), course in courses(HERE.parent / path).items():
            before, now = fired_before(course), None if selector == "random" else fires(course, rule)
            entry: dict[str, str | int | float | None] = {"table": name, "selector": selector, "seed": seed}
            for when, end in (("before", before), ("now", now)):
                entry[when] = end
                entry[f"fall_{when}"] = None if end is None else round(course.fall(end), 4)
            table.append(entry)
    return table


def never_flat(table: str, selector: str, rounds: Sequence[int]) -> list[int]:
    """Seeds whose test error falls by more than `FALL` a round in each of some rounds."""
    found = courses(HERE.parent / TABLES[table])
    return [
        seed
        for (name, seed), course in found.items()
        if name == selector and all(course.fall(end) > FALL for end in rounds)
    ]


def main() -> None:
    """Writes the table, and prints how often either rule fires, in which rounds, and on how many falling errors."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    table = rows(PlateauSettings())
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    groups = dict.fromkeys((row["table"], row["selector"]) for row in table)
    print("| table | selector | fires: before | rounds | on falling errors | fires: now | rounds | on falling errors |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for group in groups:
        mine = [row for row in table if (row["table"], row["selector"]) == group]
        cells = []
        for when in ("before", "now"):
            ends = [int(row[when]) for row in mine if row[when] is not None]  # type: ignore[arg-type]
            falling = sum(not float(row[f"fall_{when}"]) <= FALL for row in mine if row[when] is not None)  # type: ignore[arg-type]
            span = f"{min(ends)} to {max(ends)}" if ends else "-"
            cells += [f"{len(ends)} of {len(mine)}", span, str(falling) if ends else "-"]
        print(f"| {group[0]} | `{group[1]}` | " + " | ".join(cells) + " |")
    print("zundel, test error never flat from round 7 to 14 in seeds:", never_flat("zundel", "top_k", range(7, 15)))


if __name__ == "__main__":
    main()
