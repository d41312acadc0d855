"""The peers' tests here share the hand-made mapping of names in tests/parity."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "parity"))
