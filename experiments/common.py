"""What scripts of experiments share: campaigns that go on where they stopped, and tables that rows are added to."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from almlip_jax.campaign import finish_campaign
from almlip_jax.campaign.config import ExperimentConfig
from almlip_jax.oracles import SourceSettings
from almlip_jax.progress import open_progress


class Driving(Calculator):
    """A label source as what drives dynamics."""

    implemented_properties = ("energy", "forces")

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__()
        self.source = settings.build()

    def calculate(
        self, atoms: Atoms | None = None, properties: Sequence[str] = (), system_changes: Sequence[str] = all_changes
    ) -> None:
        """Energy and forces."""
        super().calculate(atoms, properties, system_changes)
        found = self.source(self.atoms)
        self.results = {"energy": found.energy, "forces": found.forces}


def parser_of(text: str | None, out: Path, seeds: int) -> argparse.ArgumentParser:
    """What the command line of a study takes: data, output folder, seeds and tables.

    Args:
        text: description.
        out: folder of the campaigns by default.
        seeds: how many by default.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="results.csv of the output folder by default")
    parser.add_argument("--report", type=Path, nargs="+", help="tables to be put together and told of; nothing is run")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a study, which needs its data unless it only reports."""
    found = parser.parse_args()
    if found.data is None and not found.report:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    found.table = found.table or found.out / "results.csv"
    return found


def seeds_of(options: argparse.Namespace) -> range:
    """The seeds that are asked for."""
    return range(options.first_seed, options.first_seed + options.seeds)


def finished(folder: Path, campaign: ExperimentConfig) -> list[dict[str, Any]]:
    """The rounds of a campaign, which is run or gone on with unless it is finished."""
    with open_progress() as progress:
        return [record.model_dump() for record in finish_campaign(campaign, folder, progress=progress).history]


def errors_of(
    history: Sequence[dict[str, Any]], about: dict[str, Any], tests: Sequence[str], *, seconds: bool = False
) -> list[dict[str, Any]]:
    """A row for each round and test set: errors in meV/Angstrom and meV/atom, and how long the round took."""
    names = ("forces_rmse", "energy_rmse")
    return [
        about
        | {"round": record["round"], "labels": record["labels"], "test": test}
        | {name: round(1e3 * record["errors"][f"{name}_{test}"], 3) for name in names}
        | ({"seconds": round(sum(record["seconds"].values()), 1)} if seconds else {})
        for record in history
        for test in tests
        if f"forces_rmse_{test}" in record["errors"]
    ]


def read(path: Path, keys: Sequence[str]) -> pd.DataFrame:
    """A table; where there is none yet, one without rows."""
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(keys))


def add(path: Path, rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    """Puts rows into a table; of two that agree in all keys the new one counts."""
    before = [pd.read_csv(path)] if path.exists() else []
    pd.concat([*before, pd.DataFrame(rows)]).drop_duplicates(list(keys), keep="last").to_csv(path, index=False)


def put_together(files: Sequence[Path], out: Path, keys: Sequence[str]) -> pd.DataFrame:
    """The rows of several tables in one, in their order; of those that agree in all keys the last counts."""
    table = pd.concat([pd.read_csv(file) for file in files]).drop_duplicates(list(keys), keep="last")
    table["labels"] = table["labels"].astype(int)
    table.sort_values(list(keys)).to_csv(out, index=False)
    return table
