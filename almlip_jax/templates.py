"""Templates of configs, with a comment for every key taken from the settings themselves."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace
from typing import Any

from almlip_jax.campaign.config import ExperimentConfig
from almlip_jax.distillation import DistilConfig
from almlip_jax.errors import InputError
from almlip_jax.oracles.codes.base import codes
from almlip_jax.settings import Settings
from almlip_jax.simulation.settings import ExploreConfig, MdConfig
from almlip_jax.sweep.settings import SweepConfig
from almlip_jax.yaml_text import yaml_text

KINDS: dict[str, type[Settings]] = {
    "campaign": ExperimentConfig,
    "explore": ExploreConfig,
    "md": MdConfig,
    "sweep": SweepConfig,
    "distil": DistilConfig,
}
"""Models of configs by the command that reads them (``campaign``: all the others)."""

_EXPLORATION = {
    "kind": "md",
    "walkers": [{"temperature": 300, "count": 4}, {"temperature": 600, "count": 4}],
    "steps": 4000,
    "thresholds": {"kind": "fixed", "record": 0.05, "stop": 1.0},
}

_ZUNDEL = {
    "name": "zundel",
    "system": {"structures": "zundel.xyz", "charge": 1},
    "oracle": {"kind": "tblite", "method": "GFN2-xTB"},
    "initial": {"rattle": {"count": 10, "stdev": 0.08}, "md": [{"temperature": 300, "steps": 10, "every": 1}]},
    "test": {
        "md": [{"temperature": 300, "steps": 4000, "every": 40}, {"temperature": 600, "steps": 4000, "every": 40}]
    },
    "model": {"kind": "shared_density", "cutoff": 6.0, "channels": 16},
    "training": {"max_steps": 4000, "validation_fraction": 0.05},
    "exploration": _EXPLORATION,
    "selection": {"batch": 15, "selector": {"kind": "bait"}},
    "stopping": {"max_rounds": 15, "max_labels": 170},
}


def _labels_of(code: str, elements: tuple[str, ...], *, periodic: bool) -> dict[str, Any]:
    """The section of a label source that is a code."""
    grid = {"kspacing": 0.25} if periodic else {}
    return {"kind": "ase", "code": code, **codes()[code].example(elements), **grid}


_CRYSTAL = {
    "name": "crystal",
    "system": {"structures": "crystal.extxyz"},
    "oracle": _labels_of("espresso", ("Si",), periodic=True),
    "initial": {"generated": [{"kind": "strained", "count": 20, "strain": 0.05, "stdev": 0.05}]},
    "test": {"md": [{"temperature": 300, "steps": 100, "every": 10, "equilibration": 50}]},
    "model": {"kind": "shared_density", "cutoff": 5.0},
    "training": {"max_steps": 4000},
    "exploration": {
        "kind": "md",
        "walkers": [
            {"temperature": 300, "pressure": 0.0, "count": 2},
            {"temperature": 900, "pressure": 0.0, "count": 2},
        ],
        "integrator": {"kind": "npt", "cell": "isotropic"},
        "timestep": 2.0,
        "steps": 4000,
        "thresholds": {"kind": "fixed", "record": 0.05, "stop": 1.0},
    },
    "selection": {"batch": 10, "selector": {"kind": "bait"}},
    "stopping": {"max_rounds": 15, "max_labels": 200},
}


_MTP = {
    "name": "mtp",
    "system": {"structures": "start.cfg", "types": ["Li"]},
    "oracle": _labels_of("vasp", ("Li",), periodic=True),
    "initial": {"rattle": {"count": 4, "stdev": 0.05}},
    "test": {"files": [{"path": "test.cfg", "group": "test"}]},
    "model": {"kind": "mtp", "level": 16, "radial_basis_size": 8, "min_dist": 2.0, "cutoff": 5.0},
    "ensemble": {"size": 1},
    "training": {
        "projection": {"iterations": 200, "starts": 4},
        "loss": {"kind": "mlip", "energy": 1.0, "forces": 0.01, "virial": 0.001},
        "warm_start": True,
        "validation_fraction": 0.0,
    },
    "active_set": {"mode": "neighborhood"},
    "exploration": {
        "kind": "md",
        "walkers": [{"temperature": 300, "count": 4}],
        "steps": 10000,
        "timestep": 1.0,
        "gate": {"kind": "absolute", "score": "extrapolation_grade"},
        "thresholds": {"kind": "grade", "gamma_select": 2.0, "gamma_break": 10.0},
        "record_every": 1,
        "buffer": 256,
    },
    "selection": {"batch": 20, "selector": {"kind": "maxvol", "mode": "neighborhood"}},
    "stopping": {"max_rounds": 30, "share_below": {"share": 1.0, "rounds": 1}},
}


@dataclass(frozen=True)
class Template:
    """A config to begin with.

    Attributes:
        title: what it is for.
        content: keys and values.
        kind: of `KINDS`.
        elements: of the structures that are meant, where the label source may be any code; empty where it is given.
        periodic: whether they are.
    """

    title: str
    content: dict[str, Any]
    kind: str = "campaign"
    elements: tuple[str, ...] = ()
    periodic: bool = False


TEMPLATES: dict[str, Template] = {
    "zundel": Template("the Zundel cation with GFN2-xTB: the main job", _ZUNDEL),
    "molecule": Template(
        "your own molecule with GFN2-xTB",
        {
            **_ZUNDEL,
            "name": "molecule",
            "system": {"structures": "molecule.xyz", "charge": 0, "spin": 1},
            "exploration": {**_EXPLORATION, "admission": {"kind": "log_det"}},
        },
        elements=("C", "H", "O"),
    ),
    "crystal": Template("a crystal, with its volume", _CRYSTAL, elements=("Si",), periodic=True),
    "slab": Template(
        "a surface: a slab with vacuum, periodic in two directions",
        {
            **_CRYSTAL,
            "name": "slab",
            "system": {"structures": "slab.extxyz"},
            "oracle": _labels_of("espresso", ("Cu",), periodic=True),
            "initial": {"rattle": {"count": 20, "stdev": 0.05}},
            "exploration": {
                "kind": "md",
                "walkers": [{"temperature": 300, "count": 2}, {"temperature": 600, "count": 2}],
                "timestep": 2.0,
                "steps": 4000,
                "thresholds": {"kind": "fixed", "record": 0.05, "stop": 1.0},
            },
        },
        elements=("Cu",),
        periodic=True,
    ),
    "alloy": Template(
        "an alloy, with its volume and with swaps of unlike atoms",
        {
            **_CRYSTAL,
            "name": "alloy",
            "system": {"structures": "alloy.extxyz"},
            "oracle": _labels_of("espresso", ("Cu", "Au"), periodic=True),
            "exploration": {**_CRYSTAL["exploration"], "swaps": {"every": 20, "elements": ["Cu", "Au"]}},  # type: ignore[dict-item]
        },
        elements=("Cu", "Au"),
        periodic=True,
    ),
    "pyscf": Template(
        "a molecule with PBE/def2-SVP by PySCF",
        {
            **_ZUNDEL,
            "name": "molecule-dft",
            "system": {"structures": "molecule.xyz", "charge": 0, "spin": 1},
            "oracle": {"kind": "pyscf", "xc": "pbe", "basis": "def2-svp"},
            "test": {"md": [{"temperature": 300, "steps": 100, "every": 10, "equilibration": 50}]},
        },
    ),
    "teacher": Template(
        "a molecule with PBE/def2-SVP by PySCF that learns from GFN2-xTB first",
        {
            "name": "molecule-taught",
            "system": {"structures": "molecule.xyz", "charge": 0, "spin": 1},
            "oracle": {"kind": "pyscf", "xc": "pbe", "basis": "def2-svp"},
            "teacher": {
                "source": {"kind": "tblite", "method": "GFN2-xTB"},
                "temperatures": [300, 600, 900],
                "frames": 2400,
                "every": 20,
                "training": {"max_steps": 40000},
                "tuning": {"max_steps": 8000, "learning_rate": 2e-3},
                "replay": 0,
            },
            "initial": {"from_teacher": {"count": 20, "selector": {"kind": "bait"}}},
            "test": {"md": [{"temperature": 300, "steps": 100, "every": 10, "equilibration": 50}]},
            **{name: _ZUNDEL[name] for name in ("model", "training", "exploration", "selection", "stopping")},
        },
    ),
    "mtp": Template("a moment tensor potential learned in the manner of MLIP-2", _MTP, elements=("Li",), periodic=True),
    "dataset": Template(
        "go on from structures that are labelled already",
        {
            **_ZUNDEL,
            "name": "from-dataset",
            "system": {"structures": "start.xyz", "charge": 0, "spin": 1},
            "initial": {"dataset": "labelled.extxyz", "keys": {"energy": "REF_energy", "forces": "REF_forces"}},
            "test": {"files": [{"path": "test.extxyz", "group": "test"}]},
        },
    ),
    "pool": Template(
        "query by committee on a pool whose labels lie in a file",
        {
            "name": "pool",
            "system": {"structures": "start.xyz"},
            "oracle": {"kind": "file", "path": "pool.extxyz"},
            "initial": {"from_pool": 20},
            "test": {"from_pool": 50},
            "model": {"kind": "shared_density", "cutoff": 6.0},
            "exploration": {"kind": "pool", "files": "pool.extxyz"},
            "selection": {"batch": 10, "selector": {"kind": "top_k", "score": "force_std_mean"}},
            "stopping": {"max_rounds": 15, "share_below": None},
        },
    ),
    "explore": Template(
        "gated exploration with a trained potential: `almlip explore`",
        {
            "potential": "runs/my/rounds/010/potential",
            "structures": "start.xyz",
            "training_set": "runs/my/rounds/010/dataset.extxyz",
            "exploration": {
                "walkers": [{"temperature": 300, "count": 4}, {"temperature": [300, 900], "count": 4}],
                "steps": 20000,
                "timestep": 0.5,
                "integrator": {"kind": "langevin", "friction": 0.01},
                "gate": {"kind": "absolute", "score": "force_std_max"},
                "rewind": {"every": 100, "keep": 4},
                "monitor": ["latent_distance"],
                "admission": {"kind": "log_det"},
                "record_every": 20,
                "buffer": 64,
            },
            "thresholds": {"kind": "relative", "record_factor": 1.5, "stop_factor": 4.0, "floor": 0.05},
            "seed": 0,
            "out": "runs/explore",
        },
        "explore",
    ),
    "md": Template(
        "production dynamics with a trained potential: `almlip md`",
        {
            "potential": "runs/my/rounds/010/potential",
            "structures": "start.xyz",
            "exploration": {
                "walkers": [{"temperature": 300, "count": 1}],
                "steps": 200000,
                "timestep": 0.5,
                "integrator": {"kind": "langevin", "friction": 0.002},
            },
            "trajectory": {"format": "extxyz", "every": 100, "forces": True, "momenta": True},
            "thermo": {"every": 100},
            "checkpoint_every": 60,
            "seed": 0,
            "out": "runs/md",
        },
        "md",
    ),
    "sweep": Template(
        "selectors compared on a labelled pool: `almlip sweep`",
        {
            "systems": {
                "mine": {
                    "pool": "pool.extxyz",
                    "tests": {"test": "test.extxyz"},
                    "initial": 20,
                    "model": {"kind": "shared_density", "size": "tiny"},
                    "training": {"max_steps": 1000},
                }
            },
            "selectors": {"random": {"kind": "random"}, "top_k": {"kind": "top_k"}, "max_det": {"kind": "max_det"}},
            "seeds": 8,
            "batch_sizes": [20],
            "ensemble_sizes": [4],
            "rounds": 6,
            "executor": {"kind": "local", "processes": 1},
            "out": "runs/sweep",
        },
        "sweep",
    ),
    "distil": Template(
        "a student that learns what a foundation model says: `almlip distil`",
        {
            "name": "student",
            "system": {"structures": "start.xyz"},
            "teacher": {"kind": "nequix", "model": "nequix-omat-1.nqx"},
            "initial": {
                "rattle": {"count": 100, "stdev": 0.1},
                "md": [{"temperature": 900, "steps": 200, "every": 10, "timestep": 2.0}],
            },
            "held_out": 0.1,
            "rounds": 2,
            "exploration": _EXPLORATION,
            "selection": {"batch": 20, "selector": {"kind": "bait"}},
            "test": [{"path": "dft.extxyz", "group": "dft"}],
            "model": {"kind": "shared_density", "cutoff": 5.0},
            "training": {"max_steps": 10000},
        },
        "distil",
    ),
}
"""Templates by name."""


def labelled_by(name: str, code: str) -> Template:
    """A template whose label source is a code.

    Raises:
        InputError: the template has another label source for a reason, or the code does not label what it is for.
    """
    template = TEMPLATES[name]
    if code not in codes():
        raise InputError(f"there is no code '{code}'; there are {', '.join(codes())}.")
    if not template.elements:
        suited = ", ".join(one for one, other in TEMPLATES.items() if other.elements)
        raise InputError(f"template '{name}' has its own label source; --code goes with {suited}.")
    if template.periodic and not codes()[code].crystals:
        raise InputError(f"code '{code}' labels molecules; template '{name}' is for periodic structures.")
    oracle = _labels_of(code, template.elements, periodic=template.periodic)
    return replace(template, content={**template.content, "oracle": oracle})


def render(name: str, code: str | None = None) -> str:
    """A template as YAML, with the meaning of each key above it.

    Args:
        name: of the template.
        code: that labels, in place of the template's label source.

    Raises:
        InputError: there is no template of that name, or the code does not label what it is for.
    """
    if name not in TEMPLATES:
        raise InputError(f"there is no template '{name}'; there are {', '.join(TEMPLATES)}.")
    template = TEMPLATES[name] if code is None else labelled_by(name, code)
    config = KINDS[template.kind].model_validate(template.content)
    schema = "almlip schema" if template.kind == "campaign" else f"almlip schema --of {template.kind}"
    lines = [f"# {template.title[0].upper() + template.title[1:]}.", f"# `{schema}` lists every key.", ""]
    return "\n".join(lines + _commented(template.content, config, 0)) + "\n"


def _commented(content: dict[str, Any], model: Settings, depth: int) -> list[str]:
    indent = "  " * depth
    lines = []
    meanings = type(model).meanings()
    for key, value in content.items():
        if key in meanings:
            text = " ".join(meanings[key].split())
            lines += [f"{indent}# {line}" for line in textwrap.wrap(text, 118 - len(indent))]
        inner = getattr(model, key)
        if value and isinstance(value, dict) and isinstance(inner, Settings):
            lines += [f"{indent}{key}:", *_commented(value, inner, depth + 1)]
        else:
            lines.append(f"{indent}{key}: {yaml_text(value, flow=True)}")
        if depth == 0:
            lines.append("")
    return lines
