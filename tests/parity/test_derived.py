"""Extracted and combined adapters in PEFT: it loads exactly those modules, and its sums are ours."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_np.formats.adapters.contents import read_contents
from lora_np.formats.merged.combined import combine_files
from lora_np.formats.merged.extract import extract

families = pytest.importorskip("families", reason="the extra peers")
torch, peft = families.torch, families.peft
pytestmark = families.QUIET


def weights(module):
    """Copies of all weights, in float64."""
    return {name: value.detach().double().numpy().copy() for name, value in module.state_dict().items()}


@pytest.mark.proves("L9")
@pytest.mark.parametrize(
    "family",
    ["gpt2", "llama", "qwen2", "gemma2", "phi3", "bert", "t5", "qwen2_vl", "gemma3-images", "llava", "vit", "dinov2"],
)
def test_peft_loads_exactly_the_modules_that_changed(tmp_path, family):
    """Of matrices, square and Conv1D's too, the nearest of rank 3 in dW's own SVD; of the rest, the base's."""
    base = families.make(family, torch.float32, seed=1)
    base.save_pretrained(str(tmp_path / "base"))
    linears = [
        (name, part)
        for name, part in base.named_modules()
        if type(part).__name__ in ("Linear", "Conv1D") and not name.endswith(("lm_head", "decoder"))
    ]
    chosen = dict(linears[::2])  # of modules of one kind, some changed
    tuned = families.make(family, torch.float32, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, part in tuned.named_modules():
            if name in chosen:
                part.weight += 0.1 * torch.randn(part.weight.shape, generator=generator)
    tuned.save_pretrained(str(tmp_path / "tuned"))
    found = extract(tmp_path / "base", tmp_path / "tuned", 3, tmp_path / "ad")
    assert {m.name for m in found.modules} == set(chosen)
    assert not found.left_out
    before, after = weights(base), weights(tuned)
    module = peft.PeftModel.from_pretrained(base, str(tmp_path / "ad"))
    adapted = {
        name.removeprefix("base_model.model.") for name, part in module.named_modules() if hasattr(part, "lora_A")
    }
    assert adapted == set(chosen)
    merged = weights(module.merge_and_unload())
    for key, W0 in before.items():
        due = W0
        if key.removesuffix(".weight") in chosen and key.endswith(".weight"):
            U, S, Vt = np.linalg.svd(after[key] - W0, full_matrices=False)
            due = W0 + (U[:, :3] * S[:3]) @ Vt[:3]
        np.testing.assert_allclose(merged[key], due, rtol=0, atol=1e-6 * max(1, np.abs(due).max()), err_msg=key)


def test_names_that_end_in_other_names(tmp_path):
    """Of three modules called proj one did not change, and two have other ranks."""
    linear = torch.nn.Linear
    inner = torch.nn.ModuleDict({"proj": linear(6, 6), "deep": torch.nn.ModuleDict({"proj": linear(6, 2)})})
    base = torch.nn.ModuleDict({"proj": linear(6, 6), "inner": inner})
    changed = ("proj", "inner.deep.proj")
    for folder, size in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / folder).mkdir()
        state = {
            key: value + size * torch.eye(*value.shape) if key.removesuffix(".weight") in changed else value
            for key, value in base.state_dict().items()
        }
        save_file({key: value.numpy() for key, value in state.items()}, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text('{"model_type": "unheard_of"}')
    extract(tmp_path / "base", tmp_path / "tuned", 3, tmp_path / "ad")
    module = peft.PeftModel.from_pretrained(base, str(tmp_path / "ad"))
    ranks = {name: part.r["default"] for name, part in module.named_modules() if hasattr(part, "lora_A")}
    assert ranks == {"base_model.model.proj": 3, "base_model.model.inner.deep.proj": 2}


@pytest.mark.proves("L9")
@pytest.mark.parametrize(("how", "rank"), [("cat", None), ("svd", 3)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_combination_is_pefts_weighted_adapter(tmp_path, family, how, rank):
    base = families.make(family, torch.float32, seed=1)
    targets = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "down_proj"]}[family]
    for seed, name in enumerate(("a", "b")):
        model = families.make(family, torch.float32, seed=1)
        families.adapted(model, {"target_modules": targets}, torch.float32, seed).save_pretrained(str(tmp_path / name))
    combine_files([tmp_path / "a", tmp_path / "b"], [0.75, 1.5], tmp_path / "out", rank)
    module = peft.PeftModel.from_pretrained(base, str(tmp_path / "a"), adapter_name="a")
    module.load_adapter(str(tmp_path / "b"), adapter_name="b")
    options = {} if rank is None else {"svd_rank": rank}
    module.add_weighted_adapter(["a", "b"], [0.75, 1.5], "theirs", combination_type=how, **options)
    module.load_adapter(str(tmp_path / "out"), adapter_name="ours")
    compared = 0
    for part in module.modules():
        if hasattr(part, "lora_A"):
            ours, theirs = (part.get_delta_weight(name).detach().numpy() for name in ("ours", "theirs"))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
            compared += 1
    assert compared == len(read_contents(tmp_path / "out").pairs) >= 4
