"""The command line, as its user meets it: results, exit status, one clear line for bad input, nothing half-written."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import run
from hostile import edit_json, write_peft
from strategies import dense_updates, spy, trained_adapter

import lora_np as ln
from lora_np import cli, transformer
from lora_np.backend import asnumpy
from lora_np.formats.files.extras import install
from lora_np.vectors import derivatives
from lora_np.vectors.statements import STATEMENTS

CONFIG = ln.Config(256, 32, n_layer=2, n_head=2, d_model=16, d_ff=32)
TEXT = "the quick brown fox jumps over the lazy dog; " * 60


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a base, a text, and an adapter trained on it."""
    folder = tmp_path_factory.mktemp("home")
    ln.save_model(folder / "base", ln.Model(CONFIG, ln.init_weights(CONFIG, seed=0)))
    other = ln.Model(CONFIG, ln.init_weights(CONFIG, seed=1))
    ln.save_model(folder / "other", other)
    words = ln.Config(300, 32, n_layer=1, n_head=1, d_model=4, d_ff=4)
    ln.save_model(folder / "words", ln.Model(words, ln.init_weights(words, seed=0)))
    (folder / "text.txt").write_text(TEXT)
    (folder / "short.txt").write_text("short")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 500)
    assert cli.main(finetune(folder, "adapter")) == 0
    return folder


def finetune(home, out, *more, data="text.txt", steps=20):
    return [
        "finetune", "--data", f"{home / data}", "--base", f"{home / 'base'}", "--out", f"{home / out}",
        "--window", "16", "--batch", "4", "--every", "5", "--steps", f"{steps}", "--r", "2",
        "--targets", "q", "v", "head", "--lr", "0.05", *more,
    ]  # fmt: skip


def test_finetune_writes_an_adapter_that_lowers_the_held_out_loss(home, capsys):
    status, out, err = run(capsys, *finetune(home, "fresh", "--json"))
    result = json.loads(out)
    assert status == 0
    assert result["loss"]["adapter"] < result["loss"]["base"] - 0.1
    assert result["curve"][0]["loss"] == result["loss"]["base"]
    assert [point["step"] for point in result["curve"]] == [0, 5, 10, 15, 20]
    assert result["parameters"] == 2 * 2 * 2 * (16 + 16) + 2 * (16 + 256)
    assert sorted(os.listdir(home / "fresh")) == ["adapter_config.json", "adapter_model.safetensors", "task.json"]
    assert "fine-tuning: step 20 of 20" in err
    model = ln.load_model(home / "base")
    assert (
        ln.load_adapter(home / "fresh", model).params.keys() == ln.load_adapter(home / "adapter", model).params.keys()
    )


def test_finetune_that_computes_again_writes_the_same_adapter(home, capsys, monkeypatch):
    """Each step computes every half block once more, whose lowest adapter is at the bottom."""
    computed = spy(monkeypatch, transformer, "sublayer")
    assert run(capsys, *finetune(home, "kept", steps=2))[0] == 0
    once = len(computed)
    assert run(capsys, *finetune(home, "again", "--recompute", steps=2))[0] == 0
    assert len(computed) - 2 * once == 2 * (2 * CONFIG.n_layer)
    for name in os.listdir(home / "kept"):
        assert (home / "kept" / name).read_bytes() == (home / "again" / name).read_bytes()


@pytest.mark.parametrize("command", ["finetune", "eval", "eval, adapted", "generate"])
def test_a_base_that_bfloat16_would_round_is_not_held_so(home, capsys, command):
    base = ["--base", f"{home / 'base'}"]
    argv = {
        "finetune": finetune(home, "narrow"),
        "eval": ["eval", "--data", f"{home / 'text.txt'}", *base],
        "eval, adapted": ["eval", "--data", f"{home / 'text.txt'}", *base, "--adapter", f"{home / 'adapter'}"],
        "generate": ["generate", "--prompt", "the", *base],
    }[command]
    status, _, err = run(capsys, *argv, "--storage", "bfloat16")
    assert status == 2
    assert "embed.tokens: storage bfloat16: expected float32 numbers that bfloat16 holds" in err
    assert len(err.splitlines()) == 1
    assert not (home / "narrow").exists()


