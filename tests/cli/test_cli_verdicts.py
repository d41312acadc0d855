"""No yes, and no status 0, of numbers that are none, or of an input with nothing in it that counts."""

import json
import shutil

import numpy as np
import pytest
from strategies import trained_adapter

pytest.importorskip("safetensors", reason="files of models: the extra cli")
from hostile import GPT2, edit_json, edit_tensors, raw_safetensors, write_gpt2, write_peft
from safetensors.numpy import load_file

import lora_np as ln
from lora_np import cli
from lora_np.formats.merged.comparison import compare
from lora_np.formats.merged.plan import plan_merge

CONFIG = ln.Config(256, 32, n_layer=1, n_head=2, d_model=16, d_ff=32)
MODULE, SHAPE, R = "transformer.h.1.mlp.c_fc", (GPT2.d_ff, GPT2.d_model), 4
WEIGHTS, TENSORS = "model.safetensors", "adapter_model.safetensors"
HUGE = 1e300  # as alpha: s B A is a float64, and no float32


def strict(text):
    """JSON without NaN and Infinity, which no standard knows."""

    def refused(name):
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refused)


def run(capsys, *argv):
    """The exit status, the output, and errors: of which there is one line at most."""
    capsys.readouterr()
    status = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert len(err.splitlines()) <= 1
    return status, out, err


@pytest.fixture
def home(tmp_path):
    """A GPT-2 with an adapter, and a base of bytes with one and a text; of each also one that overflows."""
    rng = np.random.default_rng(0)
    write_gpt2(tmp_path / "base", GPT2)
    write_gpt2(tmp_path / "large", GPT2)
    edit_tensors(tmp_path / "large" / WEIGHTS, lambda t: t.update({k: v * np.float32(1e30) for k, v in t.items()}))
    factors = {MODULE: (rng.standard_normal((R, SHAPE[1]), "float32"), rng.standard_normal((SHAPE[0], R), "float32"))}
    write_peft(tmp_path / "ad", factors, r=R, alpha=8)
    write_peft(tmp_path / "far", factors, r=R, alpha=HUGE)
    weights = ln.init_weights(CONFIG, seed=0)
    model = ln.Model(CONFIG, weights)
    ln.save_model(tmp_path / "bytes", model)
    loud = {**weights, "norm.weight": weights["norm.weight"] * 3e38, "embed.tokens": weights["embed.tokens"] * 100}
    ln.save_model(tmp_path / "loud", ln.Model(CONFIG, {name: value.astype("float32") for name, value in loud.items()}))
    for name, alpha in (("bytes-ad", 8), ("bytes-far", HUGE)):
        ln.save_adapter(tmp_path / name, trained_adapter(model, ln.LoRAConfig(r=2, alpha=alpha), seed=1), model)
    (tmp_path / "text.txt").write_text("some words in a text " * 100)
    return tmp_path


# --- Numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "adapter", "whose"),
    [
        ("base", "far", ["the base with the adapter"]),
        ("large", "ad", ["the base", "the base with the adapter"]),
    ],
)
def test_verify_draws_no_verdict_from_outputs_that_overflow(home, capsys, base, adapter, whose):
    argv = ["verify", "--base", home / base, "--adapter", home / adapter]
    status, out, _ = run(capsys, *argv)
    assert status == 1
    for name in whose:
        assert f"no verdict: outputs of {name} are NaN or infinite" in out
    assert "change" not in out
    status, out, _ = run(capsys, *argv, "--json")
    result = strict(out)
    assert (status, result["holds"], result["not_finite"], result["effect"]) == (1, False, whose, {})


def test_a_merge_that_overflows_is_none_whatever_the_folder_holds(home, capsys):
    """Not even one with the infinite numbers that rounding makes of the sum."""
    (pair,) = [load_file(home / "far" / TENSORS)]
    A, B = (pair[f"base_model.model.{MODULE}.lora_{part}.weight"].astype(float) for part in "AB")
    shutil.copytree(home / "base", home / "merged")
    with np.errstate(over="ignore"):
        due = (HUGE / R * (B @ A)).astype("float32").T
    edit_tensors(home / "merged" / WEIGHTS, lambda t: t.update({f"{MODULE}.weight": np.ascontiguousarray(due)}))
    found = compare(plan_merge(home / "base", [home / "far"], [1.0]), home / "merged", 1)
    assert not found.holds
    assert [(one.tensor, one.differing, one.not_finite) for one in found.changed] == [(f"{MODULE}.weight", 0, due.size)]
    argv = ["verify", "--base", home / "base", "--adapter", home / "far", "--merged", home / "merged"]
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert f"{MODULE}.weight: holds numbers that are NaN" in err
    status, out, _ = run(capsys, *argv[:-1], home / "base", "--json")
    (one,) = strict(out)["merged"]["changed"]
    assert (status, one["not_finite"]) == (1, due.size)


@pytest.mark.parametrize("steps", [0, 5])
def test_a_scale_whose_update_no_float_holds_is_bad_input(home, capsys, steps):
    edit_json(home / "ad" / "adapter_config.json", lora_alpha=1e308)
    argv = ["inspect", home / "ad"] if steps else ["verify", "--base", home / "base", "--adapter", home / "ad"]
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert f"ad/{TENSORS}: {MODULE}: the norm of s B A is too large, with s = 2.5e+307" in err


