"""adapter_config.json: PEFT's description of an adapter, written from ours and read into it.

Every key is in one of the tables below. A key that is not, or one that asks for what is not supported, is refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ...adapter import TARGETS, LoRAConfig, layer_of, target_of, trained_whole
from ...model import Config
from ..files.expressions import Expression, fitting
from ..files.messages import nearest, shown
from ..models.names import family_of, module_names, module_shapes, saved_whole, short_names
from .peft_tensors import grouped

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What says how the adapter is built: read, and written. The values that stand for a key that is absent.
READ: Mapping[str, Any] = {
    "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "rank_pattern": {},
    "alpha_pattern": {}, "target_modules": None, "exclude_modules": None, "layers_to_transform": None,
    "layers_pattern": None, "modules_to_save": None, "init_lora_weights": True, "use_dora": False,
}  # fmt: skip
# What is supported only when it is off, and the values that mean so.
OFF: Mapping[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,), "arrow_config": (None,), "corda_config": (None,), "enable_lora": (None,),
    "ensure_weight_tying": (False, None), "eva_config": (None,), "kasa_config": (None,), "layer_replication": (None,),
    "loftq_config": (None, {}), "lora_bias": (False,), "lora_ga_config": (None,), "megatron_config": (None,),
    "merge_weights": (False,), "monteclora_config": (None,), "target_parameters": (None, []),
    "path_initial_model_for_weight_conversion": (None,), "trainable_token_indices": (None,),
    "use_bdlora": (None, False), "use_qalora": (False,), "velora_config": (None,),
}  # fmt: skip
# What has no bearing on the update. (fan_in_fan_out says how the base is stored, which the base itself knows.)
FREE = (
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "task_type",
)  # fmt: skip
# Of these, what an adapter that is merged by its modules' names may have on.
BY_NAME = ("ensure_weight_tying", "eva_config", "lora_bias", "target_parameters", "trainable_token_indices")
MERGE = "lora-np merge takes it"
# What is known by another name than its key.
METHODS = {
    "alora_invocation_tokens": "aLoRA", "use_bdlora": "BD-LoRA", "use_qalora": "QALoRA",
    "arrow_config": "Arrow", "corda_config": "CorDA", "loftq_config": "LoftQ", "kasa_config": "KaSA",
    "path_initial_model_for_weight_conversion": "a start that changes the base",
    "lora_ga_config": "LoRA-GA", "velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA",
}  # fmt: skip
# Starts that leave the base as it is, and by their first letters those that change the base's own weights.
STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
CHANGING = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}
NEUTRAL: tuple[Any, ...] = (None, False, "", (), [], {})  # values of a key that is not known with which it says nothing
# PEFT adds these itself, for whichever of them the model has.
AUTO_SAVED = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}
ALL_LINEAR = "all-linear"
# The keys that may hold regular expressions: one that fits full names, or patterns that fit their ends.
MODULES, PATTERNS = ("target_modules", "exclude_modules"), ("rank_pattern", "alpha_pattern")
Fits = Mapping[Expression, Collection[str]]
SAME = 2**-50  # scales are equal that differ by no more than alpha / sqrt(r) may be off


class Selection(NamedTuple):
    """Which modules are adapted, as PEFT's configuration says it."""

    target_modules: Collection[str]
    layers_to_transform: Collection[int] | None = None
    layers_pattern: Collection[str] = ()
    exclude_modules: Collection[str] = ()

    def takes(self, name: str) -> bool:
        """Whether PEFT would adapt the module of this full name."""
        if ends_in(name, self.exclude_modules):
            return False
        if name in self.target_modules or not self.layers_to_transform:
            return ends_in(name, self.target_modules)
        return ends_in(name, self.target_modules) and self._layer(name) in self.layers_to_transform

    def _layer(self, name: str) -> int | None:
        """The layer of a module: the first number in its name that follows a name of layers_pattern, or any name."""
        parts = name.split(".")
        for place in range(1, len(parts) - 1):
            # Without a pattern, PEFT wants one more name before that of the list of layers.
            fits = parts[place - 1] in self.layers_pattern if self.layers_pattern else place > 1
            if fits and parts[place].isdecimal():
                return int(parts[place])
        return None


def endings(name: str) -> list[str]:
    """What a dotted name ends in: itself, and what stands behind each of its dots."""
    return [name[at:] for at in (0, *(i for i, c in enumerate(name, 1) if c == "."))]


def ends_in(name: str, known: Collection[str]) -> bool:
    """Whether a name is one of these or ends in one behind a dot; many of them come as a set, or a dict."""
    return any(ending in known for ending in endings(name))


# --- Writing -------------------------------------------------------------------------------------------------------


