"""Task switching (L6, L7; paper 4.2): several adapters on one base, switched, mixed by row, kept in files."""

from __future__ import annotations

import sysconfig
import tempfile
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..adapter import Adapter, merge, unmerge
from ..backend import asnumpy, xp
from ..batch import BatchDict
from ..formats.adapters.adapter import save_adapter
from ..formats.models.folder import model_hash, save_model
from ..loss import forward
from ..model import Model
from ..training.loop import evaluate
from .section import Claim, Section, Table, graded

ROUNDING = 1e-12  # of the largest logit, in float64
TENTH = 0.1  # a further task takes less than this part of a copy of the model


@dataclass(frozen=True)
class Task:
    """A task and the adapter that was trained on it."""

    name: str
    adapter: Adapter
    held_out: Sequence[BatchDict]


def unicode_names(most: int = 200_000) -> str:
    """The names of characters, a line each: "LATIN SMALL LETTER A"; about `most` characters of them."""
    names = (unicodedata.name(chr(code), "") for code in range(0x20000))
    return "\n".join(name for name in names if name)[:most]


def byte_tables(most: int = 400_000) -> str:
    """Python's tables of encodings, which say what each byte stands for; about `most` characters of them."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / "encodings"
    paths = sorted(folder.glob("cp*.py"))
    if not paths:
        raise FileNotFoundError(f"{folder}: this Python comes without the source of its standard library")
    return "".join(path.read_text(encoding="utf-8") for path in paths)[:most]


def task_losses(base: Model, tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
    """The held-out loss of each task, with the base alone and with each task's adapter."""
    adapters: dict[str, Adapter | None] = {"base": None, **{task.name: task.adapter for task in tasks}}
    return {
        task.name: {name: evaluate(base, adapter, task.held_out).loss for name, adapter in adapters.items()}
        for task in tasks
    }


def own_task_claim(losses: Mapping[str, Mapping[str, float]]) -> Claim:
    """Each adapter is the best at its own task."""
    own = [min(row, key=lambda name: row[name]) == task for task, row in losses.items()]
    return Claim(
        "one base serves many tasks, each through its own A and B", "paper, 1 and 4.2",
        f"the lowest loss on a task is its own adapter's in {sum(own)} of {len(own)}", graded(all(own), any(own)),
    )  # fmt: skip


def switch_claim(same_bits: bool, base_unchanged: bool, update: int, whole: int) -> Claim:
    """Switching and switching back loses nothing."""
    return Claim(
        "to switch tasks, only A and B are exchanged", "paper, 4.1 and 4.2",
        f"{update:,} bytes beside {whole:,} of the base; once round and back, beside the base and merged into it, the "
        f"logits {'have the same bits' if same_bits else 'differ'}, and the base's bytes are "
        f"{'what they were' if base_unchanged else 'other ones'}",
        graded(same_bits and base_unchanged, base_unchanged), exact=True,
    )  # fmt: skip


def mixed_claim(apart: float) -> Claim:
    """One batch, an adapter for each row."""
    return Claim(
        "one batch may hold inputs of several tasks, unmerged", "paper, 4.2",
        f"an adapter, or none, for each row: logits as of each alone, to {apart:.1e} of the largest, in float64",
        graded(apart <= ROUNDING, False), exact=True,
    )  # fmt: skip


def storage_claim(tasks: int, base: int, update: int) -> Claim:
    """Bytes on the disk, of adapters and of copies."""
    shared, copies = base + tasks * update, tasks * base
    return Claim(
        f"{tasks} tasks take one base and {tasks} small files, not {tasks} copies", "paper, 4.2",
        f"{shared / 1e6:.2f} MB instead of {copies / 1e6:.2f} MB, {copies / shared:.1f} times less; a further task "
        f"takes {update / base:.1%} of a copy",
        graded(shared < copies and update <= TENTH * base, shared < copies),
    )  # fmt: skip


def switched(base: Model, tasks: Sequence[Task]) -> bool:
    """Whether logits have the same bits on a second turn, and merged one after another as each merged on its own."""
    tokens = tasks[0].held_out[0]["tokens"][:1]

    def logits(model: Model, adapter: Adapter | None = None) -> bytes:
        return asnumpy(forward(model, tokens, adapter)).tobytes()

    turns = [[logits(base, task.adapter) for task in tasks] for _ in range(2)]
    model, on_their_own, in_turn = base, [], []
    for task in tasks:
        on_their_own.append(logits(merge(base, task.adapter)))
        merged = merge(model, task.adapter)
        in_turn.append(logits(merged))
        model = unmerge(merged, task.adapter)
    return turns[0] == turns[1] and in_turn == on_their_own and logits(model) == logits(base)


def mixed(base: Model, tasks: Sequence[Task]) -> float:
    """How far logits of a batch with another adapter for each row are from each row's alone, of the largest."""
    wide = replace(base, weights={name: w.astype(xp.float64) for name, w in base.weights.items()})
    adapters = [None, *(_widened(task.adapter) for task in tasks)]
    tokens = np.concatenate([tasks[0].held_out[0]["tokens"][:1], *(task.held_out[0]["tokens"][:1] for task in tasks)])
    together = asnumpy(forward(wide, tokens, adapters))
    alone = [asnumpy(forward(wide, row[None], adapter)) for row, adapter in zip(tokens, adapters, strict=True)]
    return float(np.abs(together - np.concatenate(alone)).max() / np.abs(together).max())


def _widened(adapter: Adapter) -> Adapter:
    return replace(adapter, params={name: p.astype(xp.float64) for name, p in adapter.params.items()})


def stored(save: Callable[[Path], None]) -> int:
    """The bytes of what is saved."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "saved")
        return sum(file.stat().st_size for file in (Path(folder) / "saved").iterdir())


def switching(base: Model, tasks: Sequence[Task]) -> Section:
    """The section, of a base and adapters for several tasks."""
    before = model_hash(base)
    losses = task_losses(base, tasks)
    update = stored(lambda path: save_adapter(path, tasks[0].adapter, base))
    whole = stored(lambda path: save_model(path, base))
    same = switched(base, tasks)
    in_memory = sum(p.nbytes for p in tasks[0].adapter.params.values())
    claims = [
        own_task_claim(losses),
        switch_claim(same, model_hash(base) == before, in_memory, sum(w.nbytes for w in base.weights.values())),
        mixed_claim(mixed(base, tasks)),
        storage_claim(len(tasks), whole, update),
    ]
    names = list(next(iter(losses.values())))
    rows = [[task, *(f"{row[name]:.3f}" for name in names)] for task, row in losses.items()]
    return Section(
        "switching", "Several tasks on one base",
        "Three texts that come with Python: the source of its standard library, the names of Unicode's characters, and "
        "the tables of its encodings. Each has an adapter on q and v, r = 8.",
        claims,
        tables=[
            Table(
                "Held-out loss of each text (rows) with each adapter (columns), nats a byte",
                ["text", *("base alone" if name == "base" else f"+ {name}" for name in names)], rows,
            )
        ],
        data={"losses": losses, "bytes": {"base": whole, "adapter": update}},
    )  # fmt: skip