def test_an_adapter_is_trained_and_evaluated_on_a_base_in_four_bits(home, capsys):
    """Its base is what is dequantised: the loss without the adapter is that base's, and no other base takes it."""
    assert run(capsys, *finetune(home, "four", "--storage", "nf4", steps=2))[0] == 0
    argv = ["eval", "--data", home / "text.txt", "--base", home / "base", "--window", "16"]
    wide, four = (json.loads(run(capsys, *argv, *more, "--json")[1])["losses"] for more in ([], ["--storage", "nf4"]))
    argv += ["--adapter", home / "four"]
    adapted = json.loads(run(capsys, *argv, "--storage", "nf4", "--json")[1])["losses"]
    assert adapted["base"] == four["base"] != wide["base"]
    assert adapted["adapter"] < four["base"]
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert "another base" in err


def test_eval_gives_the_loss_without_and_with_the_adapter(home, capsys):
    argv = [
        "eval",
        "--data",
        home / "text.txt",
        "--base",
        home / "base",
        "--adapter",
        home / "adapter",
        "--window",
        "16",
    ]
    status, out, _ = run(capsys, *argv, "--json")
    losses = json.loads(out)["losses"]
    assert status == 0
    assert losses["adapter"] < losses["base"] - 0.1
    status, out, _ = run(capsys, *argv)
    assert out.splitlines() == [f"{name}: {loss:.4f} nats a byte" for name, loss in losses.items()]


LABELLED = "".join(f"{'abc' if i % 2 else 'xyz'} {i}\t{'low' if i % 2 else 'high'}\n" for i in range(60))


