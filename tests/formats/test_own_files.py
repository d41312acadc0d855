"""What save_adapter writes as one file, read without its base: the updates that the adapter has."""

from dataclasses import replace

import numpy as np
import pytest
from hostile import GPT2, LLAMA, OWN, edit_tensors, hostile_texts, is_safe
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from strategies import dense_updates, random_model, trained_adapter

import lora_np as ln
from lora_np import cli
from lora_np.formats.adapters.own_files import read_file
from lora_np.formats.merged.survey import survey

BERT = replace(ln.PRESETS["bert-base"], vocab_size=11, n_positions=10, n_layer=2, n_head=2, d_model=8, d_ff=12)
LORA = {
    "gpt2": (GPT2, {"targets": ("q", "v")}),
    "gpt2-one": (GPT2, {"targets": ("k", "o")}),
    "gpt2-qkv": (GPT2, {"targets": ("qkv", "up"), "rank_pattern": {"up": 3}, "alpha_pattern": {"layers.1.mlp.up": 7}}),
    "llama": (LLAMA, {"targets": ("q", "down"), "rslora": True, "rank_pattern": {"layers.1.attn.q": 1}}),
    "llama-qkv": (LLAMA, {"targets": ("qkv",), "alpha_pattern": {"layers.0.attn.qkv": 5}}),
    "own": (OWN, {"targets": ("q", "gate", "embed"), "bias": "lora_only"}),
    "bert": (BERT, {"targets": ("q", "o"), "layers": (1,)}),
    "headless": (replace(LLAMA, head="none"), {"targets": ("v",)}),
}


def made(case):
    config, fields = LORA[case]
    model = random_model(config, seed=1)
    return model, trained_adapter(model, ln.LoRAConfig(**{"r": 2, "alpha": 3, **fields}), seed=2)


def pairs_of(path):
    return [(name, pair) for name, several in read_file(path).pairs.items() for pair in several]


@pytest.mark.proves("L1")
@pytest.mark.parametrize("case", LORA)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_the_updates_are_the_adapters(tmp_path, case, suffix):
    """Each dW by name in .npz; in loralib's, whose names are the family's, all together by their norms."""
    model, adapter = made(case)
    path = tmp_path / f"a{suffix}"
    ln.save_adapter(path, adapter, model)
    due = {name: np.asarray(ln.asnumpy(dW), "float64") for name, dW in dense_updates(model, adapter).items()}
    found = pairs_of(path)
    got = {name: pair.s * pair.B.astype("float64") @ pair.A.astype("float64") for name, pair in found}
    total = sum((dW * dW).sum() for dW in due.values())
    assert sum((dW * dW).sum() for dW in got.values()) == pytest.approx(total, rel=1e-12)
    assert total > 0
    assert sorted(read_file(path).whole) == (
        sorted(adapter.whole) if suffix == ".npz" else sorted(read_file(path).whole)
    )
    assert len(read_file(path).whole) == len(adapter.whole)
    assert sum(m.norm_update**2 for m in survey(path).modules) == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("case", ["gpt2", "gpt2-qkv", "llama"])
def test_what_convert_writes_every_command_takes(tmp_path, capsys, case):
    """inspect, inspect of two, merge and verify: of each format, with what they say of PEFT's folder."""
    model, adapter = made(case)
    model = ln.Model(model.config, {name: ln.asnumpy(w).astype("float32") for name, w in model.weights.items()})
    adapter = ln.Adapter(adapter.config, {name: ln.asnumpy(p).astype("float32") for name, p in adapter.params.items()})
    base, first = tmp_path / "base", tmp_path / "ad"
    ln.save_model(base, model)
    ln.save_adapter(first, adapter, model)

    def run(*argv):
        capsys.readouterr()
        status = cli.main([str(part) for part in argv])
        return status, capsys.readouterr()

    assert run("merge", "--base", base, "--adapter", first, "--out", tmp_path / "merged")[0] == 0
    for suffix in (".npz", ".safetensors"):
        path = tmp_path / f"a{suffix}"
        assert run("convert", "--base", base, "--adapter", first, "--out", path)[0] == 0
        assert run("inspect", path)[0] == 0
        assert run("inspect", path, "--base", base)[0] == 0
        given = ("--base", base, "--adapter", path)
        status, said = run("verify", *given, "--merged", tmp_path / "merged")
        assert status == 0, said
        assert "the recorded hash of the base" in said.out
        assert "merged: yes, exactly" in said.out
    status, said = run("inspect", tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    assert status == 0
    assert "ranks differ" not in said.out


def test_loralibs_own_file_does_not_say_the_scale(tmp_path, capsys):
    model, adapter = made("gpt2")
    path = tmp_path / "a.safetensors"
    ln.save_adapter(path, adapter, model)
    save_file(load_file(path), path)
    assert cli.main(["inspect", str(path)]) == 2
    assert "do not say lora_alpha, and so no scale: lora-np convert takes it with --alpha" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.pop("transformer.h.0.attn.c_attn.lora_B"),
            "the tensor transformer.h.0.attn.c_attn.lora_B is",
        ),
        (lambda t: t.update({"transformer.h.0.attn.c_attn.lora_A": np.ones((6, 8))}), "the metadata has other ranks"),
        (lambda t: t.update({"transformer.h.0.attn.c_attn.lora_A": np.ones(4)}), r"expected A \(n r, in\)"),
        (lambda t: t.update({"x.lora_A": np.ones((2, 8))}), "expected modules of one family of models"),
        (lambda t: t["transformer.h.0.attn.c_attn.lora_A"].fill(np.nan), "holds NaN"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, change, said):
    model, adapter = made("gpt2")
    path = tmp_path / "a.safetensors"
    ln.save_adapter(path, adapter, model)
    edit_tensors(path, change)
    with pytest.raises(ValueError, match=said):
        read_file(path)


@given(names=st.lists(hostile_texts() | st.sampled_from(["layers", "0", "h", "attn", ""]), min_size=1, max_size=4))
def test_any_name_gives_contents_or_one_line(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("own") / "a.safetensors"
    model, adapter = made("own")
    ln.save_adapter(path, adapter, model)
    name = ".".join(names).encode("utf-8", "replace").decode()
    edit_tensors(path, lambda t: t.update({f"{name}.lora_A": np.ones((2, 8)), f"{name}.lora_B": np.ones((8, 2))}))
    try:
        read_file(path)
    except ValueError as error:
        assert is_safe(str(error))  # noqa: PT017 (most are refused)
