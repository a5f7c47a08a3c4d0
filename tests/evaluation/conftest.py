"""What the tests of evaluation share: the path to the sweep that is made up."""

from __future__ import annotations

import sys
from pathlib import Path

# Tests import `power_law_sweep`, whatever way pytest imports the tests.
sys.path.insert(0, str(Path(__file__).parent))
