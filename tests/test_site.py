"""The site: every page has its place and its links lead somewhere; it builds, and reads without a network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from almlip_jax.config_keys import explain, find_sections, sections
from almlip_jax.errors import InputError
from almlip_jax.templates import KINDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MADE = ("reference/config.md", "reference/commands.md", "reference/python/")


def entries(navigation: Any) -> list[str]:
    if isinstance(navigation, str):
        return [navigation]
    below = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for one in below for page in entries(one)]


def test_every_page_has_a_place_in_the_navigation():
    named = entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    there = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert set(named) - set(MADE) == there and len(named) == len(set(named))


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s:]*)(?:#([^)\s]*))?\)", page.read_text()):
        path = (page.parent / target) if target else page
        assert path.exists(), f"{target} of {page.name}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_every_key_of_every_config_says_what_it_means():
    models = {section.model for root in KINDS.values() for section in sections(root)}
    assert len(models) > 90
    silent = {f"{model.__name__}.{name}" for model in models for name in model.model_fields
              if name != "kind" and name not in model.meanings()}  # fmt: skip
    assert silent == set()


def test_a_key_whose_meaning_names_a_unit_has_it_in_the_table():
    models = {section.model for root in KINDS.values() for section in sections(root)}
    told = re.compile(r", (in )?(eV|Angstrom|fs|ps|K|Bohr magnetons)\b(?! over)")
    silent = {
        f"{model.__name__}.{name}"
        for model in models
        for name, field in model.model_fields.items()
        if re.search(r"\b(int|float)\b", str(field.annotation))
        if told.search(model.meanings().get(name, "")) and "unit" not in (field.json_schema_extra or {})
    }
    assert silent == {"UserIntegrator.values"}  # one for each of its numbers


def test_a_section_is_explained_with_values_defaults_and_units():
    text = explain(KINDS["campaign"], "exploration.integrator.langevin")
    assert "kind: langevin" in text and "1/fs" in text
    assert yaml.safe_load(text)["friction"] == 0.01
    one = explain(KINDS["campaign"], "exploration.rewind.keep")
    assert one.startswith("# ") and list(yaml.safe_load(one)) == ["keep"]
    assert len(find_sections(KINDS["campaign"], "exploration.gate")) >= 4


def test_a_section_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"'exploration' has no key 'gatee'; did you mean 'gate'\?"):
        explain(KINDS["campaign"], "exploration.gatee.score")
    with pytest.raises(InputError, match="holds a value, not a section"):
        explain(KINDS["campaign"], "exploration.steps.x")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocstrings") is None, reason="the site needs the extra 'docs'")
def test_the_site_builds_and_needs_no_network(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="?(https?:[^"\s>]*)', text)
        loaded += re.findall(r'<link[^>]*rel="?(?:stylesheet|preconnect)[^>]*href="?(https?:[^"\s>]*)', text)
        assert loaded == [], page
    index = json.loads((site / "search" / "search_index.json").read_text())
    places = {document["location"] for document in index["docs"]}
    assert "reference/python/selection.html#almlip_jax.selection.design.max_det" in places
    keys = (site / "reference" / "config.html").read_text()
    assert "record_every" in keys
    assert (site / "experiments" / "plateau" / "index.html").exists()
