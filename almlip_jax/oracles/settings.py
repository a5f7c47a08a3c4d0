"""The config section ``oracle``: one of the label sources, chosen by ``kind``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, TypeAdapter

from almlip_jax.oracles.sources.calculator import CalculatorSettings
from almlip_jax.oracles.sources.dft import PySCFSettings
from almlip_jax.oracles.sources.external import ExternalSettings
from almlip_jax.oracles.sources.labelled_file import FileSettings
from almlip_jax.oracles.sources.xtb import TBLiteSettings

OracleSettings = Annotated[
    TBLiteSettings | PySCFSettings | FileSettings | CalculatorSettings | ExternalSettings, Field(discriminator="kind")
]
"""Settings of any label source; the field ``kind`` decides which."""

_ADAPTER: TypeAdapter[OracleSettings] = TypeAdapter(OracleSettings)


def parse_oracle(settings: str) -> OracleSettings:
    """Label source settings from their JSON, as worker processes receive them."""
    return _ADAPTER.validate_json(settings)
