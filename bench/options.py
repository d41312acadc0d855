"""What a run of the benchmarks is asked for."""

from __future__ import annotations

from typing import NamedTuple


class Options(NamedTuple):
    """rounds: times that each thing is measured; quick: tiny sizes; alone: no peers; compile: torch.compile too."""

    rounds: int = 5
    quick: bool = False
    alone: bool = False
    compile: bool = False
