"""lora-np verify and inspect: yes for what is right, no for each planted fault, named; norms by hand."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hostile import GPT2, edit_json, edit_tensors, write_gpt2, write_peft
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from strategies import trained_adapter
from test_rounding import dtype_of

import lora_np as ln
from lora_np import cli
from lora_np.formats.merged.folder import merge_folder

CONFIG, WEIGHTS, TENSORS = "config.json", "model.safetensors", "adapter_model.safetensors"
D, F = GPT2.d_model, GPT2.d_ff
R, ALPHA = 4, 6
MODULES = {
    "transformer.h.0.attn.c_attn": (3 * D, D),
    "transformer.h.1.mlp.c_fc": (F, D),
    "transformer.h.1.mlp.c_proj": (D, F),
}
TOUCHED, UNTOUCHED = "transformer.h.1.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.weight"


def random_factors(seed, size=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal((R, n_in), "float32"), size * rng.standard_normal((n_out, R), "float32"))
        for name, (n_out, n_in) in MODULES.items()
    }


def make(home, dtype="float32", size=1.0):
    """A base, an adapter, and the merge of the two."""
    write_gpt2(home / "base", GPT2, dtype=dtype)
    write_peft(home / "ad", random_factors(1, size), r=R, alpha=ALPHA)
    merge_folder(home / "base", [home / "ad"], [1.0], home / "merged")
    return home


@pytest.fixture
def home(tmp_path):
    return make(tmp_path)


def verify(capsys, home, *more, adapter="ad", merged="merged"):
    capsys.readouterr()
    argv = ["verify", "--base", home / "base", "--adapter", home / adapter, *more]
    argv += [] if merged is None else ["--merged", home / merged]
    status = cli.main([str(part) for part in (*argv, "--json")])
    out, err = capsys.readouterr()
    assert status < 2, err
    assert cli.main([str(part) for part in argv]) == status
    return status, json.loads(out), capsys.readouterr().out


def test_the_merge_is_right_to_the_bit(home, capsys):
    status, result, text = verify(capsys, home)
    assert status == 0
    assert result["merged"]["holds"]
    assert {one["tensor"] for one in result["merged"]["changed"]} == {f"{name}.weight" for name in MODULES}
    assert all(one["max_ulps"] == one["differing"] == 0 for one in result["merged"]["changed"])
    assert "merged: yes, exactly" in text
    assert "records no hash of its base" in text
    assert result["effect"]["effect of the adapter"]["change"] > 0.1
    assert result["effect"]["merged beside unmerged"]["change"] < 1e-4


def plant(home, scale=1.0, *, add=(), base="base"):
    """A folder with the base and `scale` times the update in each adapted tensor, summed in float32."""
    shutil.copytree(home / base, home / "planted")

    def change(tensors):
        for name, (A, B) in [*random_factors(1).items(), *add]:
            key = f"{name}.weight"
            tensors[key] = (tensors[key] + scale * ALPHA / R * (B @ A).T).astype("float32")

    edit_tensors(home / "planted" / WEIGHTS, change)


SCALES = {
    "no scale": (R / ALPHA, "B A with no scale"),
    "alpha alone": (R, "B A times alpha"),
    "alpha / sqrt(r)": (np.sqrt(R), "alpha / sqrt(r)"),
    "s twice": (ALPHA / R, "the scale applied twice"),
    "subtracted": (-1.0, "the adapter subtracted"),
    "merged twice": (2.0, "the adapter merged twice"),
    "not merged": (0.0, "nothing was merged"),
    "three quarters": (0.75, "0.75 times its scale"),
}


WRAPPED = {
    "another wrapper": ("base_model.model.", "base_model.model.module."),
    "none": ("base_model.model.", ""),
    "an adapter's name": (".weight", ".default.weight"),
    "no trunk": ("transformer.", ""),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_an_adapter_of_other_names_is_the_same_and_convert_mends_it(home, case):
    """As it stands and as convert writes it, it is the adapter that its own names give."""
    model = ln.load_model(home / "base")
    right = ln.load_adapter(home / "ad", model)
    tensors = load_file(home / "ad" / TENSORS)
    save_file({key.replace(*WRAPPED[case]): value for key, value in tensors.items()}, home / "ad" / TENSORS)
    odd = ln.load_adapter(home / "ad", model)
    argv = ["convert", "--base", home / "base", "--adapter", home / "ad", "--out", home / "mended"]
    assert cli.main([str(part) for part in argv]) == 0
    for found in (odd, ln.load_adapter(home / "mended", model)):
        assert found.params.keys() == right.params.keys()
        assert {name: found.config.scale(name) for name in found.matrices} == {
            name: right.config.scale(name) for name in right.matrices
        }
        assert all(np.array_equal(ln.asnumpy(found.params[k]), ln.asnumpy(right.params[k])) for k in right.params)


@pytest.mark.parametrize("case", SCALES)
def test_another_scale_is_found_and_named(home, capsys, case):
    scale, text = SCALES[case]
    plant(home, scale)
    status, result, shown = verify(capsys, home, merged="planted")
    assert status == 1
    assert result["merged"]["scale"] == pytest.approx(scale, abs=1e-4)
    assert all(one["scale"] == pytest.approx(scale, abs=1e-3) for one in result["merged"]["changed"])
    assert text in result["merged"]["looks_like"]
    assert result["merged"]["looks_like"] in shown


def test_a_merge_summed_in_float32_is_right_and_not_exact(home, capsys):
    plant(home)
    status, result, text = verify(capsys, home, merged="planted")
    assert status == 0
    assert sum(one["differing"] for one in result["merged"]["changed"]) > 50
    assert "rounded more often than once" in text
    assert verify(capsys, home, "--ulps", "0", merged="planted")[0] == 1
    assert verify(capsys, home, "--ulps", "0")[0] == 0


@pytest.mark.parametrize("steps", [2, -2, 1000])
@given(at=st.integers(0, D * F - 1))
def test_one_element_two_ulps_off_is_found(tmp_path_factory, steps, at):
    home = make(tmp_path_factory.mktemp("home"))

    def change(tensors):
        flat = tensors[TOUCHED].reshape(-1)
        for _ in range(abs(steps)):
            flat[at] = np.nextafter(flat[at], np.float32(np.inf * steps))

    edit_tensors(home / "merged" / WEIGHTS, change)
    from lora_np.formats.merged.comparison import compare
    from lora_np.formats.merged.plan import plan_merge

    plan = plan_merge(home / "base", [home / "ad"], [1.0])
    found = compare(plan, home / "merged", 1)
    assert not found.holds
    (off,) = [one for one in found.changed if one.differing]
    assert (off.tensor, off.differing, off.max_ulps, off.beyond) == (TOUCHED, 1, abs(steps), 1)
    assert compare(plan, home / "merged", abs(steps)).holds


def test_differences_are_told_as_they_are_and_beside_the_largest_element(home, capsys):
    """Two planted ones, of which the larger counts; the largest element is of the merge as it should be."""
    due = load_file(home / "merged" / WEIGHTS)[TOUCHED].astype("float64")
    planted = {tuple(np.argwhere(abs(due) == part(abs(due)))[0]): d for part, d in ((np.min, 0.125), (np.max, 2.0))}

    def plant_them(tensors):
        for place, value in planted.items():
            tensors[TOUCHED][place] = value

    edit_tensors(home / "merged" / WEIGHTS, plant_them)
    expected = max(abs(value - due[place]) for place, value in planted.items())
    status, result, text = verify(capsys, home)
    assert status == 1
    (off,) = [one for one in result["merged"]["changed"] if one["differing"]]
    assert (off["tensor"], off["differing"]) == (TOUCHED, 2)
    assert off["max_difference"] == pytest.approx(expected, rel=1e-6)
    assert off["relative"] == pytest.approx(expected / abs(due).max(), rel=1e-6)
    sizes = [f"{off['max_difference']:.3g}", f"{off['relative']:.3g}"]
    assert f"a difference of {sizes[0]}, {sizes[1]} of its largest element" in text
    (row,) = [line.split() for line in text.splitlines() if line.split()[0] == TOUCHED]
    assert row[4:6] == sizes
    others = [one for one in result["merged"]["changed"] if one["tensor"] != TOUCHED]
    assert others
    assert all(one["max_difference"] == one["relative"] == 0 for one in others)


def test_a_difference_that_no_number_holds_is_the_largest_and_a_tensor_of_zeros_has_no_relative_one():
    from lora_np.formats.merged.comparison import difference
    from lora_np.formats.merged.target import Rows

    def rows(start, merged):
        return Rows(place=np.array([[merged]]), W0=np.array([[start]]), updates=[])

    with np.errstate(over="ignore"):  # as the command line has it
        found, _ = difference("a", 1, [rows(-1.7e308, 1.7e308)], 1)
    assert found.max_difference == np.finfo(np.float64).max
    found, _ = difference("a", 1, [rows(0.0, 3.0)], 1)
    assert (found.max_difference, found.relative) == (3.0, None)


def one_bit(tensors):
    tensors[UNTOUCHED].view("uint32")[0, 0] ^= 1


def minus_zero(tensors):
    tensors["transformer.ln_f.bias"][:] = -0.0


def nan(tensors):
    tensors[TOUCHED][0, 0] = np.nan


FAULTS = {
    "an untouched tensor": (one_bit, "altered", UNTOUCHED),
    "a sign of zero": (minus_zero, "altered", "transformer.ln_f.bias"),
    "one missing": (lambda t: t.pop(UNTOUCHED), "missing", UNTOUCHED),
    "a touched one missing": (lambda t: t.pop(TOUCHED), "missing", TOUCHED),
    "one too many": (lambda t: t.update(more=np.zeros(3)), "extra", "more"),
    "another shape": (lambda t: t.update({TOUCHED: np.zeros((2, 2), "float32")}), "misshapen", TOUCHED),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_tensor_that_should_not_be_so_is_named(home, capsys, case):
    change, what, name = FAULTS[case]
    edit_tensors(home / "merged" / WEIGHTS, change)
    status, result, text = verify(capsys, home)
    assert status == 1
    assert result["merged"][what] == [name]
    assert name in text


def test_nan_another_adapter_and_another_model(home, capsys):
    write_peft(home / "other", random_factors(2), r=R, alpha=ALPHA)
    status, result, _ = verify(capsys, home, adapter="other")
    assert status == 1
    assert result["merged"]["looks_like"] == "something else than this adapter"
    edit_json(home / "merged" / CONFIG, layer_norm_epsilon=1e-3)
    status, result, text = verify(capsys, home)
    assert status == 1
    assert not result["merged"]["same_config"]
    assert "another model" in text


def test_a_number_that_is_none_is_a_fault(home):
    from lora_np.formats.merged.comparison import compare
    from lora_np.formats.merged.mistakes import explained
    from lora_np.formats.merged.plan import plan_merge

    edit_tensors(home / "merged" / WEIGHTS, nan)
    plan = plan_merge(home / "base", [home / "ad"], [1.0])
    found = compare(plan, home / "merged", 1)
    assert not found.holds
    assert found.scale is None
    assert explained(found, {}) is None


@pytest.mark.parametrize("scale", [2.0, 0.0])
def test_an_update_smaller_than_an_ulp_is_seen_by_its_scale(tmp_path, capsys, scale):
    """In bfloat16 most of a small update is rounded away: within 1 ulp, twice the update and none look alike."""
    dtype = dtype_of("BF16")
    base = write_gpt2(tmp_path / "base", GPT2, dtype=dtype)
    write_peft(tmp_path / "ad", random_factors(1, 1e-3), r=R, alpha=ALPHA)
    for name in MODULES:  # an ulp of each of these numbers is more than the update
        W = base[f"{name}.weight"].astype("float32")
        base[f"{name}.weight"] = (np.sign(W) * (1.1 + np.abs(W) % 0.8)).astype(dtype)
    save_file(base, tmp_path / "base" / WEIGHTS)
    merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "merged")
    shutil.copytree(tmp_path / "base", tmp_path / "planted")
    for name, (A, B) in random_factors(1, 1e-3).items():
        W = base[f"{name}.weight"].astype("float64") + scale * ALPHA / R * (B.astype(float) @ A).T
        base[f"{name}.weight"] = W.astype("float32").astype(dtype)
    save_file(base, tmp_path / "planted" / WEIGHTS)
    assert verify(capsys, tmp_path)[0] == 0
    status, result, _ = verify(capsys, tmp_path, merged="planted")
    assert status == 1
    assert max(one["max_ulps"] for one in result["merged"]["changed"]) == 1
    assert result["merged"]["looks_like"] is not None


def test_an_adapter_that_is_not_trained(home, capsys):
    pairs = {name: (A, 0 * B) for name, (A, B) in random_factors(1).items()}
    write_peft(home / "fresh", pairs, r=R, alpha=ALPHA)
    status, result, text = verify(capsys, home, adapter="fresh", merged=None)
    assert (status, result["trained"], result["holds"]) == (1, False, False)
    assert "trained: no" in text
    assert result["effect"]["effect of the adapter"] == {"change": 0.0, "kl": 0.0, "flipped": 0, "places": 8}
    model = ln.load_model(home / "base")
    adapter = ln.init_adapter(model, ln.LoRAConfig(r=2, bias="all"), seed=0)
    ln.save_adapter(home / "biases", adapter, model)
    assert verify(capsys, home, adapter="biases", merged=None)[0] == 1
    moved = replace(adapter, params={**adapter.params, "norm.bias": adapter.params["norm.bias"] + 1})
    ln.save_adapter(home / "moved", moved, model)
    assert verify(capsys, home, adapter="moved", merged=None)[0] == 0


def test_an_adapter_that_does_not_fit(home, capsys):
    model = ln.load_model(home / "base")
    ln.save_adapter(home / "ours", trained_adapter(model, ln.LoRAConfig(r=2), seed=1), model)
    status, result, text = verify(capsys, home, adapter="ours", merged=None)
    assert (status, result["base_hash"]) == (0, True)
    assert "the recorded hash of the base" in text
    edit_tensors(home / "base" / WEIGHTS, one_bit)
    status, result, text = verify(capsys, home, adapter="ours", merged=None)
    assert (status, result["fits"]) == (1, False)
    assert "another base" in text
    wide = {"transformer.h.0.mlp.c_fc": (np.ones((R, D + 1), "float32"), np.ones((F, R), "float32"))}
    write_peft(home / "wide", wide, r=R, alpha=ALPHA)
    status, result, _ = verify(capsys, home, adapter="wide", merged=None)
    assert (status, result["fits"]) == (1, False)


@pytest.mark.parametrize(
    "bad", ["no adapter", "no base", "no merged", "damaged", "a prompt without a tokenizer", "fewer than no ulps"]
)
def test_bad_input_has_another_status_than_no(home, capsys, bad):
    argv = ["verify", "--base", home / "base", "--adapter", home / "ad", "--merged", home / "merged"]
    if bad == "damaged":
        file = home / "ad" / TENSORS
        file.write_bytes(file.read_bytes()[:-3])
    elif bad == "a prompt without a tokenizer":
        argv += ["--prompt", "Hello"]
    elif bad == "fewer than no ulps":
        argv += ["--ulps", "-1"]
    else:
        (home / {"no adapter": "ad", "no base": "base", "no merged": "merged"}[bad]).rename(home / "away")
    capsys.readouterr()
    assert cli.main([str(part) for part in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1


def test_a_prompt_is_what_outputs_are_compared_on(tmp_path, capsys):
    """A base of bytes: the change of the logits is that of the prompt's own bytes."""
    config = ln.Config(256, 32, n_layer=1, n_head=2, d_model=16, d_ff=32)
    model = ln.Model(config, ln.init_weights(config, seed=0))
    adapter = trained_adapter(model, ln.LoRAConfig(r=2), seed=1)
    ln.save_model(tmp_path / "base", model)
    ln.save_adapter(tmp_path / "ad", adapter, model)
    status, result, _ = verify(capsys, tmp_path, "--prompt", "Hello", merged=None)
    tokens = np.array([list(b"Hello")])
    before, after = (ln.asnumpy(ln.forward(model, tokens, each)) for each in (None, adapter))
    assert status == 0
    assert result["effect"]["effect of the adapter"]["change"] == float(np.abs(after.astype(float) - before).max())
    assert result["effect"]["effect of the adapter"]["places"] == 5


