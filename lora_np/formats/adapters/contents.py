"""What an adapter's folder says, by the modules' own names, whatever the architecture: PEFT's files, and mlx-lm's.

A module's update needs its name and shape alone (L1): which rank and scale it has, PEFT's rules say by its name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...adapter import LoRAConfig
from ...backend import Array
from ...lora import Update
from ..files.json_file import from_fields, read_json
from ..files.messages import named, shown
from ..files.safetensors_file import UNGATHERED, refuse_pickle
from ..models.shards import Stored, stored_tensors
from .expected import expect_adapter
from .keys import adapter_names, read_key
from .peft_config import BY_NAME, CONFIG, PATTERNS, READ, WEIGHTS, Fits, check_keys, endings, expressions_in, resolved
from .prefix import change_of_prefix, moved

MLX_WEIGHTS = "adapters.safetensors"
CONVERT = "lora-np convert writes a right file"  # where a mending is certain
PARAMETERS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")  # of a layer's experts, in order


class Pair(NamedTuple):
    """A and B of one module, as the file has them, in host memory: the update is s B A.

    A (r, in), B (out, r); of a look-up A (r, V), B (D, r); of E experts A (E r, in), B (out, r E).
    r, alpha: what the scale s is made of (L1); alpha None: the file has s alone. bias: what is added to the module's
    bias, times s; None: nothing. m (out,): DoRA's magnitudes (L10), of a look-up (D,); None: it is none.
    """

    A: Array
    B: Array
    s: float
    r: int
    alpha: float | None = None
    bias: Array | None = None
    is_look_up: bool = False
    m: Array | None = None

    @property
    def updates(self) -> list[Update]:
        """The update of the module, or of each expert e: dW_e = s B[:, e::E] A[e r : (e + 1) r]; without m."""
        E = len(self.A) // self.r
        return [Update(self.A[e * self.r : (e + 1) * self.r], self.B[:, e::E], self.s) for e in range(E)]


@dataclass(frozen=True, eq=False)
class Contents:
    """An adapter, by the names of the base's modules.

    raw       its configuration
    pairs     A and B of each module; several where several parameters of one module are adapted, the innermost first
    whole     what is trained whole, by the tensor's name
    rows      rows of a table that are trained, by its module: their numbers, and the values (n, D)
    originals the base's own of what is trained whole, where PEFT kept it, by the tensor's name
    improper  tensors whose keys PEFT would not find: the key there, and PEFT's
    left_out  what PEFT would not load either, in a line each
    """

    path: Path
    raw: Mapping[str, Any]
    pairs: Mapping[str, list[Pair]]
    whole: Mapping[str, Array]
    rows: Mapping[str, tuple[list[int], Array]]
    improper: Mapping[str, str]
    left_out: Sequence[str] = ()
    originals: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        """The file of its tensors."""
        return self.path / (MLX_WEIGHTS if _is_mlx(self.raw) else WEIGHTS)

    @property
    def has_dora(self) -> bool:
        """Whether the updates are DoRA's (L10)."""
        return any(pair.m is not None for several in self.pairs.values() for pair in several)

    @property
    def remarks(self) -> list[str]:
        """What is wrong with the file though it can be read, in a line each."""
        if not self.improper:
            return list(self.left_out)
        found, proper = next(iter(self.improper.items()))
        return [
            f"{len(self.improper)} tensors have names under which PEFT finds nothing, so that it would change nothing: "
            f"got {shown(found)}, expected {shown(proper)}; {CONVERT}",
            *self.left_out,
        ]


