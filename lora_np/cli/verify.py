"""lora-np verify: does an adapter fit a base, is it trained, is a folder the merge of the two, what does it change."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..adapter import Adapter
from ..backend import Array, asnumpy
from ..formats.adapters.adapter import load_adapter
from ..formats.adapters.base import load_base_for
from ..formats.merged.comparison import Comparison, compare, explained, is_trained, records_base, worst
from ..formats.merged.effect import Effect, effect
from ..formats.merged.gguf_comparison import compare_gguf
from ..formats.merged.plan import plan_merge
from ..formats.merged.survey import Module, survey
from ..formats.models.folder import load_model
from ..loss import forward
from ..model import Config, Model
from .base import AddCommand, tokenizer_of, utf8, whole
from .output import emit

SHOWN = 5  # names in one line


def run_verify(args: argparse.Namespace) -> int:
    if args.ulps < 0:
        raise ValueError(f"--ulps: expected 0 or more, got {args.ulps}")
    in_gguf = args.base.suffix.lower() == ".gguf"
    if args.merged is not None and in_gguf != (args.merged.suffix.lower() == ".gguf"):
        raise ValueError("--merged: expected a folder where the base is one, and a .gguf file where it is one")
    modules = survey(args.adapter).modules  # what is missing or damaged is bad input; what does not fit is an answer
    load_model(args.base)
    try:
        base = load_base_for(args.adapter, args.base)
        adapter = load_adapter(args.adapter, base)
        plan = None if args.merged is None or in_gguf else plan_merge(args.base, [args.adapter], [1.0])
    except ValueError as error:
        emit(args, {"holds": False, "fits": False, "reason": str(error)}, [f"fits: no. {error}"])
        return 1
    has_hash, changes = records_base(args.adapter), is_trained(adapter, base)
    found = None if plan is None else compare(plan, args.merged, args.ulps)
    if args.merged is not None and in_gguf:
        found = compare_gguf(args.base, [args.adapter], args.merged, args.ulps)
    merged = load_model(args.merged, dtype=str(base.dtype)) if found is not None and found.loads else None
    effects, not_finite = _effects(base, adapter, merged, _tokens(args, base.config))
    holds = changes and (found is None or found.holds) and not not_finite
    result: dict[str, Any] = {"holds": holds, "fits": True, "base_hash": has_hash, "trained": changes}
    seen = (
        "names, shapes and the recorded hash of the base"
        if has_hash
        else ("names and shapes; the file records no hash of its base, as PEFT's do not")
    )
    lines = [f"fits: yes ({seen})", f"trained: {_trained_line(changes, modules)}"]
    if found is not None:
        looks_like = explained(found, [adapter])
        result["merged"] = {**_as_json(found), "looks_like": looks_like}
        lines += _merged_lines(found, looks_like, args.ulps)
    result |= {"effect": {name: one._asdict() for name, one in effects.items()}, "not_finite": not_finite}
    lines += [f"{name}: {_effect_line(one)}" for name, one in effects.items()]
    lines += [
        f"no verdict: outputs of {name} are NaN or infinite: they overflow in {base.dtype}" for name in not_finite
    ]
    emit(args, result, lines)
    return 0 if holds else 1


def _trained_line(changes: bool, modules: Sequence[Module]) -> str:
    if changes:
        return "yes"
    if any(module.norm_B for module in modules):
        return "no: its scale is 0: it changes nothing"
    return "no: B is zero throughout, and what is trained whole equals the base"


def _as_json(found: Comparison) -> dict[str, Any]:
    tensors = [{**one._asdict(), "fits": one.fits} for one in found.changed]
    return {"holds": found.holds, **found._asdict(), "changed": tensors}


def _merged_lines(found: Comparison, looks_like: str | None, ulps: int) -> list[str]:
    """What there is to say about a merged folder."""
    differing, elements = (sum(getattr(one, what) for one in found.changed) for what in ("differing", "elements"))
    furthest = worst(found.changed)
    if found.holds and differing == 0:
        return [f"merged: yes, exactly: each of {elements:,} elements is W0 + s B A, rounded once"]
    lines = []
    if furthest is not None and differing:
        lines.append(
            f"  {differing:,} of {elements:,} elements differ from W0 + s B A rounded once; the furthest tensor is "
            f"{furthest.tensor}, by up to {furthest.max_ulps:,} ulps"
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
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {len(names)} tensors {what}: {' '.join(names[:SHOWN])}{more}")
    if not found.same_config:
        lines.append("  config.json describes another model")
    if looks_like is not None:
        lines.append(f"  it looks like {looks_like}")
    verdict = "yes, as rounded more often than once" if found.holds else "no"
    return [f"merged: {verdict}", *lines]


def _effects(base: Model, adapter: Adapter, merged: Model | None, tokens: Array) -> tuple[dict[str, Effect], list[str]]:
    """How far outputs move: from the base to the adapted model, and from that to the merged one, if it loads.

    And whose outputs are not finite: nothing is concluded from those.
    """
    outputs = {"the base": forward(base, tokens), "the base with the adapter": forward(base, tokens, adapter)}
    if merged is not None:
        outputs["the merged model"] = forward(merged, tokens)
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
    p.add_argument(
        "--base", type=Path, required=True, metavar="DIR", help="the base: a model's folder, or a .gguf file"
    )
    p.add_argument("--adapter", type=Path, required=True, metavar="PATH", help="the adapter's folder, or .gguf file")
    p.add_argument(
        "--merged", type=Path, metavar="PATH", help="what should be the merge of the two: a folder, or .gguf"
    )
    p.add_argument("--ulps", type=whole, default=1, help="how far apart an element may be (default: %(default)s)")
    p.add_argument("--prompt", type=utf8, help="what to compare the outputs on (default: a few fixed tokens)")