def write_config(config: Config, lora_config: LoRAConfig, matrices: Collection[str]) -> dict[str, Any]:
    """adapter_config.json for an adapter of these matrices. A ValueError if scales differ within one module of PEFT's.

    A module that holds several of our matrices has their summed rank R, and alpha = s R.
    """
    groups = grouped(config, matrices)
    full, short = module_names(config), short_names(config)
    fuses = any(parts != [module] for module, parts in groups.items())
    rslora = lora_config.rslora and not fuses
    ranks, alphas = {}, {}
    for module, parts in groups.items():
        ranks[module] = sum(lora_config.rank(part) for part in parts)
        alphas[module] = _alpha(lora_config, module, parts, as_it_is=rslora == lora_config.rslora)
    r, alpha = most_common(ranks.values(), lora_config.r), most_common(alphas.values(), lora_config.alpha)
    saved = trained_whole(config, lora_config, matrices) if lora_config.train_head else []
    heads = [saved_whole(config, stem) for stem in ("pooler", "head") if f"{stem}.weight" in saved]
    return {
        "peft_type": "LORA",
        "task_type": _task(config, lora_config),
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": lora_config.dropout,
        "bias": lora_config.bias,
        "use_rslora": rslora,
        "rank_pattern": _patterns(ranks, r, full, short),
        "alpha_pattern": _patterns(alphas, alpha, full, short),
        **{key: list(value) if value else None for key, value in _select(config, groups)._asdict().items()},
        "modules_to_save": list(dict.fromkeys(heads)) or None,
        "init_lora_weights": True if lora_config.init == "uniform" else "gaussian",
        "fan_in_fan_out": family_of(config).fan_in_fan_out,
        "use_dora": lora_config.dora,
    }


def _alpha(lora_config: LoRAConfig, module: str, parts: list[str], *, as_it_is: bool) -> float:
    """PEFT's alpha of a module."""
    scales = {part: lora_config.scale(part) for part in parts}
    if not all(math.isclose(s, scales[parts[0]], rel_tol=SAME) for s in scales.values()):
        raise ValueError(
            f"save_adapter: {module}: PEFT gives one scale to q, k and v of a fused matrix, but here they differ: "
            + ", ".join(f"s = {s!r} for {part}" for part, s in scales.items())
        )
    if as_it_is and len(parts) == 1:
        patterns = lora_config.alpha_pattern
        return _whole_number(patterns.get(parts[0], patterns.get(target_of(parts[0]), lora_config.alpha)))
    return _whole_number(scales[parts[0]] * sum(lora_config.rank(part) for part in parts))


def _whole_number(value: float) -> float:
    """An integer where the value is one, as PEFT writes lora_alpha."""
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else float(value)


def most_common(values: Iterable[Any], otherwise: Any) -> Any:
    """The value that occurs most often, the first of several."""
    return next((value for value, _ in Counter(values).most_common(1)), otherwise)


def _patterns(values: Mapping[str, Any], default: Any, full: Mapping[str, str], short: Mapping[str, str]) -> Any:
    """What differs from the default: by a short name where all that end in it agree, else by full names."""
    result: dict[str, Any] = {}
    for ending in dict.fromkeys(short[name] for name in values):
        group = {name: value for name, value in values.items() if short[name] == ending}
        others = {value for name, value in values.items() if name not in group and ends_in(full[name], [ending])}
        if len({*group.values(), *others}) == 1:
            value = next(iter(group.values()))
            result |= {ending: value} if value != default else {}
        else:
            result |= {full[name]: value for name, value in group.items() if value != default}
    return result


def _select(config: Config, groups: Collection[str]) -> Selection:
    """The shortest description that takes exactly these modules."""
    full, short = module_names(config), short_names(config)
    wanted = {full[name] for name in groups}
    endings = list(dict.fromkeys(short[name] for name in groups))
    numbers = {name: layer_of(name) for name in groups}
    layers = dict.fromkeys(sorted({n for n in numbers.values() if n is not None}))
    lists = [full[name].split(".")[0] for name, n in numbers.items() if n is not None]
    for selection in (Selection(endings), Selection(endings, layers), Selection(endings, layers, lists[:1])):
        if {name for name in _adaptable(config).values() if selection.takes(name)} == wanted:
            return selection
    return Selection([full[name] for name in groups])


def _adaptable(config: Config) -> dict[str, str]:
    """Our name -> the full name of each module that may be adapted."""
    full = module_names(config)
    return {name: full[name] for name in module_shapes(config) if name in full}


def _task(config: Config, lora_config: LoRAConfig) -> str | None:
    """PEFT's task type. A classifier's makes PEFT train the head whole, so it is left out where that is not so."""
    if config.head == "lm" and config.causal:
        return "SEQ_2_SEQ_LM" if config.n_encoder else "CAUSAL_LM"
    return {"classify": "SEQ_CLS", "tag": "TOKEN_CLS"}.get(config.head) if lora_config.train_head else None


# --- Reading -------------------------------------------------------------------------------------------------------