@named
def read_contents(path: str | os.PathLike[str], known: Collection[str] = ()) -> Contents:
    """Reads an adapter's folder. A FileNotFoundError or ValueError, in one line, says what is missing or damaged.

    known: the base's modules, where there is one. The configuration may have their names where the file's tensors begin
    with another prefix.
    """
    folder = Path(path)
    expect_adapter(folder)
    raw = read_json(folder / CONFIG)
    if _is_mlx(raw):
        return _read_mlx(folder, raw)
    check_keys(raw, str(folder / CONFIG), on=BY_NAME)
    tensors = adapter_tensors(folder, raw)
    adapters = adapter_names(tensors)
    keys = {key: read_key(key, adapters) for key in tensors}
    originals = {found.module: tensors[key] for key, found in keys.items() if found.part == "original"}
    keys = {key: found for key, found in keys.items() if found.part != "original"}
    unused = {key: None for key, found in keys.items() if found.part == "bias" and raw.get("lora_bias") is not True}
    keys = {key: found for key, found in keys.items() if key not in unused}
    factors: dict[tuple[str, int], dict[str, Stored]] = {}
    whole: dict[str, Array] = {}
    tokens: dict[str, Array] = {}
    for key, (module, part, depth, _) in keys.items():
        if part == "tokens":
            tokens[module] = tensors[key].read_finite()
        elif part:
            if part in factors.setdefault((module, depth), {}):
                raise ValueError(f"{tensors[key]}: {module} has another {part} in this file")
            factors[module, depth][part] = tensors[key]
        else:
            value = tensors[key].read_finite()
            if not np.array_equal(whole.setdefault(module, value), value):  # PEFT writes copies of tables that grew
                raise ValueError(f"{tensors[key]}: {module} is there twice, and not the same")
    adapted = {module for module, _ in factors}
    strange = [name for name in whole if "lora_" in name.lower() or _is_no_part(name, adapted)]
    if strange or not (factors or tokens):
        got = shown((strange or list(tensors))[0])
        raise ValueError(f"{folder / WEIGHTS}: expected lora_A and lora_B of each module, got {got}")
    others = _others([*adapted, *tokens], known)
    pairs = _pairs(raw, factors, folder, others)
    nested = bool(raw.get("target_parameters"))
    proper = {key: found.proper if nested else found.alone for key, found in keys.items()}
    improper = {key: name for key, name in proper.items() if key != name}
    left_out = [
        f"lora_bias is not true, so {len(unused)} tensors are left out, as PEFT leaves them: {shown(first)}"
        for first in list(unused)[:1]
    ]
    return Contents(folder, raw, pairs, whole, _token_rows(raw, tokens, folder, others), improper, left_out, originals)


def adapter_tensors(folder: Path, raw: Mapping[str, Any]) -> dict[str, Stored]:
    """The tensors of a file, or of its shards; a ValueError if there are none, or one has no element."""
    name, factors = (MLX_WEIGHTS, "lora_a and lora_b") if _is_mlx(raw) else (WEIGHTS, "lora_A and lora_B")
    refuse_pickle(folder, name, is_dict=True)
    tensors = stored_tensors(folder, name)
    if not tensors:
        raise ValueError(f"{folder / name}: expected {factors} of each module, got no tensor at all; {UNGATHERED}")
    for stored in tensors.values():
        if 0 in stored.shape:
            raise ValueError(f"{stored}: expected a tensor with elements, got shape {stored.shape}; {UNGATHERED}")
    return tensors


def _is_no_part(name: str, adapted: Collection[str]) -> bool:
    """Whether a tensor is of an adapted module, and neither its weight nor its bias."""
    module, _, part = name.rpartition(".")
    return module in adapted and part not in ("weight", "bias")


def _pairs(
    raw: Mapping[str, Any],
    factors: Mapping[tuple[str, int], Mapping[str, Stored]],
    folder: Path,
    others: Mapping[str, str],
) -> dict[str, list[Pair]]:
    """A and B of each module, with its scale; others: the modules' other names."""
    found: dict[str, list[tuple[Stored, Stored, Mapping[str, Stored], bool]]] = {}
    use_dora = raw.get("use_dora", READ["use_dora"])
    for (module, _), parts in sorted(factors.items(), key=lambda item: -item[0][1]):  # the innermost has most wrappers
        is_look_up = "embedding_A" in parts
        names = ("embedding_A", "embedding_B") if is_look_up else ("A", "B")
        for name in names:
            if name not in parts:
                raise ValueError(f"{folder / WEIGHTS}: {shown(module)}: the tensor lora_{name} is missing")
        A, B = (parts[name] for name in names)
        if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1]:
            raise ValueError(f"{A}: expected A (r, in) and B (out, r), got A {A.shape} and B {B.shape}")
        if use_dora is True and "m" not in parts:
            where = folder / WEIGHTS
            raise ValueError(f"{where}: {shown(module)}: use_dora is true, and lora_magnitude_vector is missing")
        if use_dora is False and "m" in parts:
            raise ValueError(f"{parts['m']}: a magnitude of DoRA's, and use_dora is not true in {CONFIG}")
        found.setdefault(module, []).append((A, B, parts, is_look_up))
    targets = _targets(raw, str(folder / CONFIG))
    known_as = {module: _parameters(targets, module, others[module], len(several)) for module, several in found.items()}
    aliases = {name: others[m] + name[len(m) :] for m, several in known_as.items() for name in several}
    ranks: dict[str, list[int]] = {}
    for module, several in found.items():
        for name, (A, *_) in zip(known_as[module], several, strict=True):
            ranks.setdefault(name, []).append(A.shape[0])
    scales = _scales(raw, ranks, aliases, str(folder / CONFIG))
    return {
        module: [
            _pair(A, B, parts, *scales[name], is_look_up)
            for name, (A, B, parts, is_look_up) in zip(known_as[module], several, strict=True)
        ]
        for module, several in found.items()
    }