def test_inspect_measures_a_base_whose_squares_overflow(home, capsys):
    shutil.copytree(home / "base", home / "wide")
    edit_tensors(home / "wide" / WEIGHTS, lambda t: t.update({k: v.astype("float64") * 1e200 for k, v in t.items()}))
    status, out, _ = run(capsys, "inspect", home / "ad", "--base", home / "wide", "--json")
    W = load_file(home / "base" / WEIGHTS)[f"{MODULE}.weight"].astype(float)
    assert status == 0
    assert strict(out)["modules"][0]["norm_W0"] == pytest.approx(1e200 * np.linalg.norm(W), rel=1e-12)


@pytest.mark.parametrize("targets", ["c" * 10**5, ["c_fc"] * 10**5])
def test_inspect_shows_a_part_of_long_targets(home, capsys, targets):
    edit_json(home / "ad" / "adapter_config.json", target_modules=targets)
    status, out, _ = run(capsys, "inspect", home / "ad")
    assert status == 0
    assert max(map(len, out.splitlines())) < 300


@pytest.mark.parametrize(
    ("options", "whose"),
    [
        (["--base", "loud"], "the base's weights overflow in float32"),
        (["--base", "bytes", "--adapter", "bytes-far"], "the base's weights, or the adapter's, overflow in float32"),
    ],
)
def test_a_loss_that_is_no_number_is_no_result(home, capsys, options, whose):
    argv = [home / one if not one.startswith("--") else one for one in options]
    status, out, err = run(capsys, "eval", *argv, "--data", home / "text.txt")
    assert (status, out) == (1, "")
    assert f"{' with '.join(map(str, argv[1::2]))}: the held-out loss is " in err
    assert whose in err


def test_finetune_on_a_base_that_overflows_ends_before_its_first_step(home, capsys):
    argv = ["finetune", "--base", home / "loud", "--data", home / "text.txt", "--out", home / "out", "--steps", "2"]
    status, out, err = run(capsys, *argv, "--window", "16")
    assert (status, out) == (1, "")
    assert "the held-out loss is " in err
    assert not (home / "out").exists()


@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_no_text_is_generated_from_logits_that_are_no_numbers(home, capsys, temperature):
    argv = ["generate", "--base", home / "loud", "--prompt", "some", "-n", "4", "--temperature", temperature]
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert "generate: logits are NaN or infinite" in err


@pytest.mark.parametrize("patterns", [{"lora_alpha": 0}, {"alpha_pattern": {MODULE: 0}}])
def test_an_adapter_whose_scale_is_0_changes_nothing(home, capsys, patterns):
    edit_json(home / "ad" / "adapter_config.json", **patterns)
    argv = ["verify", "--base", home / "base", "--adapter", home / "ad"]
    status, out, _ = run(capsys, *argv)
    assert status == 1
    assert "trained: no: its scale is 0: it changes nothing" in out
    result = strict(run(capsys, *argv, "--json")[1])
    assert (result["holds"], result["trained"]) == (False, False)
    assert "B is not zero, but its scale is 0: it changes nothing" in run(capsys, "inspect", home / "ad")[1]


# --- Nothing that counts ---------------------------------------------------------------------------------------------


def renamed(change):
    return lambda tensors: {change(name): value for name, value in tensors.items()}


EMPTY = {
    "no tensor": lambda tensors: {},
    "B alone": lambda tensors: {name: value for name, value in tensors.items() if "lora_B" in name},
    "in capitals": renamed(lambda name: name.replace("lora_", "LORA_")),
    "another name": renamed(lambda name: name.replace(".lora_A.weight", ".down").replace(".lora_B.weight", ".up")),
    "an A too many": lambda tensors: {**tensors, f"base_model.model.{MODULE}.lora_a.weight": np.ones(3, "float32")},
}


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("command", ["inspect", "verify", "merge"])
def test_an_adapter_without_its_factors_is_none(home, capsys, command, case):
    def change(tensors):
        found = EMPTY[case](dict(tensors))
        tensors.clear()
        tensors.update(found)

    edit_tensors(home / "ad" / TENSORS, change)
    if case == "no tensor":  # of which some versions of safetensors write a damaged file
        raw_safetensors(home / "ad" / TENSORS, {}, b"")
    argv = {
        "inspect": ["inspect", home / "ad"],
        "verify": ["verify", "--base", home / "base", "--adapter", home / "ad"],
        "merge": ["merge", "--base", home / "base", "--adapter", home / "ad", "--out", home / "out"],
    }
    status, out, err = run(capsys, *argv[command])
    assert (status, out) == (2, "")
    assert f"ad/{TENSORS}: " in err
    assert "expected lora_A and lora_B" in err or "is missing" in err or "has no place" in err
    assert not (home / "out").exists()


@pytest.mark.parametrize("windows", ["0", "-3"])
def test_no_windows_are_no_evaluation(home, capsys, windows):
    argv = ["eval", "--base", home / "bytes", "--data", home / "text.txt", "--windows", windows]
    assert run(capsys, *argv) == (2, "", f"lora-np: --windows: expected 1 or more, got {windows}\n")
