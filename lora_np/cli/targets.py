"""Names of targets as people write them: with commas, all of them in a word, or as a family of models calls its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..adapter import TARGETS, layer_of, target_of
from ..formats.adapters.peft_config import ends_in
from ..formats.files.messages import nearest
from ..formats.models.family import Family
from ..formats.models.names import FUSED, NAMED, family_of
from ..model import Config

ALL = ("all", "all-linear")
OTHERS = {  # of families whose models are not run here, and what has one meaning in most
    "Wqkv": "qkv", "query_key_value": "qkv", "dense_h_to_4h": "up", "dense_4h_to_h": "down", "embed_out": "head",
    "embed_in": "embed", "out_proj": "o",
}  # fmt: skip


def targets_of(words: Sequence[str], config: Config) -> tuple[str, ...]:
    """The targets that the words name, each once.

    all (or PEFT's all-linear): every matrix of the model's layers, neither the look-up nor the head. Another's name
    (q_proj, c_attn) is what it is in the model's own family, else in others. A ValueError says which names are near.
    """
    names = [name for word in words for name in word.split(",") if name]
    if not names:
        raise ValueError(f"--targets: expected names of {' '.join(TARGETS)}, or all, got none")
    return tuple(dict.fromkeys(target for name in names for target in _meant(name, config)))


def _meant(name: str, config: Config) -> Iterable[str]:
    """The targets that one name stands for."""
    if name in TARGETS:
        return [name]
    if name.lower() in ALL:
        return dict.fromkeys(target_of(matrix) for matrix in config.matrix_shapes() if layer_of(matrix) is not None)
    own, others = _called(name, [family_of(config)]), _called(name, NAMED)
    found = own or OTHERS.get(name, "").split() or others
    if not own and len(found) != 1:  # of another family's, only what means one thing
        theirs = {module.rpartition(".")[2] for family in NAMED for module, _ in _modules(family)}
        raise ValueError(
            f"--targets: {name!r:.60}: expected names of {' '.join(TARGETS)}, or all, or a family's own "
            f"(q_proj, c_attn){nearest(name, [*TARGETS, *ALL, *OTHERS, *sorted(theirs)])}"
        )
    return found


def _called(name: str, families: Iterable[Family]) -> list[str]:
    """The targets whose modules' names end in this one, as PEFT reads target_modules."""
    found = (target for family in families for module, target in _modules(family) if ends_in(module, [name]))
    return list(dict.fromkeys(found))


def _modules(family: Family) -> Iterator[tuple[str, str]]:
    """What a family calls each module that can be a target, and the target."""
    for names in (family.modules, *family.heads.values()):
        for ours, theirs in names.items():
            for part in FUSED["mlp.gate_up"] if ours.endswith("mlp.gate_up") else [ours]:
                if target_of(part) in TARGETS:
                    yield theirs, target_of(part)
