"""Models in GGUF files beside transformers, of which the files are made by hand, and llama.cpp, which runs them.

All in float32: logits, and llama.cpp's log-probabilities, within 2e-5 of the largest. gelu llama.cpp takes from a table
of float16: Gemma's within 5e-4.
"""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from families import T, torch
from gguf_files import KINDS, encoded
from gguf_models import base_file, keys, randomised, stored
from llama_cpp import Runner, write_model
from test_llama_cpp import EVERY, FLOAT32, TABLE, apart, moved, trained

import lora_np as ln
from lora_np.cli import main
from lora_np.formats.merged.gguf import merge_gguf

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.proves("T4", "T7", "T9", "T10", "T11", "T13", "T14")]
V, D, F, H, G, K = 300, 64, 96, 4, 2, 24
SIZES = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": H,
    "num_key_value_heads": G, "max_position_embeddings": 64, "rms_norm_eps": float(np.float32(1e-5)),
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 10000.0,
}  # fmt: skip
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
GEMMA3 = {
    "head_dim": K, "query_pre_attn_scalar": K, "sliding_window": 4, "num_hidden_layers": 7,
    "rope_parameters": GEMMA3_ROPE,
}  # fmt: skip
GEMMA3_KEYS = {
    "attention.sliding_window": 4, "rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
}  # fmt: skip


def llama3_divisors():
    """Llama 3's rule as its authors wrote it, by wave length; as the files have it, in float32."""
    divisors = []
    for i in range(K // 2):
        wave = 2 * math.pi * 10000 ** (2 * i / K)
        smooth = (32 / wave - 1.0) / (4.0 - 1.0)
        divisors.append(1 if wave < 32 / 4 else 8 if wave > 32 / 1 else 1 / ((1 - smooth) / 8 + smooth))
    assert 1 < sum(1 < d < 8 for d in divisors) + 1 < len(divisors)  # some of each kind
    return {"rope_freqs.weight": np.array(divisors, np.float32)}


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
WIDER = {"attention.sliding_window": 64}
# By name: transformers' class, more of its configuration, llama.cpp's name, more of the file's keys, and tensors.
CASES = {
    "llama": ("Llama", {}, "llama", {}, {}),
    "llama-3.1": ("Llama", {"head_dim": K, "rope_parameters": LLAMA3}, "llama", {}, llama3_divisors()),
    "llama-3.2": (
        "Llama", {"head_dim": K, "rope_parameters": LLAMA3, "tie_word_embeddings": True}, "llama", {},
        llama3_divisors(),
    ),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR}, "llama", {"rope.scaling.factor": 4.0}, {}),
    "llama-older-key": ("Llama", {"rope_parameters": LINEAR}, "llama", {"rope.scale_linear": 4.0}, {}),
    "llama-no-scaling": ("Llama", {}, "llama", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, "qwen2", {}, {}),
    "qwen3": ("Qwen3", {"head_dim": K}, "qwen3", {}, {}),
    "gemma3": ("Gemma3", GEMMA3, "gemma3", GEMMA3_KEYS, {}),
    "gemma3-wider": ("Gemma3", {**GEMMA3, "sliding_window": 64}, "gemma3", {**GEMMA3_KEYS, **WIDER}, {}),
    "phi3": ("Phi3", {"sliding_window": None}, "phi3", {"attention.sliding_window": 0}, {}),
    "phi3-half": (
        "Phi3", {"sliding_window": None, "rope_parameters": HALF}, "phi3",
        {"rope.dimension_count": D // H // 2, "rope.scaling.original_context_length": 64}, {},
    ),
    "phi3-window": ("Phi3", {"sliding_window": 4}, "phi3", {"attention.sliding_window": 4}, {}),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """-> its name, transformers' model, and the file"""
    prefix, more, architecture, its_keys, tensors = CASES[request.param]
    path = tmp_path_factory.mktemp(request.param) / "x.gguf"
    torch.manual_seed(0)
    kind = f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    model = getattr(T, f"{prefix}ForCausalLM")(getattr(T, kind)(**{**SIZES, **more}))
    base_file(path, randomised(model, architecture), architecture, more=its_keys, tensors=tensors)
    return request.param, model, path


def check_logits(peer, path, padded):
    """Of sequences longer than the window, and than what Llama 3's frequencies were scaled from."""
    tokens = np.random.default_rng(1).integers(0, V, (2, 48))
    mask = np.ones(tokens.shape, dtype=bool)
    if padded != "nowhere":
        mask[0, slice(None, 16) if padded == "left" else slice(-16, None)] = False
    positions = torch.tensor(np.maximum(mask.cumsum(axis=1) - 1, 0))
    with torch.no_grad():
        theirs = peer(
            torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(int)), position_ids=positions
        ).logits.numpy()
    ours = ln.asnumpy(ln.forward(ln.load_model(path), tokens, mask=mask))
    assert np.abs(ours - theirs)[mask].max() <= FLOAT32 * np.abs(theirs[mask]).max()