def check_keys(raw: Mapping[str, Any], where: str, on: Collection[str] = ()) -> None:
    """A ValueError that names a key of the file which is not known, or asks for what is not supported.

    on: keys of OFF that may be on.
    """
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type: expected 'LORA', got {raw.get('peft_type')!r:.60}")
    _check_start(raw, where)
    for key, value in raw.items():
        if key not in READ and key not in OFF and key not in FREE and not _is_one_of(value, NEUTRAL):
            raise ValueError(f"{where}: {shown(key)}: not known, so not supported (value {value!r:.60})")
        if key in OFF and key not in on and not _is_one_of(value, OFF[key]):
            method = f"{METHODS[key]}: " if key in METHODS else ""
            way = f"; {MERGE}" if key in BY_NAME else ""
            raise ValueError(f"{where}: {key}: not supported ({method}expected it to be off, got {value!r:.60}){way}")


def _check_start(raw: Mapping[str, Any], where: str) -> None:
    """A ValueError for a start that changes the base: its A and B say only what is added to another base."""
    start = raw.get("init_lora_weights", True)
    if _is_one_of(start, STARTS):
        return
    name = next((CHANGING[key] for key in CHANGING if isinstance(start, str) and start.lower().startswith(key)), None)
    if name is None:
        raise ValueError(f"{where}: init_lora_weights: {start!r:.60} is not supported: such starts change the base")
    raise ValueError(
        f"{where}: init_lora_weights: {start!r:.60}: {name} is not supported: it changes the base, so A and B are no "
        "update of the model that it was made from; have PEFT convert it: save_pretrained(..., "
        "path_initial_model_for_weight_conversion=...)"
    )


def _is_one_of(value: Any, known: Collection[Any]) -> bool:
    """Whether a value is one of these, and of its type: 0 is not False."""
    return any(value is one or (value == one and type(value) is type(one)) for one in known)


def check_same(raw: Mapping[str, Any], written: Mapping[str, Any], where: str) -> None:
    """A ValueError unless the file says what it said when it was written with the tensors beside it."""
    for key, default in READ.items():
        if raw.get(key, default) != written.get(key, default):
            raise ValueError(
                f"{where}: {key}: the tensors beside it were saved with {written.get(key, default)!r:.60}, "
                f"got {raw.get(key, default)!r:.60}"
            )


def described(
    config: Config, ranks: Mapping[str, int], alphas: Mapping[str, float], r: Any, alpha: Any
) -> dict[str, Any]:
    """LoRAConfig's fields for matrices of these ranks and alphas, r and alpha those that most have."""
    short, ours = {name: target_of(name) for name in ranks}, {name: name for name in ranks}
    return {
        "r": r,
        "alpha": alpha,
        "targets": [target for target in TARGETS if target in short.values()],
        "rank_pattern": _patterns(ranks, r, ours, short),
        "alpha_pattern": _patterns(alphas, alpha, ours, short),
        "layers": _common_layers(config, ranks),
    }


def expressions_in(raw: Mapping[str, Any], keys: Collection[str], names: Sequence[str], where: str) -> Fits:
    """The names that each regular expression under these keys fits."""
    found = []
    for key in keys:
        value = raw.get(key)
        if isinstance(value, str) and key in MODULES and value.lower() != ALL_LINEAR:
            found.append(Expression(key, value))
        if isinstance(value, dict) and key in PATTERNS:
            found += [Expression(key, text, at_end=True) for text in value if not _is_dotted(text.removeprefix("^"))]
    return fitting(found, names, where)


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() or part.isdecimal() for part in name.split("."))


def resolved(
    raw: Mapping[str, Any], key: str, names: Mapping[str, str], default: Any, fits: Fits, where: str
) -> dict[str, Any]:
    """The value of each module under a pattern: the first that fits, as in PEFT. Every pattern must fit one.

    fits: the names, these and maybe others, that each expression among the patterns fits.
    """
    patterns = raw.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{where}: {key}: expected an object, got {type(patterns).__name__}")
    for what, number in [(key.replace("pattern", "default"), default), *patterns.items()]:
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            raise ValueError(f"{where}: {key}: {shown(what)}: expected a number, got {number!r:.60}")
    given, ending_in = set(names.values()), {pattern: set[str]() for pattern in patterns}
    for name in given:
        for ending in (f"^{name}", *endings(name)):  # a leading ^ asks for the full name
            if ending in patterns:
                ending_in[ending].add(name)
    values: dict[str, Any] = {}
    for pattern, value in patterns.items():
        taken = given.intersection(fits.get(Expression(key, pattern, at_end=True), ending_in[pattern]))
        if not taken:
            ends = {name.rpartition(".")[2]: None for name in given} | dict.fromkeys(sorted(given))
            raise ValueError(f"{where}: {key}: {pattern!r:.60}: no adapted module fits{nearest(pattern, ends)}")
        values |= {name: value for name in taken if name not in values}
    return {ours: values.get(theirs, default) for ours, theirs in names.items()}


def _common_layers(config: Config, names: Iterable[str]) -> list[int] | None:
    """The layers adapted, if they are the same for every target and not all; else None."""
    layers: dict[str, set[int]] = {}
    for name in names:
        layer = layer_of(name)
        if layer is not None:
            layers.setdefault(target_of(name), set()).add(layer)
    first = next(iter(layers.values()), set())
    alike = all(value == first for value in layers.values())
    return sorted(first) if alike and 0 < len(first) < max(config.n_layer, config.n_encoder) else None
