"""Models in GGUF files beside transformers, of which the files are made by hand, and llama.cpp, which runs them.

All in float32: logits, and llama.cpp's log-probabilities, within 2e-5 of the largest. gelu llama.cpp takes from a table
of float16: Gemma's within 5e-4.
"""

import math

import numpy as np
import pytest
from families import T, torch
from gguf_files import KINDS, encoded
from gguf_models import base_file, keys, randomised, stored
from llama_cpp import Runner, write_model
from test_llama_cpp import FLOAT32, TABLE, apart

import lora_np as ln

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


def test_llama_cpp_says_the_same(case):
    name, _, path = case
    if name == "phi3-window":
        pytest.skip("llama.cpp passes over the window of Phi-3")
    prompt = np.random.default_rng(2).integers(3, V, 40).tolist()
    bound = TABLE if name.startswith("gemma3") else FLOAT32
    assert apart(Runner(path), ln.load_model(path), prompt=prompt) < bound


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