@pytest.mark.parametrize("padded", ["nowhere", "left", "right"])
def test_logits_are_transformers(case, padded):
    _, peer, path = case
    check_logits(peer, path, padded)


def test_it_is_the_folders_model(case, tmp_path):
    """The same Config, but for Llama 3's factors, which are of float32; the same weights, or 1 + w, to the bit."""
    _, peer, path = case
    peer.save_pretrained(tmp_path)
    ours, theirs = ln.load_model(path), ln.load_model(tmp_path)
    np.testing.assert_allclose(ours.config.rope_factors, theirs.config.rope_factors, rtol=2**-24)
    assert replace(ours.config, rope_factors=theirs.config.rope_factors) == theirs.config
    for name, value in theirs.weights.items():
        plus = int(ours.config.norm == "rms_1p" and value.ndim == 1)
        np.testing.assert_array_equal(plus + ln.asnumpy(ours.weights[name]), plus + ln.asnumpy(value), err_msg=name)


@pytest.mark.parametrize("case", [name for name in CASES if name != "phi3-window"], indirect=True)
def test_llama_cpp_says_the_same(case):
    """But for the window of Phi-3, which it passes over."""
    name, _, path = case
    prompt = np.random.default_rng(2).integers(3, V, 40).tolist()
    bound = TABLE if name.startswith("gemma") else FLOAT32
    assert apart(Runner(path), ln.load_model(path), prompt=prompt) < bound


ADAPTED = ("llama-3.2", "qwen2", "qwen3", "gemma3", "phi3-half")  # one of each architecture; three have tied heads


@pytest.mark.proves("L1", "L5")
@pytest.mark.parametrize("case", ADAPTED, indirect=True)
@pytest.mark.parametrize("suffix", ["", ".npz", ".gguf"])
def test_an_adapter_comes_back_and_is_merged(case, tmp_path, suffix):
    """To the bit; but for Phi-3's in .gguf, whose q, k and v are one: there B is multiplied by 3, and rounded."""
    name, _, path = case
    model, out, merged = ln.load_model(path), tmp_path / f"x{suffix}", tmp_path / "m.gguf"
    adapter = trained(model, targets=EVERY)
    ln.save_adapter(out, adapter, model)
    back = ln.load_adapter(out, model)
    tolerance = 2**-22 if name.startswith("phi3") and suffix == ".gguf" else 0
    for key, value in adapter.params.items():
        np.testing.assert_allclose(ln.asnumpy(back.params[key]), ln.asnumpy(value), rtol=tolerance, err_msg=key)
    merge_gguf(path, [out], [1.0], merged)
    found, due = ln.load_model(merged), ln.merge(model, adapter)
    assert found.config == due.config
    for key, value in due.weights.items():
        size = np.abs(ln.asnumpy(value)).max()
        np.testing.assert_allclose(
            ln.asnumpy(found.weights[key]), ln.asnumpy(value), rtol=0, atol=2 * tolerance * size, err_msg=key
        )
    assert main(["verify", "--base", str(path), "--adapter", str(out), "--merged", str(merged)]) == 0
    assert main(["inspect", str(out), "--base", str(path)]) == 0


@pytest.mark.proves("L1", "L5")
@pytest.mark.parametrize("case", ADAPTED, indirect=True)
@pytest.mark.parametrize("targets", [EVERY, ("embed", "k"), ("head",)], ids=" ".join)
def test_llama_cpp_runs_adapters_and_merges(case, tmp_path, targets):
    """A tied head's merge has a tensor of its own; an adapter's file has no place for it."""
    name, _, path = case
    model, out, merged = ln.load_model(path), tmp_path / "x.npz", tmp_path / "m.gguf"
    adapter, bound = trained(model, targets=targets), TABLE if name.startswith("gemma") else FLOAT32
    ln.save_adapter(out, adapter, model)
    merge_gguf(path, [out], [1.0], merged)
    assert apart(Runner(merged), model, adapter) < bound
    assert apart(Runner(path), model) < bound
    assert moved(Runner(merged), Runner(path)) > 0.1
    if targets == EVERY or not model.config.tie_head:
        ln.save_adapter(tmp_path / "x.gguf", adapter, model)
        assert apart(Runner(path, tmp_path / "x.gguf"), model, adapter) < bound


