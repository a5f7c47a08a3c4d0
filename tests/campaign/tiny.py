"""A campaign on one water molecule that is small in every respect, and a program that runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ase.build import molecule

from almlip_jax.campaign import Outcome, resume_campaign, run_campaign
from almlip_jax.config import ExperimentConfig
from almlip_jax.structures.io import write_structures

SECTIONS: dict[str, Any] = {
    "name": "tiny",
    "seed": 7,
    "oracle": {"kind": "tblite"},
    "executor": {"kind": "local", "workers": 1},
    "initial": {"rattle": {"count": 6, "stdev": 0.05}, "md": [{"temperature": 300, "steps": 4, "every": 2}]},
    "test": {
        "md": [
            {"temperature": 300, "steps": 20, "every": 5, "equilibration": 5},
            {"temperature": 600, "steps": 20, "every": 5, "equilibration": 5},
        ]
    },
    "model": {"kind": "shared_density", "cutoff": 3.0, "radial": 4, "l_max": 1, "channels": 4, "hidden": [8]},
    "ensemble": {"size": 2},
    "training": {"batch_size": 4, "max_steps": 60, "validate_every": 20, "validation_fraction": 0.2},
    "exploration": {
        "kind": "md",
        "walkers": [{"temperature": 300, "count": 1}, {"temperature": 600, "count": 1}],
        "steps": 60,
        "chunk": 20,
        "record_every": 4,
        "buffer": 12,
        "trace_every": 5,
        "trajectory_every": 10,
        "thresholds": {"kind": "fixed", "record": 1e-4, "stop": 50.0},
    },
    "selection": {"batch": 3, "selector": {"kind": "max_det"}},
    "stopping": {"max_rounds": 2, "share_below": None},
}


def tiny_config(folder: Path, **sections: Any) -> ExperimentConfig:
    """The config, with whole sections replaced; its start geometry is written into a folder."""
    start = folder / "water.extxyz"
    if not start.exists():
        write_structures(start, [molecule("H2O")])
    return ExperimentConfig.model_validate({**SECTIONS, "system": {"structures": str(start)}, **sections})


def changed(section: str, **values: Any) -> dict[str, Any]:
    """One section with some of its values replaced."""
    return {section: {**SECTIONS[section], **values}}


def main(arguments: list[str]) -> Outcome:
    """Runs or resumes: folder of the start geometry, run directory, sections as JSON."""
    folder, run_dir, sections = Path(arguments[0]), Path(arguments[1]), json.loads(arguments[2])
    config = tiny_config(folder, **sections)
    if (run_dir / "state.json").exists():
        return resume_campaign(config, run_dir)
    return run_campaign(config, run_dir)


if __name__ == "__main__":
    main(sys.argv[1:])
