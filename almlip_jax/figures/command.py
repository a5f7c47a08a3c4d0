"""What commands draw: ``almlip figure`` comparisons and trainings from tables, ``almlip evaluate`` errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from ase import Atoms
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from almlip_jax.errors import InputError
from almlip_jax.evaluation import comparison
from almlip_jax.evaluation.metrics import Predictions
from almlip_jax.evaluation.pairs import label_pairs
from almlip_jax.evaluation.summary import latex, markdown
from almlip_jax.evaluation.tidy import monitors, read_tables
from almlip_jax.evaluation.training_curves import training_curves
from almlip_jax.figures.errors import calibration, parity
from almlip_jax.figures.evolution import calibration_evolution, uncertainty_evolution
from almlip_jax.figures.learning_curves import learning_curves
from almlip_jax.figures.paired_ratio import paired_ratio
from almlip_jax.figures.profiles import profiles
from almlip_jax.figures.style import save
from almlip_jax.figures.training import training
from almlip_jax.files import read_csv


@dataclass
class Study:
    """A sweep's table, what of it is compared with what, and what has been written.

    Attributes:
        table: of `evaluation.tidy.read_tables`.
        out: folder to write into.
        quantity: column of the errors.
        baseline: selector that the others are compared with.
        written: files so far.
        notes: sentences on what the results cannot show.
        rows: of the comparison, once it has been asked for.
    """

    table: pd.DataFrame
    out: Path
    quantity: str
    baseline: str
    written: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def keep(self, figure: Figure, name: str) -> None:
        """Saves a figure and closes it."""
        self.written += save(figure, self.out / name)
        plt.close(figure)

    def note(self, sentences: Sequence[str]) -> None:
        """Keeps what has not been said yet."""
        self.notes += [sentence for sentence in sentences if sentence not in self.notes]

    def curves(self) -> dict[comparison.Case, dict[str, comparison.SeedCurves]]:
        """Learning curves of the quantity."""
        return comparison.learning_curves(self.table, self.quantity)

    def compared(self) -> comparison.ComparisonTable:
        """Everything against the baseline."""
        table = comparison.compare(self.table, self.baseline, quantity=self.quantity)
        self.note(table.notes)
        return table


def _learning_curves(study: Study) -> None:
    curves, notes = comparison.shared_seeds(study.curves())
    study.note(notes)
    study.keep(learning_curves(curves, quantity=study.quantity), f"learning_curves_{study.quantity}")


def _profiles(study: Study) -> None:
    performance = comparison.performance_profiles(study.curves(), study.baseline)
    study.note(performance.notes)
    study.keep(profiles(performance), f"profiles_{study.quantity}")


def _paired_ratio(study: Study) -> None:
    study.keep(paired_ratio(study.compared()), f"paired_ratio_{study.quantity}")


def _uncertainty_evolution(study: Study) -> None:
    batch, pool = (
        comparison.evolution(study.table, column, positive=True, by_test=False)
        for column in ("sigma_batch", "sigma_pool")
    )
    (shared_batch, notes), (shared_pool, more) = (
        comparison.shared_seeds(one, other) for one, other in ((batch, pool), (pool, batch))
    )
    study.note([*notes, *more])
    figure = uncertainty_evolution(shared_batch, shared_pool, monitors=monitors(study.table))
    study.keep(figure, "uncertainty_evolution")


def _calibration_evolution(study: Study) -> None:
    _evolution_of(study, "calibration_evolution", ("miscalibration_area", "ence", "nll", "crps"))


def _ranking_evolution(study: Study) -> None:
    _evolution_of(study, "ranking_evolution", ("spearman", "auroc", "ause"))


def _evolution_of(study: Study, name: str, metrics: Sequence[str]) -> None:
    known = [metric for metric in metrics if study.table[metric].notna().any()]
    if not known:
        raise InputError(f"the table has no value for {name}: {', '.join(metrics)} are all empty.")
    shared = {}
    for metric in known:
        shared[metric], notes = comparison.shared_seeds(comparison.evolution(study.table, metric))
        study.note(notes)
    study.keep(calibration_evolution(shared), name)


def _tables(study: Study) -> None:
    table = study.compared()
    frame = table.frame()
    study.out.mkdir(parents=True, exist_ok=True)
    stem = study.out / f"comparison_{study.quantity}"
    texts = {".md": markdown(table), ".tex": latex(table), ".csv": frame.to_csv(index=False, lineterminator="\n")}
    for ending, text in texts.items():
        path = stem.with_name(f"{stem.name}{ending}")
        path.write_text(text, encoding="utf-8")
        study.written.append(path)
    study.rows = frame.astype(object).where(frame.notna(), None).to_dict("records")


MAKERS: dict[str, Callable[[Study], None]] = {
    "learning_curves": _learning_curves,
    "profiles": _profiles,
    "paired_ratio": _paired_ratio,
    "uncertainty_evolution": _uncertainty_evolution,
    "calibration_evolution": _calibration_evolution,
    "ranking_evolution": _ranking_evolution,
    "tables": _tables,
}
"""What ``almlip figure NAME`` makes."""


def draw_errors(
    frames: Sequence[Atoms], predicted: Predictions, out: Path, group_key: str = "group"
) -> tuple[list[Path], list[str]]:
    """Draws parity and calibration of a potential on labelled structures.

    Args:
        frames: labelled structures.
        predicted: what the potential predicts for them.
        out: folder to write into.
        group_key: ``info`` key that names the group of a structure.

    Returns:
        the files, and sentences on what could not be drawn.
    """
    mpl.use("agg")
    pairs = label_pairs(frames, predicted, group_key=group_key)
    written, notes = [], []
    for name, draw in (("parity", parity), ("calibration", calibration)):
        try:
            figure = draw(pairs)
        except ValueError as error:
            notes.append(f"{name} is not drawn: {error}")
            continue
        written += save(figure, out / name)
        plt.close(figure)
    return written, notes


def draw_trainings(paths: Sequence[Path], out: Path) -> dict[str, Any]:
    """Draws the course of trainings, each from its ``training.csv``; what it returns is that of `make`.

    Raises:
        InputError: a file is not the table of a training.
    """
    mpl.use("agg")
    trainings = {}
    for path in paths:
        curves = training_curves(read_csv(path))
        if not curves:
            raise InputError(
                f"{path} has no validation error or loss of a training above 0; give the training.csv of a round, or "
                "the one next to a trained potential."
            )
        short = path.resolve().parent.name if path.name == "training.csv" else path.stem
        short = f"round {int(short)}" if short.isdecimal() else short
        trainings[short if short not in trainings else str(path)] = curves
    figure = training(trainings)
    written = save(figure, out / "training")
    plt.close(figure)
    return {"written": [str(path) for path in written], "notes": [], "skipped": {}, "rows": []}


def make(
    name: str, tables: Sequence[Path], out: Path, quantity: str = "forces_rmse", baseline: str = "random"
) -> dict[str, Any]:
    """Draws one figure, writes the tables, or everything that the tables of a sweep have data for.

    Args:
        name: one of `MAKERS`, ``all`` of them, or ``training``.
        tables: CSV files of a sweep; for ``training`` the tables of trainings.
        out: folder to write into.
        quantity: error that the comparison is about, one of `evaluation.tidy.error_columns`.
        baseline: selector that the others are compared with.

    Returns:
        ``written`` (files), ``notes`` (sentences), ``skipped`` (name -> why, for ``all``) and ``rows`` (the comparison,
        for ``tables`` and ``all``).

    Raises:
        InputError: there is no such figure, a table cannot be used, or it lacks what the figure shows.
    """
    if name == "training":
        return draw_trainings(tables, out)
    if name != "all" and name not in MAKERS:
        raise InputError(f"there is no figure '{name}'; choose one of {', '.join(MAKERS)}, training or all.")
    mpl.use("agg")
    study = Study(read_tables(tables), out, quantity, baseline)
    skipped: dict[str, str] = {}
    for one in MAKERS if name == "all" else [name]:
        try:
            MAKERS[one](study)
        except InputError as error:
            if name != "all":
                raise
            skipped[one] = str(error)
    if not study.written:
        raise InputError(next(iter(skipped.values())))
    return {
        "written": [str(path) for path in study.written],
        "notes": study.notes,
        "skipped": skipped,
        "rows": study.rows,
    }
