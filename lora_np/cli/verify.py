"""lora-np verify: does an adapter fit a base, is it trained, is a folder the merge of the two, what does it change."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..adapter import Adapter
from ..backend import Array, asnumpy
from ..formats.adapters.adapter import kind_of, load_adapter
from ..formats.adapters.base import load_base_for
from ..formats.adapters.peft import records_base
from ..formats.files.json_file import read_json
from ..formats.files.messages import listed, shown
from ..formats.merged.any_base import open_any_base
from ..formats.merged.comparison import Comparison, Difference, compare, is_trained, worst
from ..formats.merged.effect import Effect, effect
from ..formats.merged.gguf import due_updates
from ..formats.merged.gguf_comparison import compare_gguf
from ..formats.merged.mistakes import explained, looks_like
from ..formats.merged.plan import plan_merge
from ..formats.merged.survey import Module, survey
from ..formats.merged.target import Plan
from ..formats.models.folder import CONFIG, can_run, load_model
from ..formats.models.gguf import is_run
from ..formats.models.gguf_file import open_gguf
from ..formats.models.shards import stored_tensors
from ..loss import forward
from ..model import Config, Model
from .base import AddCommand, add_base, base_path, fitting, tokenizer_of, utf8, whole
from .output import Bar, emit, table

ROWS = 10  # tensors in a table
HASH = "names, shapes and the recorded hash of the base"
NO_HASH = "names and shapes; the file records no hash of its base, as PEFT's do not"


def run_verify(args: argparse.Namespace) -> int:
    if args.ulps < 0:
        raise ValueError(f"--ulps: expected 0 or more, got {args.ulps}")
    given = args
    with Bar() as bar:
        args = argparse.Namespace(**{**vars(given), "base": base_path(given, bar)})
    in_gguf = _is_gguf(args.base)
    if args.merged is not None and in_gguf != _is_gguf(args.merged):
        raise ValueError("--merged: expected a folder where the base is one, and a .gguf file where it is one")
    # What is missing or damaged is bad input; what does not fit is an answer.
    survey_of = survey(args.adapter, None if in_gguf else open_any_base(args.base))
    runs = _read_base(args.base)
    try:
        with fitting(given, args.adapter):
            plan, run = _fitted(args, runs)
    except ValueError as error:
        emit(args, {"holds": False, "fits": False, "reason": str(error)}, [f"fits: no. {error}"])
        return 1
    found = None if args.merged is None else _compared(args, plan)
    effects, not_finite, reason = (
        ({}, [], "this architecture is not run here")
        if run is None
        else run.effects(args, found is not None and found.loads)
    )
    changes = _changes(plan, run, survey_of.modules)
    by_name = plan is not None and plan.config is None
    remarks = list(plan.remarks if plan is not None and by_name else survey_of.remarks)
    holds = changes and (found is None or found.holds) and not not_finite and not remarks
    has_hash = records_base(args.adapter) if args.adapter.is_dir() else kind_of(args.adapter) in ("npz", "loralib")
    seen = None if found is None else explained(found, survey_of.config)
    result: dict[str, Any] = {
        "holds": holds, "fits": True, "base_hash": has_hash, "trained": changes, "remarks": remarks,
        "zero": [m.name for m in survey_of.modules if m.norm_B == 0],
        "effect": {name: one._asdict() for name, one in effects.items()}, "not_finite": not_finite,
    }  # fmt: skip
    result |= {} if found is None else {"merged": _as_json(found, seen, survey_of.config)}
    emit(args, result, [
        f"fits: yes ({HASH if has_hash else NO_HASH})",
        *(f"but {remark}" for remark in remarks),
        f"trained: {_trained_line(changes, survey_of.modules)}",
        *_other_base(args, survey_of.config),
        *([] if found is None else _merged_lines(found, seen, args.ulps, survey_of.config)),
        *(f"{name}: {_effect_line(one)}" for name, one in effects.items()),
        *([f"effect of the adapter: left out: {reason}"] if reason else []),
        *(f"no verdict: outputs of {name} are NaN or infinite: they overflow" for name in not_finite),
    ])  # fmt: skip
    return 0 if holds else 1


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def _read_base(base: Path) -> bool:
    """Whether a base can be run. It is read, as damage is an error, and no answer."""
    if _is_gguf(base):
        with open_gguf(base) as file:
            runs = is_run(file)
    else:
        runs = can_run(base)
    if runs:
        load_model(base)
    elif not _is_gguf(base):
        stored_tensors(base)
    return runs


def _fitted(args: argparse.Namespace, runs: bool) -> tuple[Plan | None, _Run | None]:
    """The merge of base and adapter, and the adapter on a base that is run; a ValueError says why it does not fit."""
    if _is_gguf(args.base) and not runs:
        with open_gguf(args.base) as file:
            due_updates(file, [args.adapter], [1.0])
    on_folder = not _is_gguf(args.base) and (kind_of(args.adapter) != "gguf" or not runs)
    plan = plan_merge(args.base, [args.adapter], [1.0]) if on_folder else None
    return plan, _Run(args, must=plan is None or plan.config is not None) if runs else None


def _compared(args: argparse.Namespace, plan: Plan | None) -> Comparison:
    if _is_gguf(args.base):
        return compare_gguf(args.base, [args.adapter], args.merged, args.ulps)
    return compare(plan or plan_merge(args.base, [args.adapter], [1.0]), args.merged, args.ulps)


def _changes(plan: Plan | None, run: _Run | None, modules: Sequence[Module]) -> bool:
    """Whether the adapter changes anything."""
    if plan is not None and plan.config is None:
        return plan.changes_anything
    return any(module.norm_update for module in modules) if run is None else run.is_trained


class _Run:
    """A base that can be run, and the adapter on it, if the adapter is one that can be.

    must: whether it is an error if it cannot.
    """

    def __init__(self, args: argparse.Namespace, *, must: bool) -> None:
        self.reason = ""
        self.adapter: Adapter | None = None
        try:
            self.base = load_base_for(args.adapter, args.base)
            self.adapter = load_adapter(args.adapter, self.base)
        except ValueError as error:
            if must:
                raise
            self.reason = str(error)

    @property
    def is_trained(self) -> bool:
        return self.adapter is not None and is_trained(self.adapter, self.base)

    def effects(self, args: argparse.Namespace, merged: bool) -> tuple[dict[str, Effect], list[str], str]:
        """How far outputs move, whose are not finite, and why nothing is said."""
        if self.adapter is None:
            return {}, [], self.reason
        model = load_model(args.merged, dtype=str(self.base.dtype)) if merged else None
        return *_effects(self.base, self.adapter, model, _tokens(args, self.base.config)), ""


def _other_base(args: argparse.Namespace, config: Mapping[str, Any]) -> list[str]:
    """A remark where the adapter names another base than this: by the last part of its name."""
    said = config.get("base_model_name_or_path")
    if not isinstance(said, str) or not said:
        return []
    known = {args.base.resolve().name}
    if args.base.is_dir():
        known.add(str(read_json(args.base / CONFIG).get("_name_or_path")).rstrip("/").rpartition("/")[2])
    name = said.rstrip("/").rpartition("/")[2]
    return [] if name in known else [f"the adapter names its base {shown(said)}; this one is {args.base}"]


def _trained_line(changes: bool, modules: Sequence[Module]) -> str:
    if changes:
        zero = [module.name for module in modules if module.norm_B == 0]
        return f"yes, but B is zero in {len(zero)} modules: {listed(zero)}" if zero else "yes"
    if any(module.norm_B for module in modules):
        return "no: its scale is 0: it changes nothing"
    return "no: B is zero throughout, and what is trained whole equals the base"


def _as_json(found: Comparison, seen: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    tensors = [{**one._asdict(), "fits": one.fits, "looks_like": looks_like(one, config)} for one in found.changed]
    return {"holds": found.holds, **found._asdict(), "changed": tensors, "looks_like": seen}


def _tensor_table(found: Comparison, config: Mapping[str, Any]) -> list[str]:
    """The tensors that are not what they should be, the worst first."""
    wrong = sorted((one for one in found.changed if not one.fits), key=lambda one: (-one.wrong, -one.differing))
    if not wrong:
        return []
    rows = [["tensor", "differing", "of", "ulps", "largest", "relative", "times", "looks like"]]
    for one in wrong[:ROWS]:
        times = "" if one.scale is None else f"{one.scale:.3g}"
        text = ", or ".join(looks_like(one, config))
        rows.append(
            [one.tensor, f"{one.differing:,}", f"{one.elements:,}", f"{one.max_ulps:,}", *_sizes(one), times, text]
        )
    more = [f"and {len(wrong) - ROWS} more; --json has all"] if len(wrong) > ROWS else []
    about = f"largest: the largest |difference|; relative: that over the largest |element| of {_due(config)}"
    return [f"  {line}" for line in [*table(rows), *more, about]]


def _due(config: Mapping[str, Any]) -> str:
    """What a merged weight is to be (L5, L10)."""
    return "(m / c) (W0 + s B A)" if config.get("use_dora") is True else "W0 + s B A"


def _sizes(one: Difference) -> tuple[str, str]:
    """The largest difference, absolute and relative."""
    return f"{one.max_difference:.3g}", "-" if one.relative is None else f"{one.relative:.3g}"


def _merged_lines(found: Comparison, seen: str | None, ulps: int, config: Mapping[str, Any]) -> list[str]:
    """What there is to say about a merged folder."""
    differing, elements = (sum(getattr(one, what) for one in found.changed) for what in ("differing", "elements"))
    furthest = worst(found.changed)
    if found.holds and differing == 0:
        return [f"merged: yes, exactly: each of {elements:,} elements is {_due(config)}, rounded once"]
    lines = []
    if furthest is not None and differing:
        lines.append(
            f"  {differing:,} of {elements:,} elements differ from {_due(config)} rounded once; the furthest tensor is "
            f"{furthest.tensor}, by up to {furthest.max_ulps:,} ulps, a difference of "
            + "{}, {} of its largest element".format(*_sizes(furthest))
            + (", near zero, where W0 and dW cancel" if found.holds and furthest.max_ulps > ulps else "")
        )
        beyond, wrong = (sum(getattr(one, what) for one in found.changed) for what in ("beyond", "wrong"))
        lines.append(
            f"  {beyond:,} are further off than {ulps} ulps, {wrong:,} of them further than a sum in the file's own "
            "dtype can be"
        )
    for what, names in (
        (
            "with numbers that are NaN or infinite, there or in the sum",
            [d.tensor for d in found.changed if d.not_finite],
        ),
        ("not the base's, though the adapter does not touch them", found.altered),
        ("of another shape, or of a dtype that no weight has", found.misshapen),
        ("missing", found.missing),
        ("with no place in the model", found.extra),
    ):
        if names:
            lines.append(f"  {len(names)} tensors {what}: {listed(names)}")
    if not found.same_config:
        lines.append("  config.json describes another model")
    if seen is not None:
        lines.append(f"  it looks like {seen}")
    lines += _tensor_table(found, config)
    verdict = "yes, as rounded more often than once" if found.holds else "no"
    return [f"merged: {verdict}", *lines]


def _effects(base: Model, adapter: Adapter, merged: Model | None, tokens: Array) -> tuple[dict[str, Effect], list[str]]:
    """How far outputs move: from the base to the adapted model, and from that to the merged one, if it loads.

    And whose outputs are not finite: nothing is concluded from those.
    """
    source = tokens if base.config.n_encoder else None  # read and written alike: any tokens will do
    outputs = {
        "the base": forward(base, tokens, source=source),
        "the base with the adapter": forward(base, tokens, adapter, source=source),
    }
    if merged is not None:
        outputs["the merged model"] = forward(merged, tokens, source=source)
    finite = {name: asnumpy(y) for name, y in outputs.items() if np.isfinite(asnumpy(y)).all()}
    pairs = zip(("effect of the adapter", "merged beside unmerged"), pairwise(outputs), strict=False)
    effects = {
        what: effect(base.config, finite[one], finite[other])
        for what, (one, other) in pairs
        if one in finite and other in finite
    }
    return effects, [name for name in outputs if name not in finite]


def _tokens(args: argparse.Namespace, config: Config) -> Array:
    """(1,T): the prompt's, or a few fixed ones."""
    if args.prompt is None:
        tokens = np.arange(1, 9) * 37 % config.vocab_size
    else:
        tokens = np.array(tokenizer_of(args.base, config).encode(args.prompt), dtype=np.int64)
    if not len(tokens):
        raise ValueError("--prompt: expected some text, got none")
    return tokens[None, : config.longest]


def _effect_line(one: Effect) -> str:
    if one.kl is None:
        return f"the largest change of a state is {one.change:.3g}"
    return (
        f"the largest change of a logit is {one.change:.3g}, the KL divergence at most {one.kl:.3g} nats, another is "
        f"the likeliest at {one.flipped} of {one.places} places"
    )


def add_commands(command: AddCommand) -> None:
    """The command of this file, and its arguments."""
    p = command("verify", run_verify, "does an adapter fit a base, is it trained, is a folder the merge of the two")
    add_base(p)
    p.add_argument("--adapter", type=Path, required=True, metavar="PATH", help="the adapter's folder, or its file")
    p.add_argument(
        "--merged", type=Path, metavar="PATH", help="what should be the merge of the two: a folder, or .gguf"
    )
    p.add_argument("--ulps", type=whole, default=1, help="how far apart an element may be (default: %(default)s)")
    p.add_argument("--prompt", type=utf8, help="what to compare the outputs on (default: a few fixed tokens)")
