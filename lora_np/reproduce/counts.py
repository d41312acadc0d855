"""Counts (L8): the paper's tables of trained parameters, and what follows from them for a checkpoint's size."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..adapter import LoRAConfig, count_parameters
from ..formats.models.presets import PRESETS
from ..model import Config
from .section import Claim, Section, Table, graded, listed

HALF = 2  # bytes of a number in float16, in which GPT-3's 175B weights are 350 GB
NEAR = 0.1  # "about" in the paper, taken at its word: within a tenth


class Printed(NamedTuple):
    """A row of the paper's tables: the model, r on q and v, and its millions of trained parameters, as printed."""

    model: str
    preset: str
    r: int
    table: int
    millions: str

    @property
    def counted(self) -> int:
        """Ours, from the configuration alone."""
        return count_parameters(PRESETS[self.preset], LoRAConfig(r=self.r))

    @property
    def rounded(self) -> str:
        """Ours, in millions, with as many digits as the paper prints."""
        return f"{self.counted / 1e6:.{len(self.millions.partition('.')[2])}f}"


PAPER = (
    Printed("RoBERTa base", "roberta-base", 8, 2, "0.3"),
    Printed("RoBERTa large", "roberta-large", 8, 2, "0.8"),
    Printed("DeBERTa XXL", "deberta-v2-xxlarge", 16, 2, "4.7"),
    Printed("GPT-2 M", "gpt2-medium", 4, 3, "0.35"),
    Printed("GPT-2 L", "gpt2-large", 4, 3, "0.77"),
    Printed("GPT-3", "gpt3-175b", 1, 4, "4.7"),
    Printed("GPT-3", "gpt3-175b", 8, 4, "37.7"),
)


def size(config: Config) -> int:
    """The parameters of a model."""
    return sum(math.prod(shape) for shape in config.weight_shapes().values())


def table_claim(rows: list[Printed]) -> Claim:
    """Whether the printed counts are those of r (in + out) for each adapted matrix."""
    differ = [row for row in rows if row.rounded != row.millions]
    found = f"{len(rows) - len(differ)} of {len(rows)} agree to the last digit printed"
    if differ:
        found += "; not " + listed([f"{p.model}: printed {p.millions}M, counted {p.counted:,}" for p in differ])
    return Claim(
        "LoRA on W_q and W_v trains so many parameters", "paper, tables 2 to 4", found,
        graded(not differ, len(differ) < len(rows)), exact=True,
    )  # fmt: skip


def about(printed: float, found: float) -> bool:
    """Whether a figure is "about" what is printed."""
    return abs(found / printed - 1) <= NEAR


def checkpoint_claim(base_gb: float, adapter_mb: float) -> Claim:
    """350 GB -> 35 MB."""
    return Claim(
        "a checkpoint of GPT-3 shrinks from 350 GB to 35 MB (r = 4, W_q and W_v)", "paper, 4.2",
        f"{base_gb:.1f} GB and {adapter_mb:.1f} MB, in float16",
        graded(about(350, base_gb) and about(35, adapter_mb), about(350, base_gb) or about(35, adapter_mb)),
        exact=True,
    )  # fmt: skip


def fewer_claim(times: float) -> Claim:
    """10,000 times fewer."""
    return Claim(
        "trained parameters are reduced 10,000 times", "paper, abstract and 4.2",
        f"{times:,.0f} times fewer on GPT-3 with r = 4", graded(about(10_000, times), False), exact=True,
    )  # fmt: skip


def counts() -> Section:
    """Everything here is exact: a configuration is enough, no weights are needed."""
    gpt3 = PRESETS["gpt3-175b"]
    whole, update = size(gpt3), count_parameters(gpt3, LoRAConfig(r=4))
    medium, large = (size(PRESETS[name]) / 1e6 for name in ("gpt2-medium", "gpt2-large"))
    rows = [
        [p.model, f"{p.r}", f"{p.millions}M", f"{p.counted:,}", "yes" if p.rounded == p.millions else "no"]
        for p in PAPER
    ]
    trained = {r: count_parameters(gpt3, LoRAConfig(r=r)) for r in (1, 2, 4, 8, 64)}
    by_rank = [[f"{r}", f"{n:,}", f"{whole / n:,.0f}", f"{n * HALF / 1e6:,.1f} MB"] for r, n in trained.items()]
    return Section(
        "counts", "How many parameters are trained",
        "Exact, from the configurations alone. What the paper prints for GPT-2 is a thousandth of the size of these "
        f"models ({medium:.1f}M and {large:.1f}M), and not r (in + out) summed over W_q and W_v at the r = 4 that it "
        "gives. Both are shown.",
        [
            table_claim(list(PAPER)),
            checkpoint_claim(whole * HALF / 1e9, update * HALF / 1e6),
            fewer_claim(whole / update),
        ],
        tables=[
            Table("Trained parameters, LoRA on W_q and W_v", ["model", "r", "printed", "counted", "agrees"], rows),
            Table(
                f"GPT-3, {whole:,} parameters: LoRA on W_q and W_v",
                ["r", "trained", "times fewer", "checkpoint, float16"], by_rank,
            ),
        ],
        data={
            "table": [{**p._asdict(), "counted": p.counted, "agrees": p.rounded == p.millions} for p in PAPER],
            "gpt3": {"size": whole, "r=4": update, "times_fewer": whole / update},
        },
    )  # fmt: skip
