"""Adapters of many families, merged by their modules' names, beside PEFT's own merge; and opened by transformers."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_np import cli
from lora_np.formats.files.rounding import rounded, ulps_apart
from lora_np.formats.merged.folder import merge_folder

families = pytest.importorskip("families", reason="the extra peers")
torch, transformers = families.torch, families.T
pytestmark = families.QUIET
WEIGHTS = "model.safetensors"
AT_LEAST = {"albert": 1, "gemma3": 1}  # tensors: the one shares its layers, of the other one is adapted


def folders(home, family, dtype):
    """A base, PEFT's adapter on it, PEFT's merge of both in float64, and our own folder."""
    settings = families.FAMILIES[family][3]
    model = families.make(family, dtype, seed=1)
    model.save_pretrained(str(home / "base"))
    module = families.adapted(model, settings, dtype, seed=2)
    module.save_pretrained(str(home / "ad"))
    merged = module.to(torch.float64).merge_and_unload()
    merged.save_pretrained(str(home / "theirs"))
    merge_folder(home / "base", [home / "ad"], [1.0], home / "out")
    return merged


@pytest.mark.proves("L5")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_merge_is_pefts_in_float64_rounded_once(tmp_path, capsys, family, dtype):
    """To a step of the file's dtype, where float64's last bits decide a tie; and verify says that it is the merge."""
    folders(tmp_path, family, dtype)
    ours, base, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "base", "theirs"))
    assert theirs.keys() <= ours.keys()
    changed = 0
    for key, due in theirs.items():
        got = ours[key]
        if got.dtype.kind in "fV":
            assert ulps_apart(got, rounded(due.astype(np.float64), got.dtype)).max(initial=0) <= 1, key
        changed += key in base and not np.array_equal(got, base[key])
    assert changed >= AT_LEAST.get(family, 2)
    argv = ["verify", "--base", tmp_path / "base", "--adapter", tmp_path / "ad", "--merged", tmp_path / "out", "--json"]
    capsys.readouterr()
    assert cli.main([str(part) for part in argv]) == 0
    found = json.loads(capsys.readouterr().out)["merged"]
    assert all(one["differing"] == 0 for one in found["changed"])
    assert len(found["changed"]) >= AT_LEAST.get(family, 2)


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma2", "phi3", "mixtral", "granite"])
def test_a_merged_folder_opens_in_transformers(tmp_path, family):
    """Every key of it is used, none is missing, and its logits are those of PEFT's merge."""
    merged = folders(tmp_path, family, torch.float32)
    module, info = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        ours, theirs = (one(input_ids=tokens).logits for one in (module.float(), merged.float()))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
