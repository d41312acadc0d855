"""The names that transformers gives modules in memory, where its files have others.

Source: transformers 5, conversion_mapping. PEFT's adapters have the names in memory, of the version that made them.
"""

from __future__ import annotations

from collections.abc import Iterator

IMAGES = {
    "aria", "aya_vision", "gemma3", "got_ocr2", "internvl", "llava", "llava_next", "llava_next_video",
    "llava_onevision", "mistral3", "paligemma", "vipllava",
}  # fmt: skip
# Of each of these types of models: dotted names in memory, and those in files.
RENAMED = (
    (IMAGES, (("model.vision_tower", "vision_tower.vision_model"),)),
    (
        IMAGES,
        (
            ("model.language_model", "language_model.model"),
            ("lm_head", "language_model.lm_head"),
            ("model.vision_tower", "vision_tower"),
            ("model.multi_modal_projector", "multi_modal_projector"),
        ),
    ),
    ({"qwen2_vl", "qwen2_5_vl"}, (("model.language_model", "model"), ("model.visual", "visual"))),
    ({"gpt_neox"}, (("lm_head", "embed_out"),)),
    ({"mixtral", "minimax"}, (("mlp", "block_sparse_moe"),)),
    ({"phimoe"}, (("mlp.router", "block_sparse_moe.gate"), ("mlp", "block_sparse_moe"))),
    (
        {"vit", "deit", "beit", "vit_mae", "vit_msn", "audio-spectrogram-transformer"},
        (
            ("layers", "encoder.layer"),
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ),
    ),
    (
        {"dinov2", "dinov2_with_registers"},
        (
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
        ),
    ),
)

DOT = "\0"  # in what a name is replaced by, which no other pair replaces again


def in_memory(name: str, model_type: str) -> str:
    """The name in memory of a module or tensor of this name in files."""
    found = in_files(name, model_type, back=True)
    return next((one for one in found if name in in_files(one, model_type)), name)


def in_files(name: str, model_type: str, *, back: bool = False) -> Iterator[str]:
    """The names that a module or tensor of this name in memory may have in files; none where they are the same.

    back: the other way round.
    """
    for types, pairs in RENAMED:
        if model_type in types:
            found = f".{name}."
            for pair in pairs:
                one, other = pair[::-1] if back else pair
                found = found.replace(f".{one}.", f".{other.replace('.', DOT)}.", 1)
            found = found.replace(DOT, ".")
            if found != f".{name}.":
                yield found[1:-1]
