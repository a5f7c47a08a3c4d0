"""Modules of packages whose own ``__init__`` takes seconds to import what is not needed here."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType


def import_part(package: str, *modules: str) -> tuple[ModuleType, ...]:
    """Modules of a package, without running the package's own ``__init__``.

    The copies are private: nothing of them stays in ``sys.modules``, and a later ``import package`` works as
    always.  Where the package has been imported already, or its modules cannot stand alone, these are the ordinary
    ones.

    Args:
        package: name of an installed top-level package.
        modules: names inside it, with dots between them.

    Returns:
        the modules, in the order asked for.
    """
    names = [f"{package}.{module}" for module in modules]
    spec = None if package in sys.modules else importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        return tuple(importlib.import_module(name) for name in names)
    bare = ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations)
    bare.__spec__ = spec
    sys.modules[package] = bare
    try:
        found = [importlib.import_module(name) for name in names]
    except ImportError:
        found = []
    finally:
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            del sys.modules[name]
    return tuple(found) or tuple(importlib.import_module(name) for name in names)
