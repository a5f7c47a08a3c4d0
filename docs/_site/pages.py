"""Pages of the site that are made from the package: config keys, commands, Python; and those that lie outside of docs/.

Hooks of mkdocs (`mkdocs.yml`).  Links from the pages lead to files of the repository; what lies outside of docs/ and is
linked to (studies, benchmarks and their figures) comes into the site under the path that it has in the repository.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from almlip_jax import cli
from almlip_jax.config_keys import Key, Section, sections
from almlip_jax.settings import Settings
from almlip_jax.templates import KINDS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "almlip_jax"
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def on_config(config: MkDocsConfig) -> None:
    """Lists the pages of the rooms in the navigation."""
    reference = next(entry["Reference"] for entry in config.nav or [] if "Reference" in entry)
    reference[-1] = {"Python": ["reference/python/index.md", *(f"reference/python/{room}.md" for room in ROOMS)]}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made, and what is linked to."""
    made = {"config": config_page(), "commands": commands_page(), "python/index": ground_floor_page()}
    made |= {f"python/{room}": room_page(room) for room in ROOMS}
    for name, text in made.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    for path in linked(sorted((ROOT / "docs").rglob("*.md"))):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Has links lead to where their targets are in the site."""
    name = page.file.src_uri
    outside = (ROOT / name).is_file() and not (ROOT / "docs" / name).is_file()
    here = ROOT / name if outside else ROOT / "docs" / name

    def moved(match: re.Match[str]) -> str:
        target = _target(here, match[2])
        if target is None:
            return match[0]
        return match[1] + posixpath.relpath(_in_site(target), posixpath.dirname(name) or ".") + match[3]

    return LINK.sub(moved, markdown)


def linked(pages: list[Path]) -> list[Path]:
    """Files outside of docs/ that some pages link to, and those that these link to."""
    found: dict[Path, None] = {}
    waiting = list(pages)
    for page in waiting:
        for match in LINK.finditer(page.read_text()):
            target = _target(page, match[2])
            if target is not None and not target.is_relative_to(ROOT / "docs") and target not in found:
                found[target] = None
                if target.suffix == ".md":
                    waiting.append(target)
    return list(found)


def _target(page: Path, link: str) -> Path | None:
    """The file of the repository that a link leads to; of a folder its page."""
    if ":" in link:
        return None
    path = (page.parent / link).resolve()
    path = path / "README.md" if path.is_dir() else path
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def _in_site(path: Path) -> str:
    return path.relative_to(ROOT).as_posix().removeprefix("docs/")


# -------------------------------------------------------------------------------------------------------- config keys


def config_page() -> str:
    """Every key of every config."""
    every: dict[type[Settings], Section] = {}
    for root in KINDS.values():
        for section in sections(root):
            every.setdefault(section.model, section)
    names = {root: f"{name}: the whole config" for name, root in KINDS.items()}
    titles = {model: names.get(model, section.title) for model, section in every.items()}
    text = [
        "# Config keys",
        "Made from the models that validate configs.  `almlip explain SECTION` prints a part of it in a terminal, "
        "`almlip schema` all of it as a JSON schema for editors.  A section stands at the first place where it may "
        "occur: those of campaigns first, then what `almlip explore`, `almlip md`, `almlip sweep` and `almlip distil` "
        "add.",
    ]
    for model, section in every.items():
        text += [f"## {titles[model]} {{#{_anchor(model)}}}", section.meaning]
        text += ["| key | values | default | unit | meaning |\n| --- | --- | --- | --- | --- |"]
        text[-1] += "".join(_row(key, titles) for key in section.keys)
    return "\n\n".join(text) + "\n"


def _row(key: Key, titles: dict[type[Settings], str]) -> str:
    values = key.values
    if key.sections:
        links = ", ".join(f"[{titles[one]}](#{_anchor(one)})" for one in key.sections)
        values = f"{values}: {links}"
    default = key.default if key.default == "required" else f"`{key.default}`"
    cells = (f"`{key.name}`", values, default, key.unit, key.meaning)
    return "\n| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _anchor(model: type[Settings]) -> str:
    return f"{model.__module__}.{model.__name__}".replace(".", "-").lower()


# ----------------------------------------------------------------------------------------------------------- commands


def commands_page() -> str:
    """Every command with its arguments and options."""
    program: Any = typer.main.get_command(cli.app)
    intro = "What `almlip COMMAND --help` prints.  Every command ends with status 0 only when its work was done."
    text = ["# Commands", intro]
    for name, command in program.commands.items():
        text += [f"## almlip {name}", command.help]
        rows = [
            f"| `{' '.join(one.opts) if one.param_type_name == 'option' else one.name.upper()}` | "
            f"{(one.help or '').replace('|', chr(92) + '|')} | {'yes' if one.required else ''} |"
            for one in command.params
            if one.name != "help"
        ]
        if rows:
            text.append("\n".join(["| argument or option | meaning | required |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(text) + "\n"


# ------------------------------------------------------------------------------------------------------------- Python


def ground_floor_page() -> str:
    """The package itself and its modules outside of rooms."""
    rooms = "\n".join(f"| [`almlip_jax.{room}`]({room}.md) | {_first_line(PACKAGE / room)} |" for room in ROOMS)
    intro = f"| package | holds |\n| --- | --- |\n{rooms}"
    modules = [f"almlip_jax.{path.stem}" for path in sorted(PACKAGE.glob("*.py")) if not path.stem.startswith("_")]
    return "\n\n".join(["# almlip_jax", "::: almlip_jax", intro, *(f"::: {module}" for module in modules)]) + "\n"


def room_page(room: str) -> str:
    """A package: what it offers, and its modules."""
    folder = PACKAGE / room
    modules = [path for path in sorted(folder.rglob("*.py")) if path.stem != "__init__"]
    offers = [f"[`{name}`][{module}.{name}]" for name, module in _exports(folder / "__init__.py")]
    text = [f"# almlip_jax.{room}", ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""]
    if offers:
        text.append(f"`from almlip_jax.{room} import ...`: {', '.join(offers)}")
    text += [f"::: {path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}" for path in modules]
    return "\n\n".join(text) + "\n"


def _exports(path: Path) -> Iterator[tuple[str, str]]:
    """Names that a package imports for others, and the modules that define them."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("almlip_jax."):
            for name in node.names:
                if module := _definition(str(node.module), name.name):
                    yield name.name, module


def _definition(module: str, name: str) -> str | None:
    """The module that defines a name which another one may have imported; None where nothing documents it."""
    stem = ROOT / module.replace(".", "/")
    path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module
        passed_on = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("almlip_jax.")
        if passed_on and any(one.name == name for one in node.names):
            return _definition(str(node.module), name)
    return None


def _first_line(folder: Path) -> str:
    return (ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "").splitlines()[0]
