"""The clause on file formats says what is written: every tensor and key of an adapter's folder."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from strategies import trained_adapter

import lora_np as ln
from lora_np.formats.adapters.peft_config import FREE, OFF, READ
from lora_np.formats.files.safetensors_file import open_tensors
from lora_np.spec import files

SMALL = {"n_layer": 2, "n_head": 2, "d_model": 8, "d_ff": 16, "vocab_size": 11, "n_positions": 16}
LINEARS = ("q", "k", "v", "o", "up", "down")
MODELS = {
    "GPT-2": (replace(ln.PRESETS["gpt2"], **SMALL), (*LINEARS, "embed")),
    "BERT": (replace(ln.PRESETS["bert-base"], **SMALL, head="classify", n_labels=3), (*LINEARS, "embed", "head")),
    "RoBERTa": (replace(ln.PRESETS["roberta-base"], **SMALL, head="classify", n_labels=3), (*LINEARS, "embed")),
    "Llama": (replace(ln.PRESETS["smollm2-135m"], **SMALL, n_kv_head=1), (*LINEARS, "gate", "embed")),
}  # fmt: skip


def table(title):
    """The rows of a section's first table, as cells."""
    text = dict(files.sections())[title]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return rows[:1] + rows[2:]


@pytest.mark.parametrize("family", MODELS)
def test_every_tensor_of_a_folder_has_a_name_of_the_tables(family, tmp_path):
    config, targets = MODELS[family]
    model = ln.Model(config, ln.init_weights(config, seed=0))
    adapter = trained_adapter(model, ln.LoRAConfig(r=2, alpha=3, targets=targets), seed=0)
    ln.save_adapter(tmp_path / "adapter", adapter, model)
    head, *rows = table("Names of modules")
    column = head.index(family)
    modules = {m for row in rows if len(row) > column for m in re.findall(r"`([^`]+)`", row[column])} - {"attn.qkv"}
    ends = [
        re.fullmatch(r"`base_model\.model\.MODULE(\.\S+)`.*", row[0])[1] for row in table("PEFT's folder: tensors")[1:]
    ]
    with open_tensors(tmp_path / "adapter" / "adapter_model.safetensors") as file:
        for key in file.shapes:
            found = [
                module
                for module in modules
                for end in ends
                if re.sub(r"\.\d+\.", ".i.", key) == f"base_model.model.{module}{end}"
            ]
            assert len(found) == 1, key


def test_shapes_are_those_that_the_tables_say(tmp_path):
    """Of a linear and of a look-up, by the letters of the clause."""
    config, _ = MODELS["Llama"]
    model = ln.Model(config, ln.init_weights(config, seed=0))
    adapter = trained_adapter(model, ln.LoRAConfig(r=2, targets=("up", "embed")), seed=0)
    ln.save_adapter(tmp_path / "adapter", adapter, model)
    sizes = {"r": 2, "V": 11, "D": 8, "in": 8, "out": 16}
    said = {}
    for key, what in table("PEFT's folder: tensors")[1:5]:
        letters = re.search(r"\(([^)]+)\)", what)[1].replace("$", "").split(", ")
        said[re.search(r"lora_\w+", key)[0]] = tuple(sizes[letter] for letter in letters)
    with open_tensors(tmp_path / "adapter" / "adapter_model.safetensors") as file:
        for key, shape in file.shapes.items():
            assert shape == said[re.search(r"lora_\w+", key)[0]], key


def test_every_key_of_the_configuration_is_explained(tmp_path):
    config, targets = MODELS["GPT-2"]
    model = ln.Model(config, ln.init_weights(config, seed=0))
    ln.save_adapter(tmp_path / "adapter", trained_adapter(model, ln.LoRAConfig(targets=targets), seed=0), model)
    rows = table("PEFT's folder: adapter_config.json")
    keys = [row[0].strip("`") for row in rows[1:]]
    assert keys == ["peft_type", *READ]
    text = dict(files.sections())["PEFT's folder: adapter_config.json"]
    for key in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()):
        assert f"`{key}`" in text
    assert all(f"`{key}`" in text for key in (*FREE, *OFF))
    assert "{" not in "".join(text for _, text in files.sections()).replace("`{}`", "").replace("\\mathrm{", "")


def test_separate_updates_of_gpt2_are_in_blocks_with_the_alpha_that_is_said(tmp_path):
    config, _ = MODELS["GPT-2"]
    model = ln.Model(config, ln.init_weights(config, seed=0))
    adapter = trained_adapter(model, ln.LoRAConfig(r=2, alpha=3, targets=("q", "v")), seed=0)
    ln.save_adapter(tmp_path / "adapter", adapter, model)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["use_rslora"], said["fan_in_fan_out"]) == (4, 3 / 2 * 4, False, True)
    D = config.d_model
    params = {name: ln.asnumpy(p) for name, p in adapter.params.items()}
    with open_tensors(tmp_path / "adapter" / "adapter_model.safetensors") as file:
        stem = "base_model.model.transformer.h.0.attn.c_attn.lora_"
        A, B = (file.read_as(f"{stem}{factor}.weight", np.dtype("float32")) for factor in "AB")
    q, v = (params[f"layers.0.attn.{m}.B"] @ params[f"layers.0.attn.{m}.A"] for m in "qv")
    np.testing.assert_array_equal(B @ A, np.concatenate([q, np.zeros((D, D)), v]))