def _pair(A: Stored, B: Stored, parts: Mapping[str, Stored], s: float, r: int, alpha: float, is_look_up: bool) -> Pair:
    """One module's; parts: its tensors by what they are."""
    bias, m = parts.get("bias"), parts.get("m")
    if m is None:
        return Pair(A.read_finite(), B.read_finite(), s, r, alpha, bias and bias.read_finite(), is_look_up)
    if bias is not None or A.shape[0] != r:
        raise ValueError(f"{m}: DoRA with {'lora_bias' if bias else 'experts'} is not supported, in PEFT neither")
    return Pair(A.read_finite(), B.read_finite(), s, r, alpha, None, is_look_up, _magnitude(m, B.shape))


def _magnitude(m: Stored, shape: tuple[int, ...]) -> Array:
    """DoRA's m (out,); shape: B's (out, r)."""
    if m.shape != shape[:1]:
        raise ValueError(f"{m}: expected a magnitude of each row of B {shape}, ({shape[0]},), got {m.shape}")
    values = m.read_finite()
    if not values.all():
        raise ValueError(
            f"{m}: expected magnitudes other than 0, got {np.count_nonzero(values == 0)} of 0: such a row of the "
            "weight would be 0, or in PEFT NaN"
        )
    return values


def _targets(raw: Mapping[str, Any], where: str) -> dict[str, set[str]]:
    """The parameters that are targeted, by what their module ends in; "" where the parameter is named alone."""
    targets = raw.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{where}: target_parameters: expected a list of names, got {targets!r:.60}")
    found: dict[str, set[str]] = {}
    for target in targets:
        owner, _, name = target.rpartition(".")
        found.setdefault(owner, set()).add(name)
    return found


def _parameters(targets: Mapping[str, Collection[str]], module: str, other: str, n: int) -> list[str]:
    """The names by which PEFT's patterns know a module's n pairs, the innermost first: its own, or its parameters'.

    other: what the configuration may call it besides.

    PEFT wraps the parameters of a module in the order in which it has them. One part of a name fits experts alone here:
    an adapter does not tell which other modules have such a parameter.
    """
    owners = [*dict.fromkeys((*endings(module), *endings(other))), *([""] if module.endswith("experts") else [])]
    fitting = [targets[owner] for owner in owners if owner in targets]
    if sum(map(len, fitting)) > len(owners) * n:  # more names than pairs, whatever they are
        return [module] * n
    own = set[str]().union(*fitting)
    names = [*(name for name in PARAMETERS if name in own), *sorted(own.difference(PARAMETERS))]
    return [f"{module}.{name}" for name in names] if len(names) == n else [module] * n


def _others(modules: Collection[str], known: Collection[str]) -> dict[str, str]:
    """What the configuration may call each module besides: its name among `known`, if a prefix alone is off."""
    unknown = [module for module in modules if module not in known] if known else []
    change = change_of_prefix(unknown, known) if unknown else None
    return {module: module if module in known or change is None else str(moved(module, *change)) for module in modules}


def _scales(
    raw: Mapping[str, Any], ranks: Mapping[str, list[int]], aliases: Mapping[str, str], where: str
) -> dict[str, tuple[float, int, float]]:
    """s, r and alpha of each pair (L1). A ValueError if its tensors have another rank than the configuration.

    Several experts of one parameter have a multiple of it. aliases: each pair's other name, by which the patterns know
    it if they do not fit its own.
    """
    fields = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "bias": "bias", "rslora": "use_rslora"}
    fields["dora"] = "use_dora"
    config = from_fields(LoRAConfig, {ours: raw.get(key, READ[key]) for ours, key in fields.items()}, where)
    fits = expressions_in(raw, PATTERNS, [*dict.fromkeys((*aliases, *aliases.values()))], where)
    said, alphas = (
        _resolved(raw, key, aliases, default, fits, where)
        for key, default in zip(PATTERNS, (config.r, config.alpha), strict=True)
    )
    scales = {}
    for name, found in ranks.items():
        r, has_experts = said[name], bool(raw.get("target_parameters"))
        if type(r) is not int or r < 1 or any(rank != r and not (has_experts and rank % r == 0) for rank in found):
            raise ValueError(f"{where}: {shown(name)}: expected rank {found[0]}, as its tensors have, got {r!r:.60}")
        scales[name] = (alphas[name] / (math.sqrt(r) if config.rslora else r), r, alphas[name])
    return scales


