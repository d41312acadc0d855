"""The clause on file formats, files.md, with the tables that follow from the source that reads and writes the files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..formats.adapters.peft_config import FREE, OFF, READ
from ..formats.models.families import FAMILIES
from ..formats.models.family import Family
from ..formats.models.names import module_of

SHOWN = {"GPT-2": "gpt2", "BERT": "bert", "RoBERTa": "roberta", "Llama": "llama"}
ADAPTED = ("embed.tokens", *(f"layers.{{i}}.{part}" for part in (
    "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.o", "mlp.up", "mlp.gate", "mlp.down")))  # fmt: skip
TYPE = "peft_type"
MEANING: Mapping[str, str] = {
    "r": "the rank",
    "lora_alpha": "$\\alpha$",
    "lora_dropout": "dropout's probability on $x$ in the low-rank branch; no part of the update",
    "bias": "which biases are trained, and stand in the file: `none`, `all`, `lora_only` (those of adapted modules)",
    "use_rslora": "true: $s = \\alpha / \\sqrt r$",
    "use_dora": "true: DoRA (L10), the magnitudes $m$ beside $A$ and $B$",
    "rank_pattern": "ranks that differ, by patterns of modules' names",
    "alpha_pattern": "$\\alpha$ that differ, likewise",
    "target_modules": "which modules are adapted: a list of names, each the full one or what it ends in behind a dot; "
    "or a text, a regular expression for the full name; or `all-linear`",
    "exclude_modules": "of these, those that are not, in the same forms",
    "layers_to_transform": "the numbers of the layers that are adapted; absent: all",
    "layers_pattern": "the name of the list of layers, before the number",
    "modules_to_save": "modules that are trained whole: the head",
    "init_lora_weights": "the start of $A$ and $B$ (L3). With starts that change the base, as "
    "PiSSA, OLoRA, CorDA and LoftQ do, the file is no update of the base that it names",
}


def sections() -> list[tuple[str, str]]:
    """Each section's title and Markdown; the first, without a title, is what stands before them."""
    text = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    text = text.partition("-->")[2]
    made = {
        "{keys}": _keys(),
        "{free}": _listed([key for key in FREE if key != TYPE]),
        "{off}": _listed(OFF),
        "{families}": _families(),
    }
    for name, table in made.items():
        text = text.replace(name, table)
    first, *rest = text.split("\n## ")
    return [("", first.strip()), *((title, body.strip()) for title, _, body in (part.partition("\n") for part in rest))]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listed(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _keys() -> str:
    """adapter_config.json's keys that say what the update is."""
    rows = [[f"`{key}`", f"`{json.dumps(value)}`", MEANING[key]] for key, value in READ.items()]
    return _table(["key", "if absent", "what it says"], [[f"`{TYPE}`", "must be `LORA`", "the method"], *rows])


def _families() -> str:
    """The full names of the modules that may be adapted, by family."""
    families = [FAMILIES[name] for name in SHOWN.values()]
    rows = [[f"`{_i(ours)}`", *(_module(family, ours) for family in families)] for ours in ADAPTED]
    heads = [", ".join(f"`{_i(of['head'])}`" for of in _different(family)) for family in families]
    return _table(["here", *SHOWN], [*rows, ["`head`", *heads]])


def _module(family: Family, ours: str) -> str:
    theirs, module = family.modules.get(ours), module_of(ours, family)
    fused = f"in `{module.removeprefix('layers.{i}.')}`" if module != ours else ""
    return f"`{_i(f'{family.trunk}.{theirs}')}`" if theirs else fused


def _different(family: Family) -> list[Mapping[str, str]]:
    """The heads that differ in their names: of a language model, a classifier, a tagger."""
    return list({of["head"]: of for of in family.heads.values()}.values())


def _i(name: str) -> str:
    return name.replace("{i}", "i")
