"""PEFT's adapters of families that are not run here, as llama.cpp's files: transformers, PEFT and llama.cpp agree.

llama.cpp's probabilities of a small model, with the adapter and merged, beside transformers' with PEFT's adapter: in
float32 as near as test_llama_cpp has it.
"""

import numpy as np
import pytest
from families import T, peft, torch
from gguf_models import base_file, randomised
from llama_cpp import PROMPT, Runner

from lora_np.cli import main
from lora_np.formats.adapters.contents import read_contents
from lora_np.formats.merged.any_base import open_any_base
from lora_np.formats.merged.gguf import merge_gguf
from lora_np.formats.merged.gguf_by_name import read_gguf, write_gguf
from lora_np.formats.merged.gguf_comparison import compare_gguf

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.proves("L1", "L5")]
V, D, F, H, G, K = 300, 64, 96, 4, 2, 16
SIZES = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": H,
    "num_key_value_heads": G, "max_position_embeddings": 64, "head_dim": K, "rms_norm_eps": float(np.float32(1e-5)),
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SOFT = {"query_pre_attn_scalar": K, "sliding_window": 64}
# By transformers' model_type: its class, more of its sizes, llama.cpp's name, and the largest relative difference.
FAMILIES = {
    "mistral": ("Mistral", {"sliding_window": None}, "llama", 2e-5),
    "qwen2": ("Qwen2", {}, "qwen2", 2e-5),
    "qwen3": ("Qwen3", {}, "qwen3", 2e-5),
    "gemma": ("Gemma", {}, "gemma", 5e-4),
    "gemma2": ("Gemma2", SOFT, "gemma2", 5e-4),
    "gemma3_text": ("Gemma3", {**SOFT, "layer_types": ["sliding_attention"] * 2}, "gemma3", 5e-4),
    "phi3": ("Phi3", {"sliding_window": None}, "phi3", 2e-5),
}
# What a file says beside the sizes.
MORE = {
    "gemma2": {"attention.sliding_window": 64, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {"attention.sliding_window": 64},
}


def log_probabilities(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].double().log_softmax(-1).numpy()


def apart(runner, model):
    said, theirs = runner.greedy(PROMPT, 4, V)
    ours = log_probabilities(model, [*PROMPT, *said[:-1]])[len(PROMPT) - 1 :]
    assert ours.argmax(axis=-1).tolist() == said
    return np.abs(ours - theirs).max() / np.abs(ours).max()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """-> the folder with base, PEFT's adapter and both as llama.cpp's files; PEFT's model; the bound"""
    prefix, more, architecture, bound = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = getattr(T, f"{prefix}ForCausalLM")(
        getattr(T, f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config")(**SIZES, **more)
    ).eval()
    randomised(model, architecture)
    model.save_pretrained(folder / "base")
    base_file(folder / "base.gguf", model, architecture, more=MORE.get(architecture))
    fused = ["qkv_proj", "gate_up_proj"] if prefix == "Phi3" else ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=[*fused, "o_proj", "down_proj"], rank_pattern={"o_proj": 2},
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.copy_((torch.randn_like(value) * 0.2).bfloat16())
    adapted.save_pretrained(folder / "adapter")
    write_gguf(open_any_base(folder / "base"), read_contents(folder / "adapter"), folder / "adapter.gguf")
    return folder, adapted, bound


def test_llama_cpp_runs_the_adapter(family):
    folder, adapted, bound = family
    with adapted.disable_adapter():
        assert apart(Runner(folder / "base.gguf"), adapted) < bound
    assert apart(Runner(folder / "base.gguf", folder / "adapter.gguf"), adapted) < bound


def test_llama_cpp_runs_the_merge(family, tmp_path):
    folder, adapted, bound = family
    for name in ("adapter", "adapter.gguf"):
        out = tmp_path / f"{name}-merged.gguf"
        merge_gguf(folder / "base.gguf", [folder / name], [1.0], out)
        assert apart(Runner(out), adapted) < bound
        assert compare_gguf(folder / "base.gguf", [folder / "adapter"], out, 1).holds
        argv = ["--base", folder / "base.gguf", "--adapter", folder / name, "--merged", out]
        assert main(["verify", *map(str, argv)]) == 0


def test_llama_cpps_file_on_a_folder(family, tmp_path):
    """Merged and judged by names as PEFT's own folder is."""
    folder, *_ = family
    base = ["--base", str(folder / "base")]
    for name in ("adapter", "adapter.gguf"):
        adapter = ["--adapter", str(folder / name)]
        assert main(["merge", *base, *adapter, "--out", str(tmp_path / f"from-{name[8:]}")]) == 0
        assert main(["verify", *base, *adapter]) == 0
    for name in ("from-", "from-gguf"):
        assert main(["verify", *base, "--adapter", str(folder / "adapter.gguf"), "--merged", str(tmp_path / name)]) == 0


def test_convert_there_and_back(family, tmp_path):
    """A file with which llama.cpp says the same; and back as a folder with which PEFT's model is the same."""
    folder, adapted, bound = family
    base, there, back = ["--base", str(folder / "base")], tmp_path / "there.gguf", tmp_path / "back"
    assert main(["convert", *base, "--adapter", str(folder / "adapter"), "--out", str(there)]) == 0
    assert apart(Runner(folder / "base.gguf", there), adapted) < bound
    assert main(["convert", *base, "--adapter", str(there), "--out", str(back)]) == 0
    model = T.AutoModelForCausalLM.from_pretrained(folder / "base")
    again = peft.PeftModel.from_pretrained(model, back).eval()
    expected = log_probabilities(adapted, PROMPT)
    assert np.abs(log_probabilities(again, PROMPT) - expected).max() < 2e-5 * np.abs(expected).max()


def test_it_comes_back_as_it_was(family):
    """Whose B was multiplied, for the one alpha, is B times its own scale within a rounding."""
    folder, *_ = family
    there = read_contents(folder / "adapter").pairs
    back = read_gguf(open_any_base(folder / "base"), folder / "adapter.gguf").pairs
    assert there.keys() == back.keys()
    for module, (pair,) in there.items():
        (other,) = back[module]
        assert np.array_equal(pair.A, other.A)
        np.testing.assert_allclose(other.s * other.B.astype(float), pair.s * pair.B.astype(float), rtol=2**-22)
