"""The whole report: the bases, what is trained, and each section in turn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..adapter import Adapter
from ..batch import BatchDict
from ..formats.models.folder import load_model
from ..formats.models.presets import PRESETS
from ..model import Config, Model
from ..training import embedded
from ..training.examples import Tokens, bucketed, in_order, steps_an_epoch
from ..training.loop import Progress, Settings, evaluate
from ..training.tasks import EVALUATED, read_examples, task_of
from ..training.text import all_windows, encode, random_windows, split, standard_library
from .amplification import amplification
from .amplification import wanted as for_amplification
from .cost import Measured, cost
from .counts import counts, size
from .kept import Kept
from .latency import Shape, latency
from .orthogonality import orthogonality
from .rank import rank
from .rank import wanted as for_rank
from .section import Section
from .study import QV, Setting, Study, Trainings, adapter_of, train_all
from .subspaces import LOW, subspaces
from .subspaces import wanted as for_subspaces
from .switching import Task, byte_tables, switching, unicode_names

HELD_OUT = 0.1  # of a text
SOURCE = "Python source"
OTHER_TEXTS = {"Unicode's names": unicode_names, "byte tables": byte_tables}
TASK_SEED = 2  # of the other tasks' adapters: none that they are compared with has it


@dataclass(frozen=True)
class Plan:
    """The sizes of a report.

    name       of its form
    base       the embedded base, and the rows of a batch
    ranks      of the grid, up to the paper's 64
    seeds      of each choice of matrices and rank
    settings   of each adapter's training; full_lr: the rate where every weight is trained
    windows    of a text, held out
    heavy      the model whose weights outweigh its activations (`cost`)
    passes     the model whose forward pass is timed, the batches, and the rounds
    seconds    that a section takes on two cores, by its id; no part of what figures depend on
    """

    name: str

    base: embedded.Recipe
    ranks: tuple[int, ...]
    seeds: tuple[int, ...]
    settings: Settings
    full_lr: float
    windows: int
    heavy: Measured
    passes: Config
    shapes: tuple[Shape, ...]
    rounds: int
    seconds: Mapping[str, float] = field(default_factory=dict, repr=False)


TABLE_1 = (Shape(32, 512), Shape(16, 256), Shape(1, 128))  # the batches of the paper's table 1
_GPT2 = replace(PRESETS["gpt2"], vocab_size=256, n_positions=512, head="none", tie_head=False)
_SMALL = replace(_GPT2, n_layer=1, n_head=2, d_model=64, d_ff=256)

STANDARD = Plan(
    name="standard",
    base=embedded.STANDARD,
    ranks=(1, 2, 4, 8, 64),
    seeds=(0, 1, 2),
    settings=Settings(steps=120, lr=3e-3, b_ratio=4, warmup=10),
    full_lr=1e-3,
    windows=128,
    heavy=Measured("weights outweigh activations", replace(_GPT2, n_layer=2, head="lm", tie_head=True), 1, 16),
    passes=replace(_GPT2, n_layer=2, n_head=4, d_model=256, d_ff=1024),
    shapes=TABLE_1,
    rounds=5,
    seconds={
        "counts": 1,
        "cost": 30,
        "rank-embedded": 230,
        "subspaces-embedded": 10,
        "amplification-embedded": 1,
        "latency": 40,
        "switching": 5,
        "orthogonality": 30,
    },
)
FULL = replace(STANDARD, name="full", passes=_GPT2, seconds={**STANDARD.seconds, "latency": 1800})
QUICK = replace(
    STANDARD,
    name="quick",
    base=embedded.QUICK,
    ranks=(1, 8, 16),
    seeds=(0, 1),
    settings=Settings(steps=10, lr=1e-2, b_ratio=4, warmup=1),
    windows=4,
    heavy=Measured("weights outweigh activations", replace(_SMALL, head="lm", tie_head=True), 1, 4),
    passes=_SMALL,
    shapes=(Shape(4, 16), Shape(1, 8)),
    rounds=1,
    seconds={**dict.fromkeys(STANDARD.seconds, 1), "rank-embedded": 6},
)  # fmt: skip

LABELLED = Settings(steps=20, lr=1e-3, warmup=20)  # of MiniLM on SST-2, but for the steps: an epoch
LABELLED_FULL_LR = 1e-4
LABELLED_ROWS, LABELLED_LONGEST = 32, 64
TRAIN, DEV = "train.tsv", "dev.tsv"


class Part(NamedTuple):
    """A section to be: its id, its title, about how many seconds it takes on two cores (None: that depends on the base
    and the data), and what makes it."""

    id: str
    title: str
    seconds: float | None
    make: Callable[[], Section]


@dataclass
class _Shared:
    """What several sections rest on; each is made when the first section asks for it."""

    plan: Plan
    report: Callable[[Progress], None]
    kept: Kept

    @cached_property
    def base(self) -> Model:
        return load_model(embedded.base_folder(self.report, self.plan.base)[0])

    @cached_property
    def study(self) -> Study:
        return text_study(self.plan, self.base, SOURCE, standard_library())

    @cached_property
    def trainings(self) -> Trainings:
        return train_all(self.study, wanted(self.plan), self.report, self.kept)

    @cached_property
    def tasks(self) -> Sequence[Task]:
        """Three tasks with their adapters: the study's own, and two more texts."""
        setting = Setting(QV, LOW, TASK_SEED)
        others = {name: text_study(self.plan, self.base, name, text()) for name, text in OTHER_TEXTS.items()}
        trained = {name: train_all(of, [setting], self.report, self.kept)[setting] for name, of in others.items()}
        return [
            Task(SOURCE, adapter_of(self.trainings[Setting(QV, LOW, 0)]), self.study.held_out),
            *(Task(name, adapter_of(found), others[name].held_out) for name, found in trained.items()),
        ]


