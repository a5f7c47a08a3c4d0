"""Packages that need not be installed."""

from __future__ import annotations

import importlib.metadata

from almlip_jax.errors import InputError


def package_version(package: str, extra: str | None = None) -> str:
    """The installed version of a package, without importing it.

    Args:
        package: name of the distribution.
        extra: the extra of almlip-jax that installs it.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        wanted = package if extra is None else f'"almlip-jax[{extra}]"'
        raise InputError(f"{package} is not installed; install it with: pip install {wanted}") from None
