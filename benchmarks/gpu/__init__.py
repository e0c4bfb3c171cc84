"""Checks for a machine with an NVIDIA GPU: `python -m benchmarks.gpu`, or `make gpu`. See `__main__.py`."""

import sys
from pathlib import Path

# The benchmarks know each other by their names alone.
sys.path.append(str(Path(__file__).parents[1]))