def parts(plan: Plan, report: Callable[[Progress], None], kept: Kept, real: Study | None = None) -> list[Part]:
    """The sections to be, in order. real: a study of a real base on real data beside the embedded one."""
    shared = _Shared(plan, report, kept)
    seconds = plan.seconds

    def light() -> Measured:
        return Measured("the embedded base", shared.base.config, plan.base.rows, plan.base.config.n_positions)

    def part(id: str, title: str, make: Callable[[], Section]) -> Part:
        return Part(id, title, seconds.get(id), make)

    def of_study(
        id: str, study: Callable[[], Study], trainings: Callable[[], Trainings], other: Callable[[], Adapter | None]
    ) -> list[Part]:
        high, name = plan.ranks[-1], f"{id} base"

        def ranked() -> Section:
            return rank(study(), trainings(), plan.ranks, evaluate(study().model, None, study().held_out))

        return [
            part(f"rank-{id}", f"Which rank, which matrices: {name}, {len(set(wanted(plan)))} trainings", ranked),
            part(f"subspaces-{id}", f"What updates have in common: {name}",
                 lambda: subspaces(study(), trainings(), high, other())),
            part(f"amplification-{id}", f"What an update amplifies: {name}",
                 lambda: amplification(study(), trainings(), high)),
        ]  # fmt: skip

    found = [
        part("counts", "How many parameters are trained", counts),
        part("cost", "What training costs", lambda: cost(plan.heavy, light(), plan.rounds)),
        *of_study("embedded", lambda: shared.study, lambda: shared.trainings, lambda: shared.tasks[1].adapter),
    ]
    if real is not None:
        trained = cache(lambda: train_all(real, wanted(plan), report, kept))
        found += of_study("real", lambda: real, trained, lambda: None)
    found += [
        part("latency", "Inference latency", lambda: latency(plan.passes, plan.shapes, plan.rounds)),
        part("switching", "Several tasks on one base", lambda: switching(shared.base, shared.tasks)),
        part("orthogonality", "Together with prefix tuning",
             lambda: orthogonality(shared.study, shared.trainings, plan.seeds, report)),
    ]  # fmt: skip
    return found


def wanted(plan: Plan) -> list[Setting]:
    """Every adapter that the sections of one study need."""
    high = plan.ranks[-1]
    return [*for_rank(plan.ranks, plan.seeds), *for_subspaces(high), *for_amplification(high)]


def data_hash(data: Path) -> str:
    """What stands for the files of `labelled_study`: the SHA-256 of both. -> 64 hexadecimal digits."""
    return hashlib.sha256(
        b"".join(hashlib.sha256((data / name).read_bytes()).digest() for name in (TRAIN, DEV))
    ).hexdigest()


def text_study(plan: Plan, base: Model, name: str, text: str) -> Study:
    """The embedded base on a text."""
    T, N = plan.base.config.n_positions, plan.base.rows
    tokens, held_out = split(encode(text), HELD_OUT)

    def batch(step: int, seed: int) -> BatchDict:
        return random_windows(tokens, N=N, T=T, seed=seed, step=step)._asdict()

    windows = [found._asdict() for found in all_windows(held_out, N=EVALUATED, T=T, most=plan.windows)]
    return Study("embedded", f"embedded base, {name}", "nats a byte", base, batch, windows, plan.settings, plan.full_lr)


def labelled_study(base: Path, data: Path, tokenizer_of: Callable[[Path, Config], Tokens]) -> Study:
    """A real base on the texts with labels in the folder `data`, train.tsv and dev.tsv, `text<TAB>label` a line.

    Beside each adapter a classifier is trained. A FileNotFoundError or ValueError says, in one line, what is wrong.
    """
    task = task_of("classify", data / TRAIN, LABELLED_LONGEST)
    model = load_model(base, head="classify", n_labels=len(task.labels), seed=0)
    task = replace(task, longest=min(task.longest, model.config.longest))
    tokenizer = tokenizer_of(base, model.config)
    examples, others = (read_examples(data / name, task, tokenizer)[0] for name in (TRAIN, DEV))
    assert examples is not None
    assert others is not None

    def batch(step: int, seed: int) -> BatchDict:
        return bucketed(examples, N=LABELLED_ROWS, seed=seed, step=step)

    steps = steps_an_epoch(examples, LABELLED_ROWS)
    settings = replace(LABELLED, steps=steps, warmup=min(LABELLED.warmup, steps))
    held_out = list(in_order(others, N=EVALUATED))
    name = f"base of {size(model.config) / 1e6:.1f}M parameters, {data.resolve().name}"
    lora: dict[str, Any] = {"train_head": True, "dropout": 0.1}
    return Study("real", name, "nats a text", model, batch, held_out, settings, LABELLED_FULL_LR, lora)