@pytest.mark.parametrize("task", ["classify", "tag"])
def test_labels_and_tags_are_learned_and_measured(tmp_path, home, capsys, task):
    """finetune says how many are right before and after; eval finds the task, the labels and the length by itself."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.write_text(
        LABELLED if task == "classify" else LABELLED.replace(" ", "").replace("\t", " ").replace("\n", "\n\n")
    )
    argv = ["finetune", "--task", task, "--data", data, "--dev", data, "--base", home / "base", "--out", out]
    settings = ["--epochs", "8", "--batch", "10", "--lr", "0.05", "--r", "4", "--targets", "q", "v", "up", "down"]
    status, shown, _ = run(capsys, *argv, *settings, "--json")
    result = json.loads(shown)
    assert status == 0
    assert result["labels"] == ["high", "low"]
    steps = 8 * 6
    assert result["steps"] == steps
    assert [point["step"] for point in result["curve"]] == list(range(0, steps + 1, steps // 8))
    argv = ["eval", "--data", data, "--base", home / "base", "--adapter", out]
    status, shown, _ = run(capsys, *argv, "--json")
    assert status == 0
    assert json.loads(shown)["losses"] == {"adapter": result["loss"]["adapter"]}
    assert json.loads(shown)["accuracies"] == {"adapter": result["curve"][-1]["accuracy"]}
    assert result["curve"][-1]["accuracy"] > 0.95
    status, shown, _ = run(capsys, *argv)
    accuracy = f"accuracy {result['curve'][-1]['accuracy']:.1%}"
    assert (
        shown
        == f"adapter: {result['loss']['adapter']:.4f} nats a {'text' if task == 'classify' else 'word'}, {accuracy}\n"
    )


def test_a_task_and_its_data_that_do_not_fit_are_refused(tmp_path, home, capsys):
    (tmp_path / "labelled").write_text(LABELLED)
    text, labelled, out = home / "text.txt", tmp_path / "labelled", ["--out", tmp_path / "o"]
    for command, data, more, message in [
        ("finetune", text, ["--epochs", "2", *out], "--epochs: windows of a plain text"),
        ("finetune", text, ["--task", "classify", *out], "text.txt:1: expected a text, a tab and a label"),
        ("eval", labelled, ["--task", "classify"], "base: expected a model for task classify with 2 labels"),
        ("finetune", text, ["--every", "0", *out], "every: expected at least 1, got 0"),
    ]:
        argv = [command, "--base", home / "base", "--data", data, *more]
        status, out, err = run(capsys, *argv)
        assert (status, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_conversations_need_a_template_and_are_said_to_be_read(tmp_path, home, capsys):
    pytest.importorskip("jinja2", reason="chat templates: the extra models")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    (tmp_path / "data").write_text((json.dumps({"messages": messages}) + "\n") * 3)
    (tmp_path / "own").write_text("{% for m in messages %}{{ m.content }}{{ '|' if m.role == 'user' }}{% endfor %}")
    argv = ["eval", "--base", home / "base", "--data", tmp_path / "data"]
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert err.endswith("base: this model has no chat template; name one with --chat-template FILE\n")
    status, out, err = run(capsys, *argv, "--chat-template", tmp_path / "own", "--json")
    assert status == 0
    assert [json.loads(out)["data"][name] for name in ("examples", "tokens", "scored")] == [3, 9, 6]  # a|b, of a|bc
    assert "data: 3 conversations, 9 tokens, 67 % scored; " in err


def test_generate_goes_on_from_the_prompt_and_repeats_itself(home, capsys):
    argv = ["generate", "--base", home / "base", "--adapter", home / "adapter", "--prompt", "the ", "-n", "12"]
    status, out, _ = run(capsys, *argv, "--seed", "3")
    assert status == 0
    assert out.startswith("the ")
    assert run(capsys, *argv, "--seed", "3")[1] == out
    _, greedy, _ = run(capsys, *argv, "--temperature", "0", "--json")
    assert len(json.loads(greedy)["text"]) <= 16
    status, out, _ = run(capsys, *argv[:-1], "100", "--json")  # past the base's longest text, 32 tokens
    assert status == 0
    assert len(json.loads(out)["text"].encode("utf-8", "replace")) >= 100


def test_generate_says_what_is_wrong_with_a_request(home, capsys):
    for more, message in (
        (["--prompt", ""], "--prompt: expected some text"),
        (["--prompt", "a", "-n", "-1"], "n: expected an integer of at least 0"),
    ):
        status, out, err = run(capsys, "generate", "--base", home / "base", *more)
        assert (status, out) == (2, "")
        assert message in err


def test_merge_writes_a_model_with_the_adapter_in_it(home, capsys):
    out = home / "merged"
    status, _, _ = run(capsys, "merge", "--base", home / "base", "--adapter", home / "adapter", "--out", out)
    assert status == 0
    base = ln.load_model(home / "base")
    expected = ln.merge(base, ln.load_adapter(home / "adapter", base))
    merged = ln.load_model(out)
    assert all((asnumpy(merged.weights[n]) == asnumpy(w)).all() for n, w in expected.weights.items())
    status, _, err = run(capsys, "merge", "--base", home / "base", "--adapter", home / "adapter", "--out", out)
    assert status == 2
    assert "exists" in err


def test_merge_of_several_adapters_is_their_weighted_sum(home, capsys):
    """L9 by NumPy: W0 + 2 s B A - s B' A', of a base in a folder and of one in memory."""
    base = ln.load_model(home / "base")
    adapters = [
        trained_adapter(base, ln.LoRAConfig(r=2, targets=targets), seed=seed)
        for seed, targets in enumerate([("q", "o"), ("q", "up")])
    ]
    for name, adapter in zip(("one", "two"), adapters, strict=True):
        ln.save_adapter(home / name, adapter, base)
    argv = ["merge", "--base", home / "base", "--adapter", home / "one", "--adapter", home / "two"]
    status, out, _ = run(capsys, *argv, "--weights", "2", "-1", "--out", home / "sum", "--json")
    assert (status, json.loads(out)["made"]) == (0, 6)
    merged = ln.load_model(home / "sum")
    deltas = [dense_updates(base, adapter) for adapter in adapters]
    for name, W in base.weights.items():
        dW = [delta.get(name.removesuffix(".weight"), 0.0) for delta in deltas]
        expected = asnumpy(W).astype("float64") + 2 * dW[0] - dW[1]
        np.testing.assert_allclose(asnumpy(merged.weights[name]), expected, rtol=2.0**-24, atol=1e-14)
    status, _, err = run(capsys, *argv, "--weights", "2", "--out", home / "never")
    assert status == 2
    assert "--weights: expected one for each --adapter, got 1 for 2" in err
    assert not (home / "never").exists()


@pytest.mark.parametrize("command", ["merge", "convert", "generate", "eval", "finetune"])
def test_an_adapter_that_does_not_fit_the_embedded_base_asks_for_its_own(home, tmp_path, capsys, monkeypatch, command):
    """And names it, where the adapter does. One that is damaged fits none, and asks for nothing."""
    monkeypatch.setattr("lora_np.training.embedded.base_folder", lambda *_: (home / "base", True))
    factors = {"model.layers.9.self_attn.q_proj": (np.ones((1, 3), "f4"), np.ones((2, 1), "f4"))}
    write_peft(tmp_path / "other", factors, r=1, alpha=1)
    edit_json(tmp_path / "other" / "adapter_config.json", base_model_name_or_path="someone/llama")
    more = ["--prompt", "a"] if command == "generate" else ["--out", tmp_path / "out"]
    more = more if command in ("generate", "merge", "convert") else ["--data", home / "text.txt", *more]
    more = more[:2] if command == "eval" else more
    hint = "; no --base was given, so its base is taken for the embedded model of bytes"

    def said(*base):
        status, _, err = run(capsys, command, *base, "--adapter", tmp_path / "other", *more)
        assert status == 2
        assert err.count("\n") == 1
        return err

    assert hint not in said("--base", home / "base")
    assert said().endswith(f"{hint}; made for someone/llama\n")
    edit_json(tmp_path / "other" / "adapter_config.json", base_model_name_or_path=None)
    assert said().endswith(f"{hint}\n")
    file = tmp_path / "other" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert hint not in said()


def test_verify_without_a_base_takes_the_embedded_one_and_says_so(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lora_np.training.embedded.base_folder", lambda *_: (home / "base", True))
    assert run(capsys, "verify", "--adapter", home / "adapter")[0] == 0
    factors = {"model.layers.9.self_attn.q_proj": (np.ones((1, 3), "f4"), np.ones((2, 1), "f4"))}
    write_peft(tmp_path / "other", factors, r=1, alpha=1)
    status, out, err = run(capsys, "verify", "--adapter", tmp_path / "other")
    assert (status, err) == (1, "")
    assert out.startswith("fits: no. ")
    assert out.endswith("; no --base was given, so its base is taken for the embedded model of bytes\n")


def test_merge_without_a_base_takes_the_embedded_one(home, capsys, monkeypatch):
    base = ln.load_model(home / "base")
    monkeypatch.setattr("lora_np.training.embedded.base_folder", lambda *_: (home / "base", True))
    status, _, _ = run(capsys, "merge", "--adapter", home / "adapter", "--out", home / "embedded")
    assert status == 0
    expected = ln.merge(base, ln.load_adapter(home / "adapter", base))
    merged = ln.load_model(home / "embedded")
    assert all((asnumpy(merged.weights[n]) == asnumpy(w)).all() for n, w in expected.weights.items())


def test_inspect_tells_targets_ranks_norms_and_whether_b_is_zero(home, capsys):
    status, out, _ = run(capsys, "inspect", home / "adapter", "--json")
    result = json.loads(out)
    assert status == 0
    assert result["B_is_zero"] is False
    assert result["target_modules"] == ["lm_head", "attn.c_attn"]
    assert [module["rank"] for module in result["modules"]] == [2, 4, 4]  # q and v share GPT-2's c_attn
    model = ln.load_model(home / "base")
    fresh = ln.init_adapter(model, ln.LoRAConfig(r=2, targets=("o",)), seed=0)
    ln.save_adapter(home / "untrained", fresh, model)
    module = json.loads(run(capsys, "inspect", home / "untrained", "--json")[1])["modules"][0]
    A = asnumpy(fresh.params["layers.0.attn.o.A"]).astype(float)
    assert module["norm_A"] == pytest.approx(np.linalg.norm(A))
    assert module["norm_B"] == module["norm_update"] == 0
    assert "not trained" in run(capsys, "inspect", home / "untrained")[1]
    trained = ln.Adapter(fresh.config, {n: p + 0.5 for n, p in fresh.params.items()})
    ln.save_adapter(home / "half", trained, model)
    module = json.loads(run(capsys, "inspect", home / "half", "--json")[1])["modules"][1]
    A, B = (asnumpy(trained.params[f"layers.1.attn.o.{f}"]).astype(float) for f in "AB")
    assert module["norm_update"] == pytest.approx(np.linalg.norm(8 * B @ A), rel=1e-6)


def test_convert_goes_from_each_format_to_each(home, capsys, tmp_path):
    base = ln.load_model(home / "base")
    expected = ln.load_adapter(home / "adapter", base)
    names = [
        home / "adapter",
        tmp_path / "a.npz",
        tmp_path / "b.safetensors",
        tmp_path / "c",
        tmp_path / "d.safetensors",
    ]
    names += [tmp_path / "e.npz", tmp_path / "f"]
    for path, out in itertools.pairwise(names):
        status, text, _ = run(capsys, "convert", "--base", home / "base", "--adapter", path, "--out", out, "--json")
        assert status == 0
        assert json.loads(text)["out"] == str(out)
        found = ln.load_adapter(out, base)
        assert found.config == expected.config
        assert all((asnumpy(found.params[n]) == asnumpy(p)).all() for n, p in expected.params.items())
        before = out.read_bytes() if out.is_file() else (out / "adapter_model.safetensors").read_bytes()
        status, _, err = run(capsys, "convert", "--base", home / "base", "--adapter", path, "--out", out)
        assert status == 2
        assert "exists" in err
        assert before == (out.read_bytes() if out.is_file() else (out / "adapter_model.safetensors").read_bytes())
    assert run(capsys, "inspect", tmp_path / "f")[1] == run(capsys, "inspect", home / "adapter")[1]


def test_merge_takes_an_adapter_in_any_format(home, capsys, tmp_path):
    given = ["--base", home / "base", "--adapter"]
    assert run(capsys, "convert", *given, home / "adapter", "--out", tmp_path / "a.npz")[0] == 0
    assert run(capsys, "merge", *given, home / "adapter", "--out", tmp_path / "one")[0] == 0
    assert run(capsys, "merge", *given, tmp_path / "a.npz", "--out", tmp_path / "other")[0] == 0
    one, other = (ln.load_model(tmp_path / name).weights for name in ("one", "other"))
    assert all((asnumpy(one[name]) == asnumpy(other[name])).all() for name in one)


def test_convert_takes_what_loralibs_files_do_not_say(home, capsys, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    tensors = {"lora_A": rng.normal(size=(2, 16)), "lora_B": rng.normal(size=(16, 2))}
    tensors = {f"transformer.h.0.attn.c_attn.{name}": t.astype("float32") for name, t in tensors.items()}
    safetensors.save_file(tensors, tmp_path / "a.safetensors")
    given = ["convert", "--base", home / "base", "--adapter", tmp_path / "a.safetensors", "--out", tmp_path / "a.npz"]
    for more, message in [
        ([], "alpha"),
        (["--alpha", "4"], "enabled"),
        (["--alpha", "4", "--enabled", "q", "v"], "enabled"),
    ]:
        status, out, err = run(capsys, *given, *more)
        assert (status, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
        assert not (tmp_path / "a.npz").exists()
    assert run(capsys, *given, "--alpha", "4", "--enabled", "k")[0] == 0
    adapter = ln.load_adapter(tmp_path / "a.npz", ln.load_model(home / "base"))
    assert adapter.config == ln.LoRAConfig(r=2, alpha=4, targets=("k",), layers=(0,))
    assert (asnumpy(adapter.params["layers.0.attn.k.A"]) == tensors["transformer.h.0.attn.c_attn.lora_A"]).all()


def test_convert_puts_the_adapters_head_on_the_base(home, capsys, tmp_path):
    headless = ln.load_model(home / "base", head="none")
    ln.save_model(tmp_path / "base", headless)
    model = ln.load_model(home / "base", head="tag", n_labels=3, seed=7)
    adapter = ln.init_adapter(model, ln.LoRAConfig(r=2, train_head=True), seed=0)
    ln.save_adapter(tmp_path / "a", adapter, model)
    given = ["convert", "--base", tmp_path / "base", "--adapter", tmp_path / "a", "--out"]
    assert run(capsys, *given, tmp_path / "a.npz")[0] == 0
    back = ln.load_adapter(tmp_path / "a.npz", model)
    assert (asnumpy(back.params["head.weight"]) == asnumpy(model.weights["head.weight"])).all()
    status, _, err = run(capsys, *given, tmp_path / "a.safetensors")
    assert status == 2
    assert "no head that is trained whole" in err


def test_demo_shows_losses_sizes_and_checks(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_NP_CACHE", str(tmp_path / "cache"))
    status, out, _ = run(capsys, "demo", "--quick", "--json")
    result = json.loads(out)
    assert status == 0
    assert set(result["losses"]) == {"base", "LoRA", "full fine-tuning"}
    assert len(result["checks"]) == 5
    assert all(check["held"] for check in result["checks"])
    assert "pretraining" in result["seconds"]
    status, out, _ = run(capsys, "demo", "--quick")
    assert status == 0
    assert "base from the cache" in out
    assert out.count("  ok  ") == 5


def test_demo_says_so_when_a_claim_does_not_hold(capsys, tmp_path, monkeypatch):
    """As if training had changed the base: its hash is another each time that it is taken."""
    monkeypatch.setenv("LORA_NP_CACHE", str(tmp_path / "cache"))
    hashes = iter(range(100))
    monkeypatch.setattr("lora_np.training.demonstration.model_hash", lambda _: f"{next(hashes):064}")
    status, out, _ = run(capsys, "demo", "--quick")
    assert status == 1
    assert "  FAIL  training left the base's bytes as they were" in out
    assert "  FAIL  unmerging gives back the base" in out


def test_demo_draws_the_loss_curves(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    monkeypatch.setenv("LORA_NP_CACHE", str(tmp_path / "cache"))
    assert run(capsys, "demo", "--quick", "--plot", tmp_path / "losses.png")[0] == 0
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_is_said_before_any_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = run(capsys, "demo", "--plot", tmp_path / "losses.png")
    assert status == 2
    assert "pip install matplotlib (the extra plot)" in err


def test_gradcheck_fails_when_a_bound_is_passed(capsys, monkeypatch):
    from lora_np.vectors.derivatives import Row

    rows = [Row("L4", "good", "complex step", 1e-16, 1e-12), Row("T3", "bad", "complex step", 1e-3, 1e-12)]
    monkeypatch.setattr("lora_np.vectors.derivatives.table", lambda *, seed: iter(rows))
    status, out, _ = run(capsys, "gradcheck")
    assert status == 1
    assert [line.split()[-1] for line in out.splitlines()] == ["ok", "FAIL"]
    assert json.loads(run(capsys, "gradcheck", "--json")[1])[1]["what"] == "bad"
    monkeypatch.setattr("lora_np.vectors.derivatives.table", lambda *, seed: iter(rows[:1]))
    assert run(capsys, "gradcheck")[0] == 0


BAD = {
    "no such file": (["--data", "none.txt"], r"none.txt: no such file"),
    "an empty file": (["--data", "empty.txt"], "the file is empty"),
    "not UTF-8": (["--data", "latin.txt"], "expected UTF-8 text; byte 3 is not"),
    "shorter than one window": (["--data", "short.txt"], "expected more than one window of 16 tokens"),
    "held-out part shorter than one window": (["--held-out", "0.001"], "expected more than one window of 16 tokens"),
    "a window longer than the model's": (["--window", "33"], "expected at most 32 tokens"),
    "r = 0": (["--r", "0"], "r: expected an integer of at least 1, got 0"),
    "r above min(in, out)": (["--r", "17"], r"expected a rank of at most min(in, out) = 16, got r = 17"),
    "an unknown target": (["--targets", "w"], "targets: 'w': expected names of q k v"),
    "a target that the model lacks": (["--targets", "gate"], "this model has no 'gate'"),
    "a learning rate of zero": (["--lr", "0"], "lr: expected a finite number above 0"),
    "a folder that is not empty": (["--out", "adapter"], "the folder is not empty"),
    "an adapter, and nothing to resume": (["--out", "adapter", "--resume"], "there is no checkpoint to go on from"),
    "no base there": (["--base", "nowhere"], "nowhere"),
    "a base with another vocabulary": (["--base", "words"], "expected a model of bytes, or one with its tokenizer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_to_finetune_ends_in_one_clear_line(home, capsys, case):
    change, message = BAD[case]
    argv = finetune(home, "never")
    for name, value in zip(change[::2], change[1::2], strict=False):
        value = str(home / value) if name in ("--data", "--out", "--base") else value
        argv = (
            [*argv[: argv.index(name) + 1], value, *argv[argv.index(name) + 2 :]]
            if name in argv
            else [*argv, name, value]
        )
    if change[-1] == "--resume":
        argv.append("--resume")
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert message in err
    assert err.startswith("lora-np: ")
    assert len(err.splitlines()) == 1
    assert not (home / "never").exists()


def test_divergence_has_a_status_of_its_own_and_keeps_the_last_good_checkpoint(home, capsys):
    status, _, err = run(capsys, *finetune(home, "diverged", "--lr", "1e38", "--every", "1", "--warmup", "20"))
    assert status == 1
    assert "learning rate" in err.splitlines()[-1]
    assert os.listdir(home / "diverged") == ["checkpoint.npz"]


@pytest.mark.parametrize("command", ["eval", "generate", "merge"])
def test_an_adapter_of_another_base_is_refused(home, capsys, command):
    more = {"eval": ["--data", home / "text.txt"], "generate": ["--prompt", "a"], "merge": ["--out", home / "never"]}
    status, _, err = run(capsys, command, "--base", home / "other", "--adapter", home / "adapter", *more[command])
    assert status == 2
    assert "base" in err
    assert len(err.splitlines()) == 1
    assert not (home / "never").exists()


def test_a_truncated_adapter_is_refused(home, capsys, tmp_path):
    for name in os.listdir(home / "adapter"):
        (tmp_path / name).write_bytes((home / "adapter" / name).read_bytes())
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    status, _, err = run(capsys, "eval", "--data", home / "text.txt", "--base", home / "base", "--adapter", tmp_path)
    assert status == 2
    assert "adapter_model.safetensors" in err
    assert len(err.splitlines()) == 1


def test_a_wrong_command_line_has_status_2_and_help_shows_examples(capsys):
    for argv in (["finetune"], ["nothing"], []):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    assert "lora-np finetune --data notes.txt --out adapter" in capsys.readouterr().out


def test_a_run_killed_and_resumed_ends_in_the_same_bits(home, tmp_path):
    """k steps, kill -9, resume, n - k steps: the adapter of n steps at once, to the last bit."""
    steps = 300
    argv = [sys.executable, "-m", "lora_np", *finetune(home, "killed", steps=steps)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = home / "killed" / "checkpoint.npz"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (home / "killed" / "adapter_model.safetensors").exists()
    assert cli.main(finetune(home, "killed", "--resume", "--lr", "0.5", steps=steps)) == 2  # another job: refused
    assert cli.main(finetune(home, "killed", "--resume", steps=steps)) == 0
    assert cli.main(finetune(home, "straight", steps=steps)) == 0
    model = ln.load_model(home / "base")
    killed, straight = (ln.load_adapter(home / name, model).params for name in ("killed", "straight"))
    assert killed.keys() == straight.keys()
    assert all(asnumpy(killed[n]).tobytes() == asnumpy(p).tobytes() for n, p in straight.items())


@pytest.fixture
def spec_extra():
    for library in ("jinja2", "latex2mathml", "mdit_py_plugins", "pygments"):
        pytest.importorskip(library, reason="the page needs the extra spec")


@pytest.mark.usefixtures("spec_extra")
def test_spec_writes_the_page_and_nothing_over_it(tmp_path, capsys):
    argv = ["spec", "--no-gradcheck", "--json", "--out", tmp_path / "spec"]
    status, out, _ = run(capsys, *argv)
    result = json.loads(out)
    assert (status, result["clauses"], result["beyond_bound"]) == (0, len(STATEMENTS), [])
    page = (tmp_path / "spec" / "index.html").read_bytes()
    assert result["page"] == f"{tmp_path / 'spec' / 'index.html'}"
    assert page.startswith(b"<!doctype html>")
    assert b"nothing, in this copy" in page
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert "exists already" in err
    assert (tmp_path / "spec" / "index.html").read_bytes() == page


@pytest.mark.usefixtures("spec_extra")
def test_spec_measures_and_fails_where_a_bound_is_passed(tmp_path, capsys, monkeypatch):
    rows = [("T3", "layer_norm", "complex step", 2e-12, 1e-12), ("T4", "rms_norm", "complex step", 3e-16, 1e-12)]
    monkeypatch.setattr(derivatives, "table", lambda: (derivatives.Row(*row) for row in rows))
    status, out, _ = run(capsys, "spec", "--out", tmp_path / "spec")
    assert status == 1
    assert "a derivative passes its bound: T3\n" in out
    page = (tmp_path / "spec" / "index.html").read_text()
    assert "2.0e-12" in page
    assert "3.0e-16" in page


def test_spec_says_what_it_needs(tmp_path, capsys, monkeypatch):
    for module in ("page", "markup"):
        monkeypatch.delitem(sys.modules, f"lora_np.spec.{module}", raising=False)
        monkeypatch.delattr(f"lora_np.spec.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    status, out, err = run(capsys, "spec", "--out", tmp_path / "spec")
    assert (status, out) == (2, "")
    assert (
        err
        == "lora-np: spec needs jinja2: "
        + install("jinja2 latex2mathml markdown-it-py mdit-py-plugins pygments", "spec")
        + "\n"
    )
    assert list(tmp_path.iterdir()) == []
