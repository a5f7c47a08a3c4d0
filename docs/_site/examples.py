"""Examples of docstrings as blocks of code on the site (an extension of griffe, see `mkdocs.yml`)."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^(>>> .*(?:\n(?!\s*$).*)*)", re.MULTILINE)


class Examples(griffe.Extension):
    """Puts fences around the lines from ``>>>`` to the next empty one."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes a docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(r"```pycon\n\1\n```", obj.docstring.value)
