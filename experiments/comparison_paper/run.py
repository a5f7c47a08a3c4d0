"""Four strategies on four sets of crystals: ``python experiments/comparison_paper/run.py --data DIR``.

The comparison of Khan, D'Souza and Choyal (arXiv:2601.06916) with selectors of this package, paired seeds and
intervals, and what their paper leaves open (``--check``), on the sets that are asked for.  One row a strategy, seed and
number of labels in ``results.csv``; what is in the table already is not computed again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from report import draw, summary
from sources import PAPER, SOURCES, Labelled, content_of, read_export, read_source
from study import KEY, Cell, run_cell

from almlip_jax.compilation import prepare_jax
from almlip_jax.errors import InputError
from almlip_jax.files import write_text

HERE = Path(__file__).resolve().parent
STRATEGIES = ("random", "top_k", "kmeans_fps", "hybrid")
OXIDE = "titanium_oxide"
ALPHAS = tuple(f"hybrid {alpha:g}" for alpha in (0.0, 0.2, 0.4, 0.8, 1.0))


@dataclass(frozen=True)
class Check:
    """What the paper leaves open.

    Attributes:
        sets: where none are asked for.
        cells: on a set, whose name they have.
        pairs: whether the labels of each set are tried on each other one.
    """

    sets: tuple[str, ...]
    cells: tuple[Cell, ...]
    pairs: bool = False

    def on(self, sets: Sequence[str]) -> list[Cell]:
        """The cells on some sets, or on its own where there are none."""
        names = sets or self.sets
        if not self.pairs:
            return [replace(cell, set=name) for name in names for cell in self.cells]
        pairs = [(one, other) for one in names for other in names if one != other]
        return [replace(cell, set=one, test=other) for one, other in pairs for cell in self.cells]


CHECKS = {
    "structural": Check((OXIDE,), (Cell("", STRATEGIES, descriptors="structural"),)),
    "batches": Check((OXIDE,), tuple(Cell("", STRATEGIES, batch=batch) for batch in (5, 10, 20))),
    "members": Check((OXIDE,), tuple(Cell("", STRATEGIES, members=members) for members in (3, 7))),
    "alpha": Check((OXIDE,), (Cell("", ("random", "hybrid", *ALPHAS)),)),
    "adaptive": Check(PAPER, (Cell("", ("random", "adaptive", "switch")),)),
    "transfer": Check(("perovskites", "wbm"), (Cell("", STRATEGIES),), pairs=True),
    "properties": Check(("bulk_modulus", "shear_modulus", "gap"), (Cell("", STRATEGIES),)),
    "spread_error": Check(PAPER, (Cell("", STRATEGIES),)),
}
"""By name; correlations of spread and error are a column of every table."""


def options_given(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line.

    ``sets`` and ``export`` name exports as the table does, by their content: a file that changed is another set.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--sets", nargs="+", default=[], help=f"of {', '.join(SOURCES)}, and exports")
    parser.add_argument("--export", nargs="+", default=[], metavar="NAME=FILE", help="sets of your own")
    parser.add_argument("--label", help="column of exports that is learned")
    parser.add_argument("--check", nargs="+", default=[], choices=[*CHECKS, "all"], help="instead of the main study")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200, help="of Adam, in each training")
    parser.add_argument("--out", type=Path, default=HERE / "results.csv")
    parser.add_argument("--figures", type=Path, help="folder for figures of what is in the table")
    found = parser.parse_args(given)
    try:
        exports = _exports(found.export)
    except InputError as error:
        parser.error(str(error))
    unknown = [name for name in found.sets if name not in SOURCES and name not in exports]
    if unknown:
        parser.error(f"there is no set {', '.join(unknown)}: choose of {', '.join([*SOURCES, *exports])}.")
    if "transfer" in found.check and len(set(found.sets)) == 1:
        parser.error("transfer is from one set to another; name two with --sets.")
    if "all" in found.check and len(set(found.sets)) == 1:
        print("transfer is from one set to another, and is left out.", flush=True)
    named = {name: f"{name}@{content_of(path, found.label)}" for name, path in exports.items()}
    found.sets = [named.get(name, name) for name in dict.fromkeys(found.sets)]
    found.export = {named[name]: path for name, path in exports.items()}
    if found.data is None and any({cell.set, cell.test or cell.set} - set(found.export) for cell in cells(found)):
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    return found


def _exports(given: Sequence[str]) -> dict[str, Path]:
    """The file of each export.

    Raises:
        InputError: one has no name, or that of another set, or no file.
    """
    found: dict[str, Path] = {}
    for part in given:
        name, _, file = part.partition("=")
        if not (name and file):
            raise InputError(f"--export {part} is not of the form NAME=FILE.")
        if name in SOURCES or name in found:
            raise InputError(f"--export {name}: there is a set of that name already; give the export another one.")
        if not Path(file).is_file():
            raise InputError(f"--export {name}: there is no file {file}.")
        found[name] = Path(file)
    return found


def cells(options: argparse.Namespace) -> list[Cell]:
    """What is asked for, each once."""
    if not options.check:
        return [Cell(name, STRATEGIES) for name in options.sets or PAPER]
    names = list(CHECKS) if "all" in options.check else options.check
    return list(dict.fromkeys(cell for name in names for cell in CHECKS[name].on(options.sets)))


class Sets:
    """Sets that were read, each once."""

    def __init__(self, options: argparse.Namespace) -> None:
        """None yet."""
        self.options, self.read = options, {}

    def __getitem__(self, name: str) -> Labelled:
        """By name."""
        if name not in self.read:
            path = self.options.export.get(name)
            new = read_source(name, Path(self.options.data)) if path is None else None
            self.read[name] = new or read_export(name, path, self.options.label)
            print(f"{name}: {len(self.read[name].labels)} crystals, {self.read[name].unit}", flush=True)
        return self.read[name]


def main(given: Sequence[str] | None = None) -> None:
    """Computes what is not in the table yet, and prints the summary."""
    options = options_given(given)
    prepare_jax()
    sets = Sets(options)
    rows = pd.read_csv(options.out).to_dict("records") if options.out.exists() else []
    for cell in cells(options):
        done = {
            (r["strategy"], r["seed"])
            for r in rows
            if tuple(r[name] for name in KEY) == cell.key and r["steps"] == options.steps
        }
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        wanted = [(one, seed) for one in cell.strategies for seed in seeds if (one, seed) not in done]
        if not wanted:
            continue
        wall, cpu = time.monotonic(), time.process_time()
        source, other = sets[cell.set], sets[cell.test or cell.set]
        rows += list(run_cell(cell, source, other, wanted, options.steps))
        table = pd.DataFrame(rows).round({"mae": 5, "r2": 4, "offset_free_mae": 5, "spearman": 3})
        write_text(options.out, table.to_csv(index=False, lineterminator="\n"))
        told = f"{time.monotonic() - wall:.0f} s, {time.process_time() - cpu:.0f} s of a core"
        print(*cell.key, f"{len(wanted)} runs: {told}", flush=True)
    table = pd.DataFrame(row for row in rows if row["steps"] == options.steps)
    print(summary(table))
    if options.figures:
        draw(table, options.figures)


if __name__ == "__main__":
    try:
        main()
    except InputError as wrong:
        sys.exit(str(wrong))
