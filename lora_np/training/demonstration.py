"""The demonstration: LoRA, and full fine-tuning beside it, adapt the embedded base to Python's standard library."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..adapter import Adapter, LoRAConfig, count_parameters, init_adapter, merge, unmerge
from ..backend import asnumpy, xp
from ..batch import BatchDict
from ..decode import generate_on
from ..formats.adapters.adapter import load_adapter, save_adapter
from ..formats.files.safetensors_file import import_safetensors
from ..formats.models.folder import load_model, model_hash, save_model
from ..loss import forward, loss_and_grads
from ..model import Model
from . import embedded
from .embedded import Recipe, base_folder, train_on_text
from .loop import Progress, Settings, evaluate, placed
from .text import all_windows, decode, encode, split, standard_library


@dataclass(frozen=True)
class Plan:
    """The sizes of the demonstration. The quick one shows that all runs; it is too short to show how well."""

    base: Recipe
    lora: LoRAConfig
    adapt: Settings
    full: Settings
    evaluations: int
    windows: int


STANDARD = Plan(
    base=embedded.STANDARD,
    lora=LoRAConfig(r=8, alpha=16, targets=("q", "v")),
    adapt=Settings(steps=150, lr=1e-2, b_ratio=4, warmup=10),
    full=Settings(steps=150, lr=1e-3, warmup=10),
    evaluations=5,
    windows=128,
)
QUICK = replace(
    STANDARD,
    base=embedded.QUICK,
    adapt=Settings(steps=10, lr=1e-2, warmup=1),
    full=Settings(steps=10, lr=1e-3, warmup=1),
    evaluations=2,
    windows=8,
)


class Check(NamedTuple):
    """One claim, whether it held, and what was seen."""

    claim: str
    held: bool
    seen: str


@dataclass
class Outcome:
    """What the demonstration found. Losses are held-out, in nats a byte; curves are (step, loss)."""

    losses: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)


def run(report: Callable[[Progress], None], plan: Plan) -> Outcome:
    """The demonstration, start to end: the base, LoRA, full fine-tuning, and the checks."""
    import_safetensors()  # the last check writes files
    began = time.perf_counter()
    out = Outcome()
    folder, cached = base_folder(report, plan.base)
    base = load_model(folder)
    out.seconds["base from the cache" if cached else "pretraining"] = time.perf_counter() - began
    text, held_out = split(encode(standard_library()), 0.1)

    def loss_of(model: Model, adapter: Adapter | None) -> float:
        windows = all_windows(held_out, N=32, T=base.config.n_positions, most=plan.windows)
        return evaluate(model, adapter, (batch._asdict() for batch in windows)).loss

    out.losses["base"] = loss_of(base, None)
    before = model_hash(base)

    def adapt(name: str, adapter: Adapter | None, settings: Settings) -> Adapter | None:
        """Trains the adapter, or without one every weight, and notes how the held-out loss falls."""
        start = time.perf_counter()
        curve = out.curves[name] = [(0, out.losses["base"])]

        def after_step(r: Progress) -> None:
            report(r)
            if r.step % max(1, settings.steps // plan.evaluations) == 0 or r.step == settings.steps:
                curve.append((r.step, loss_of(*placed(base, adapter, r.state))))

        _, trained = train_on_text(name, base, adapter, text, plan.base.rows, settings, after_step)
        out.seconds[name] = time.perf_counter() - start
        out.losses[name] = curve[-1][1]
        return trained

    lora = adapt("LoRA", init_adapter(base, plan.lora, seed=plan.adapt.seed), plan.adapt)
    adapt("full fine-tuning", None, plan.full)
    assert lora is not None
    out.parameters = {
        "base": sum(w.size for w in base.weights.values()),
        "LoRA": count_parameters(base.config, plan.lora),
    }
    sample = held_out[: base.config.n_positions // 2].astype(np.int64)[None]
    for name, with_adapter in [("base", None), ("LoRA", lora)]:
        new = generate_on(base, sample, with_adapter, n=100, temperature=0.7, seed=0)
        out.samples[name] = decode(new[0, sample.shape[1] :])
    out.samples["prompt"] = decode(sample[0])
    window = next(all_windows(held_out, N=2, T=base.config.n_positions, most=2))
    out.checks = list(_checks(base, lora, before, window._asdict(), out))
    out.seconds["all"] = time.perf_counter() - began
    return out


def _checks(base: Model, lora: Adapter, before: str, batch: BatchDict, out: Outcome) -> list[Check]:
    """The claims, each tried on the trained adapter."""
    checks = [Check("training left the base's bytes as they were", model_hash(base) == before, f"sha256 {before[:12]}")]
    _, grads = loss_and_grads(base, lora, **batch)
    only = grads.keys() == lora.params.keys() and all(name[-2:] in (".A", ".B") for name in grads)
    checks.append(Check("gradients fall on A and B alone", only, f"{len(grads)} arrays, no other"))
    merged = merge(base, lora)
    checks.append(_check_merged(base, lora, batch))
    again = unmerge(merged, lora)
    exact = again is base and model_hash(again) == before
    checks.append(Check("unmerging gives back the base, bit for bit", exact, f"sha256 {model_hash(again)[:12]}"))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder) / "adapter", lora, base)
        back = load_adapter(Path(folder) / "adapter", base)
        out.bytes["LoRA"] = sum(f.stat().st_size for f in (Path(folder) / "adapter").iterdir())
        save_model(Path(folder) / "base", base)
        out.bytes["base"] = sum(f.stat().st_size for f in (Path(folder) / "base").iterdir())
    same = back.config == lora.config and all(bool((back.params[n] == p).all()) for n, p in lora.params.items())
    checks.append(Check("the adapter, saved and reloaded, is the same", same, f"{out.bytes['LoRA']:,} bytes"))
    return checks


def _check_merged(base: Model, lora: Adapter, batch: BatchDict) -> Check:
    """L5 on the whole model, in float64, where rounding is all that is left between the two."""
    wide = replace(base, weights={name: w.astype(xp.float64) for name, w in base.weights.items()})
    update = replace(lora, params={name: p.astype(xp.float64) for name, p in lora.params.items()})
    unmerged = asnumpy(forward(wide, batch["tokens"], update))
    apart = float(np.abs(asnumpy(forward(merge(wide, update), batch["tokens"])) - unmerged).max())
    relative = apart / float(np.abs(unmerged).max())
    return Check("merged and unmerged logits agree", relative < 1e-12, f"{relative:.1e} of the largest, in float64")