# --- inspect ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, R])
def test_inspect_tells_norms_and_effective_ranks(home, capsys, rank):
    """Against the matrices formed: s B A, its singular values, W0 of each."""
    pairs = random_factors(3)
    if rank == 1:
        pairs = {name: (A[:1].repeat(R, axis=0), B) for name, (A, B) in pairs.items()}
    write_peft(home / "seen", pairs, r=R, alpha=ALPHA)
    capsys.readouterr()
    assert cli.main(["inspect", str(home / "seen"), "--base", str(home / "base"), "--json"]) == 0
    modules = {module["name"]: module for module in json.loads(capsys.readouterr().out)["modules"]}
    assert modules.keys() == pairs.keys()
    base = load_file(home / "base" / WEIGHTS)
    for name, (A, B) in pairs.items():
        dW = ALPHA / R * (B.astype(float) @ A.astype(float))
        sigma = np.linalg.svd(dW, compute_uv=False)[:rank]
        shares = sigma / sigma.sum()
        expected = {
            "norm_A": np.linalg.norm(A), "norm_B": np.linalg.norm(B), "norm_update": np.linalg.norm(dW),
            "effective_rank": np.exp(-(shares * np.log(shares)).sum()),
            "norm_W0": np.linalg.norm(base[f"{name}.weight"].astype(float)),
        }  # fmt: skip
        expected["ratio"] = expected["norm_update"] / expected["norm_W0"]
        for what, value in expected.items():
            assert modules[name][what] == pytest.approx(value, rel=1e-5), what
    assert cli.main(["inspect", str(home / "seen"), "--base", str(home / "base")]) == 0
    assert "|W0|" in capsys.readouterr().out


