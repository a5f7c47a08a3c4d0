"""Commands about configs: ``init``, ``schema``, ``explain``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from almlip_jax.cli.options import CommandOption, JsonFile
from almlip_jax.cli.output import print_pairs, write_result
from almlip_jax.cli.program import app
from almlip_jax.errors import InputError
from almlip_jax.places import file_to_write


@app.command()
def init(
    template: Annotated[str, typer.Argument(help="Name of a template; `list` shows them.")] = "list",
    code: Annotated[
        str | None, typer.Option("--code", help="Code that labels, as espresso, gpaw, cp2k, vasp, aims, orca.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", callback=file_to_write, help="File to write; standard output by default.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Write a commented config to begin with."""
    from almlip_jax.templates import TEMPLATES, render

    if template == "list":
        print_pairs("Templates", {name: one.title for name, one in TEMPLATES.items()})
        write_result(json_file, {name: one.title for name, one in TEMPLATES.items()})
        return
    text = render(template, code)
    if out is None:
        sys.stdout.write(text)
    elif out.exists():
        raise InputError(f"{out} exists; choose another file.")
    else:
        out.write_text(text)
        print_pairs("Template", {"written": str(out)})
    write_result(json_file, {"template": template, "code": code, "out": str(out) if out else None})


@app.command()
def schema(
    of: CommandOption = "campaign",
    json_file: JsonFile = None,
) -> None:
    """Print the JSON schema of configs, for editors."""
    from almlip_jax.templates import KINDS

    content = KINDS[of].model_json_schema()
    if json_file is None:
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    write_result(json_file, content)


@app.command()
def explain(
    path: Annotated[str, typer.Argument(help="Dotted keys, as exploration.gate or selection.selector.bait.")] = "",
    of: CommandOption = "campaign",
) -> None:
    """Explain the keys of a config section: what they may hold, their defaults, units and meaning."""
    from almlip_jax.config_keys import explain as explained
    from almlip_jax.templates import KINDS

    sys.stdout.write(explained(KINDS[of], path) + "\n")