def test_the_largest_gemma3_has_another_scale(tmp_path):
    """Of 62 layers: 1 / sqrt(D / H), as llama.cpp has it by their number, and config.json by query_pre_attn_scalar.

    gelu's rounding adds up over 62 layers, where it is within TABLE over 7.
    """
    config = T.Gemma3TextConfig(**{**SIZES, **GEMMA3, "num_hidden_layers": 62, "query_pre_attn_scalar": D // H})
    model = randomised(T.Gemma3ForCausalLM(config), "gemma3")
    base_file(tmp_path / "x.gguf", model, "gemma3", more=GEMMA3_KEYS)
    assert apart(Runner(tmp_path / "x.gguf"), ln.load_model(tmp_path / "x.gguf")) < 62 / 7 * TABLE
    check_logits(model, tmp_path / "x.gguf", "nowhere")


# Sizes whose rows fill the blocks of the K-quants, and what transformers' reader leaves at its default.
WIDE = {**SIZES, "hidden_size": 256, "intermediate_size": 512}
MIXED = {
    "llama": ("LlamaConfig", {}), "qwen2": ("Qwen2Config", {}), "qwen3": ("Qwen3Config", {"head_dim": 128}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 256, "sliding_window": 4, "num_hidden_layers": 7}),
    "phi3": ("Phi3Config", {"sliding_window": None, "vocab_size": 32064}),  # its padding token is there
}  # fmt: skip


@pytest.mark.parametrize("architecture", MIXED)
def test_a_file_of_several_types(tmp_path, architecture):
    """As llama-quantize mixes them for Q4_K_M: some matrices in six bits, the others in four, norms and biases wide."""
    name, more = MIXED[architecture]
    config = getattr(T, name)(**{**WIDE, **more})
    rng, tensors = np.random.default_rng(0), {}
    for tensor, value in stored(T.AutoModelForCausalLM.from_config(config), architecture).items():
        if value.ndim == 1:
            tensors[tensor] = (rng.standard_normal(value.shape) * 0.3 + ("norm" in tensor)).astype(np.float32)
            continue
        kind = KINDS["Q6_K" if any(part in tensor for part in ("token", "attn_v", "attn_qkv", "down")) else "Q4_K"]
        tensors[tensor] = encoded(rng, value.shape, kind, most=0.3), kind
    more = {"attention.sliding_window": 4, "rope.freq_base": 1e6} if architecture == "gemma3" else {}
    write_model(tmp_path / "x.gguf", architecture, {**keys(config), **more}, tensors, config.vocab_size)
    peer = T.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    check_logits(peer.eval(), tmp_path / "x.gguf", "nowhere")


# What is not computed, by a part of its line; it is merged onto, and judged, by the names of its tensors.
NOT_RUN = {
    "qwen2-yarn": ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {}, "scaling.type = 'yarn'"),
    "qwen3-window": ("qwen3", {"attention.sliding_window": 4}, {}, "'qwen3.attention.sliding_window' = 4"),
    "gemma3-capped": ("gemma3", {"final_logit_softcapping": 30.0}, {}, "'gemma3.final_logit_softcapping' = 30.0"),
    "phi3-long": (
        "phi3", {}, {f"rope_factors_{which}.weight": np.ones(D // H // 2, np.float32) for which in ("long", "short")},
        "the tensor rope_factors_long.weight has no place in this model",
    ),
    "phi3-attention": ("phi3", {"rope.scaling.attn_factor": 1.2}, {}, "'phi3.rope.scaling.attn_factor' = 1.2"),
    "qwen2-scaled": ("qwen2", {}, {"rope_freqs.weight": np.ones(D // H // 2, np.float32)}, "rope_freqs.weight has no"),
}  # fmt: skip
CLASSES = {"qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "gemma3": "Gemma3TextConfig", "phi3": "Phi3Config"}


@pytest.mark.parametrize("which", NOT_RUN)
def test_what_is_not_computed_is_merged_by_names(tmp_path, which, capsys):
    architecture, more, tensors, expected = NOT_RUN[which]
    model = T.AutoModelForCausalLM.from_config(getattr(T, CLASSES[architecture])(**{**SIZES, "head_dim": D // H}))
    base, plain, merged = (tmp_path / f"{name}.gguf" for name in ("base", "plain", "merged"))
    base_file(plain, randomised(model, architecture), architecture)
    base_file(base, model, architecture, more=more, tensors=tensors)
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        ln.load_model(base)
    assert str(base) in str(caught.value)
    assert "\n" not in str(caught.value)
    run = ln.load_model(plain)
    ln.save_adapter(tmp_path / "x", trained(run, targets=("q", "down")), run)
    assert main(["merge", "--base", str(base), "--adapter", str(tmp_path / "x"), "--out", str(merged)]) == 0
    assert main(["verify", "--base", str(base), "--adapter", str(tmp_path / "x"), "--merged", str(merged)]) == 0
    assert "merged: yes" in capsys.readouterr().out