def _resolved(
    raw: Mapping[str, Any], key: str, aliases: Mapping[str, str], default: float, fits: Fits, where: str
) -> dict[str, Any]:
    """What a pattern gives each pair, by its own name, or by its other where the pattern does not fit."""
    own = {name: name for name in aliases}
    try:
        return resolved(raw, key, own, default, fits, where)
    except ValueError:
        if own == aliases:
            raise
        return resolved(raw, key, aliases, default, fits, where)


def _token_rows(
    raw: Mapping[str, Any], tokens: Mapping[str, Array], folder: Path, others: Mapping[str, str]
) -> dict[str, tuple[list[int], Array]]:
    """The rows of each table that are trained; others: their modules' other names."""
    said, where = raw.get("trainable_token_indices"), f"{folder / CONFIG}: trainable_token_indices"
    rows = {}
    for module, values in tokens.items():
        numbers = said
        if isinstance(said, dict):
            ends = dict.fromkeys((*endings(module), *endings(others[module])))
            numbers = next((said[name] for name in said if name in ends), None)
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{where}: expected the tokens of {shown(module)}, got {numbers!r:.60}")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{where}: expected each token of {shown(module)} once, got {numbers!r:.60}")
        if values.ndim != 2 or len(values) != len(numbers):
            raise ValueError(f"{where}: expected {values.shape[:1]} tokens of {shown(module)}, got {len(numbers)}")
        rows[module] = numbers, values
    return rows


def _is_mlx(raw: Mapping[str, Any]) -> bool:
    return "fine_tune_type" in raw


def _read_mlx(folder: Path, raw: Mapping[str, Any]) -> Contents:
    """mlx-lm's adapter: lora_a (in, r) and lora_b (r, out) of each module, with DoRA m (out,), and one scale s."""
    where, kind = str(folder / CONFIG), raw["fine_tune_type"]
    if kind not in ("lora", "dora"):
        raise ValueError(f"{where}: fine_tune_type: expected 'lora' or 'dora', got {kind!r:.60}")
    parameters = raw.get("lora_parameters")
    s = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(s, (int, float)) or isinstance(s, bool):
        raise ValueError(f"{where}: lora_parameters: expected an object with scale, a number, got {parameters!r:.60}")
    tensors = adapter_tensors(folder, raw)
    pairs, whole = {}, {}
    for key, stored in tensors.items():
        module, _, part = key.rpartition(".")
        if part == "lora_a" and f"{module}.lora_b" in tensors:
            A, B = stored.read_finite().T, tensors[f"{module}.lora_b"].read_finite().T
            if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1]:
                raise ValueError(f"{stored}: expected lora_a (in, r) and lora_b (r, out), got {A.shape[::-1]}")
            m = tensors.get(f"{module}.m")
            if (m is None) == (kind == "dora"):
                got = "none" if m is None else shown(m.name)
                raise ValueError(f"{stored}: fine_tune_type {kind}: expected {'m' if m is None else 'no m'}, got {got}")
            magnitude = None if m is None else _magnitude(m, B.shape)
            pairs[module] = [Pair(A, B, float(s), len(A), m=magnitude)]
        elif part == "m" and f"{module}.lora_a" in tensors:
            continue
        elif part in ("lora_a", "lora_b"):
            if f"{module}.lora_a" not in tensors or f"{module}.lora_b" not in tensors:
                raise ValueError(f"{stored}: expected lora_a and lora_b of the module, got one of them")
        else:
            whole[key] = stored.read_finite()
    if not pairs:
        raise ValueError(f"{folder / MLX_WEIGHTS}: expected lora_a and lora_b of each module, got none")
    return Contents(folder, {**raw, "use_dora": kind == "dora"}, pairs, whole, {}, {})