def test_inspect_of_look_ups_heads_and_nothing(home, capsys):
    model = ln.load_model(home / "base")
    lora = ln.LoRAConfig(r=2, targets=("embed", "head"))
    ln.save_adapter(home / "ours", ln.init_adapter(model, lora, seed=0), model)
    capsys.readouterr()
    assert cli.main(["inspect", str(home / "ours"), "--base", str(home / "base"), "--json"]) == 0
    modules = json.loads(capsys.readouterr().out)["modules"]
    norm = np.linalg.norm(load_file(home / "base" / WEIGHTS)["transformer.wte.weight"].astype(float))
    assert [module["norm_W0"] for module in modules] == pytest.approx([norm, norm])  # the head is tied
    assert [(module["effective_rank"], module["norm_update"], module["ratio"]) for module in modules] == [(0, 0, 0)] * 2
    write_peft(home / "strange", {"transformer.h.7.mlp.c_fc": random_factors(1)[TOUCHED[:-7]]}, r=R, alpha=ALPHA)
    assert cli.main(["inspect", str(home / "strange"), "--base", str(home / "base")]) == 2
    assert "h.7.mlp.c_fc: expected a module of" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["int64", "bool", "uint8"])
def test_a_buffer_kept_in_a_dtype_that_no_weight_has_is_not_the_bases(tmp_path, capsys, dtype):
    """GPT-2's causal mask, which old files have among the tensors: it is no weight, but it is not the base's byte."""
    name = "transformer.h.0.attn.bias"
    write_gpt2(tmp_path / "base", GPT2)
    edit_tensors(tmp_path / "base" / WEIGHTS, lambda t: t.update({name: np.tri(4, dtype="float32")}))
    write_peft(tmp_path / "ad", random_factors(1), r=R, alpha=ALPHA)
    merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "merged")
    edit_tensors(tmp_path / "merged" / WEIGHTS, lambda t: t.update({name: np.tri(4).astype(dtype)}))
    status, result, _ = verify(capsys, tmp_path)
    assert status == 1
    assert result["merged"]["altered"] == [name]
