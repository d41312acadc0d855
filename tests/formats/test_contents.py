"""What an adapter's folder says, under every layout seen in the wild: the same A, B and s, and the same merge."""

import json
import re
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from hostile import GPT2, edit_json, hostile_json, hostile_texts, is_safe, steps_of, write_gpt2, write_peft
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from strategies import seeds, whole_numbers

from lora_np import cli
from lora_np.backend import asnumpy
from lora_np.formats.adapters.contents import read_contents
from lora_np.formats.files.messages import MAX_LINE
from lora_np.formats.merged.folder import merge_folder
from lora_np.formats.merged.survey import survey

CONFIG, WEIGHTS, MLX = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"
PREFIX = "base_model.model."
SIZES = {"q_proj": (6, 4), "k_proj": (2, 4), "mlp.up_proj": (5, 4), "mlp.down_proj": (4, 5)}
DTYPES = ["float64", "float32", "float16"]
try:
    import ml_dtypes  # noqa: F401 (makes bfloat16 known)

    DTYPES.append("bfloat16")
except ImportError:
    pass
BEFORE = ["", PREFIX, PREFIX * 2, f"module.{PREFIX}", f"{PREFIX}module.", f"_orig_mod.{PREFIX}", f"{PREFIX}_orig_mod."]
NAMES = ["", ".default", ".mine"]


def on_host(rng, *shape, **limits):
    """Small whole numbers, in host memory."""
    return asnumpy(whole_numbers(rng, *shape, **limits))


def random_pairs(rng):
    """A few modules, each with A, B of its own rank, of whole numbers; and their sizes."""
    every = [f"model.layers.{i}.{name}" for i in range(2) for name in SIZES]
    chosen = rng.permutation(every)[: rng.integers(1, len(every) + 1)]
    pairs = {}
    for name in sorted(chosen):
        n_out, n_in = SIZES[name.split(".", 3)[3]]
        r = int(rng.choice([1, 2, 4]))
        pairs[name] = (on_host(rng, r, n_in, limit=3), on_host(rng, n_out, r, limit=3))
    return pairs


def described(pairs, **more):
    """A configuration of exactly these modules, with alpha 4 but for one, and each module's s."""
    some = next(iter(pairs))
    ranks = {name: len(A) for name, (A, _) in pairs.items()}
    config = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 4, "target_modules": list(pairs),
        "rank_pattern": {f"^{name}": r for name, r in ranks.items()}, "alpha_pattern": {f"^{some}": 16}, **more,
    }  # fmt: skip
    return config, {name: (16 if name == some else 4) / r for name, r in ranks.items()}


def write_layout(folder, pairs, config, rng, *, before, after, base_layer, in_shards):
    """The adapter as some program may have written it, each tensor in a dtype of its own."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = {}
    for name, factors in pairs.items():
        for letter, values in zip("AB", factors, strict=True):
            key = f"{before}{name}{'.base_layer' * base_layer}.lora_{letter}{after}.weight"
            tensors[key] = values.astype(str(rng.choice(DTYPES)))
    if not in_shards:
        save_file(tensors, folder / WEIGHTS)
        return
    places = {key: f"adapter_model-0000{int(rng.integers(1, 4))}-of-00003.safetensors" for key in tensors}
    for file in set(places.values()):
        save_file({key: tensors[key] for key in tensors if places[key] == file}, folder / file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))


def write_base(folder, rng, prefix="model"):
    """A base of no known architecture. -> its tensors"""
    folder.mkdir(parents=True)
    tensors = {
        f"{prefix}.layers.{i}.{name}.weight": on_host(rng, *shape) for i in range(2) for name, shape in SIZES.items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "strange", "architectures": ["StrangeForCausalLM"]}))
    return tensors


def check_merge(home, base, pairs, scales, moved=lambda name: name):
    """The merged folder is W0 + s B A, exactly, as all numbers are whole; -> the remarks."""
    done = merge_folder(home / "base", [home / "ad"], [1.0], home / "out")
    merged = load_file(home / "out" / "model.safetensors")
    for key, W0 in base.items():
        updates = [s * B @ A for name, s in scales.items() for A, B in [pairs[name]] if f"{moved(name)}.weight" == key]
        np.testing.assert_array_equal(merged[key], W0 + sum(updates, np.zeros_like(W0)))
    return done.remarks


HOMES = count()


def home_of(tmp_path_factory):
    return tmp_path_factory.mktemp(f"h{next(HOMES)}")


@pytest.mark.proves("L5")
@given(
    seed=seeds, before=st.sampled_from(BEFORE), after=st.sampled_from(NAMES), base_layer=st.booleans(),
    in_shards=st.booleans(),
)  # fmt: skip
def test_a_layout_changes_neither_the_factors_nor_the_merge(
    tmp_path_factory, seed, before, after, base_layer, in_shards
):
    rng, home = np.random.default_rng(seed), home_of(tmp_path_factory)
    pairs = random_pairs(rng)
    config, scales = described(pairs)
    layout = {"before": before, "after": after, "base_layer": base_layer, "in_shards": in_shards}
    write_layout(home / "ad", pairs, config, rng, **layout)
    found = read_contents(home / "ad")
    assert found.pairs.keys() == pairs.keys()
    for name, (A, B) in pairs.items():
        (pair,) = found.pairs[name]
        assert (pair.s, pair.r, pair.bias) == (scales[name], len(A), None)
        np.testing.assert_array_equal(pair.A.astype("float64"), A)
        np.testing.assert_array_equal(pair.B.astype("float64"), B)
    is_pefts = (before, after, base_layer) == (PREFIX, "", False)
    remarks = check_merge(home, write_base(home / "base", rng), pairs, scales)
    for said in (found.remarks, survey(home / "ad").remarks, remarks):
        assert len(said) == (not is_pefts)
        assert is_pefts or f"{2 * len(pairs)} tensors have names under which PEFT finds nothing" in said[0]
        assert is_pefts or said[0].endswith("; lora-np convert writes a right file")


@pytest.mark.proves("L5")
@given(
    seed=seeds,
    change=st.sampled_from(
        [("model", "model"), ("model.model", "model"), ("", "model"), ("language_model.model", "model"),
         ("model", "language_model.model"), ("model.language_model", "language_model.model"),
         ("language_model.model", "model.language_model")]
    ),
)  # fmt: skip
def test_a_prefix_that_is_off_is_mended_where_it_is_certain_and_named(tmp_path_factory, seed, change):
    """The first is the adapter's, the second the base's."""
    rng, home = np.random.default_rng(seed), home_of(tmp_path_factory)
    of_base = random_pairs(rng)
    start = f"{change[0]}." if change[0] else ""
    pairs = {start + name.removeprefix("model."): pair for name, pair in of_base.items()}
    config, scales = described(pairs)
    layout = {"before": PREFIX, "after": "", "base_layer": False, "in_shards": False}
    write_layout(home / "ad", pairs, config, rng, **layout)
    base = write_base(home / "base", rng, change[1])
    remarks = check_merge(home, base, pairs, scales, lambda name: f"{change[1]}.{name.removeprefix(start)}")
    assert len(remarks) == (change[0] != change[1])
    for line in remarks:
        assert re.search(rf"{len(pairs)} modules begin with .+, where .+ has .+, merged as {change[1]}\.layers", line)
        assert line.endswith("; lora-np convert writes a right file")


def test_a_module_that_is_there_twice_is_refused(tmp_path):
    """Under its own name, and under one that would be mended to it: nothing says which is meant."""
    write_base(tmp_path / "base", np.random.default_rng(0))
    write_peft(tmp_path / "ad", {Q: (A, B), Q.removeprefix("model."): (A, B)}, r=2, alpha=4)
    with pytest.raises(ValueError, match="a module is there twice, under names that differ in a prefix"):
        merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "out")


@pytest.mark.proves("L5")
@given(seed=seeds, s=st.sampled_from([0.5, 2.0, 10.0, 20]))
def test_mlx_lms_factors_are_turned(tmp_path_factory, seed, s):
    rng, home = np.random.default_rng(seed), home_of(tmp_path_factory)
    pairs = random_pairs(rng)
    tensors = {}
    for name, (A, B) in pairs.items():
        tensors[f"{name}.lora_a"] = np.ascontiguousarray(A.T).astype(str(rng.choice(DTYPES)))
        tensors[f"{name}.lora_b"] = np.ascontiguousarray(B.T).astype(str(rng.choice(DTYPES)))
    write_mlx(home / "ad", tensors, s)
    assert check_merge(home, write_base(home / "base", rng), pairs, dict.fromkeys(pairs, s)) == []


@pytest.mark.parametrize(
    ("kind", "m", "said"),
    [
        ("dora", None, "fine_tune_type dora: expected m, got none"),
        ("lora", np.ones(4), "fine_tune_type lora: expected no m, got"),
        ("dora", np.ones(3), r"a magnitude of each row of B \(4, 2\), \(4,\), got \(3,\)"),
        ("dora", np.zeros(4), "expected magnitudes other than 0, got 4 of 0"),
        ("full", None, "expected 'lora' or 'dora', got 'full'"),
    ],
)
def test_mlx_lms_magnitudes_that_are_none(tmp_path, kind, m, said):
    tensors = {f"{Q}.lora_a": np.ones((3, 2)), f"{Q}.lora_b": np.ones((2, 4)), **({} if m is None else {f"{Q}.m": m})}
    write_mlx(tmp_path / "ad", tensors)
    path = tmp_path / "ad" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "fine_tune_type": kind}))
    with pytest.raises(ValueError, match=said):
        read_contents(tmp_path / "ad")


def write_mlx(folder, tensors, s=2.0):
    folder.mkdir(parents=True)
    save_file(tensors, folder / MLX)
    (folder / CONFIG).write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": s}}))


# --- What is refused, or said ----------------------------------------------------------------------------------------

Q = "model.layers.0.q_proj"
A, B = np.ones((2, 4), "float32"), np.ones((6, 2), "float32")
UNGATHERED = "shards of a training were not gathered before it was saved"


def write(folder, more=None, **settings):
    """An adapter of one module; more: further tensors."""
    write_peft(folder, {Q: (A, B)}, r=2, alpha=4, **settings)
    save_file(
        {**load_file(folder / WEIGHTS), **{PREFIX + key: value for key, value in (more or {}).items()}},
        folder / WEIGHTS,
    )


@pytest.mark.parametrize("shapes", [((4, 0), (0, 6)), ((0,), (0,)), ((4, 2), (2, 0))])
def test_mlx_lms_factors_without_an_element(tmp_path, shapes):
    write_mlx(tmp_path / "ad", {f"{Q}.lora_{letter}": np.zeros(s) for letter, s in zip("ab", shapes, strict=True)})
    with pytest.raises(ValueError, match=f"expected a tensor with elements, got shape .*; {UNGATHERED}"):
        read_contents(tmp_path / "ad")


@pytest.mark.parametrize(
    "key", [f"{Q}.lora_A.weight", "model.norm.weight", "model.embed_tokens.token_adapter.trainable_tokens_delta"]
)
def test_a_tensor_without_an_element(tmp_path, key):
    write(tmp_path / "ad", {key: np.zeros(0, "float32")}, trainable_token_indices=[1])
    with pytest.raises(ValueError, match=rf"got shape \(0,\); {UNGATHERED}"):
        read_contents(tmp_path / "ad")


@pytest.mark.parametrize("file", [WEIGHTS, MLX])
def test_a_file_without_a_tensor(tmp_path, file):
    write(tmp_path / "ad") if file == WEIGHTS else write_mlx(tmp_path / "ad", {})
    save_file({}, tmp_path / "ad" / file)
    with pytest.raises(ValueError, match=f"got no tensor at all; {UNGATHERED}"):
        read_contents(tmp_path / "ad")


@pytest.mark.parametrize(("tokens", "fits"), [([1, 3], True), ([1, 1], False)])
def test_a_token_is_trained_once(tmp_path, tokens, fits):
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((2, 4), "float32")}
    write(tmp_path / "ad", rows, trainable_token_indices=tokens)
    if fits:
        assert read_contents(tmp_path / "ad").rows["model.embed_tokens"][0] == tokens
        return
    with pytest.raises(ValueError, match=r"expected each token of model\.embed_tokens once, got \[1, 1\]"):
        read_contents(tmp_path / "ad")


@pytest.mark.parametrize("said", [None, False, True])
def test_a_bias_of_b_is_read_where_the_configuration_says_so(tmp_path, said):
    settings = {} if said is None else {"lora_bias": said}
    write(tmp_path / "ad", {f"{Q}.lora_B.bias": np.ones(6, "float32")}, **settings)
    found = read_contents(tmp_path / "ad")
    assert (found.pairs[Q][0].bias is not None) == bool(said)
    assert [line.partition(",")[0] for line in found.remarks] == ([] if said else ["lora_bias is not true"])


@pytest.mark.parametrize("name", ["adapter_model.bin", "model.pt"])
def test_a_pickle_is_refused_with_the_line_that_saves_it_anew(tmp_path, name):
    write(tmp_path / "ad")
    (tmp_path / "ad" / WEIGHTS).unlink()
    (tmp_path / "ad" / name).write_bytes(b"\x80\x04.")
    line = f'safetensors.torch.save_file(torch.load("{name}", weights_only=True), "adapter_model.safetensors")'
    with pytest.raises(ValueError, match=re.escape(f"save the weights as {WEIGHTS}: {line}")):
        read_contents(tmp_path / "ad")


@pytest.mark.parametrize(
    ("value", "fits"), [(0, False), (0.0, False), (1, False), (False, True), (None, True), ("", True)]
)
def test_an_unknown_key_is_passed_over_where_it_says_nothing(tmp_path, value, fits):
    """A zero may be a number that counts."""
    write(tmp_path / "ad", use_something=value)
    if fits:
        assert read_contents(tmp_path / "ad").pairs
        return
    with pytest.raises(ValueError, match="use_something: not known, so not supported"):
        read_contents(tmp_path / "ad")


def test_the_argument_of_a_start_that_changes_the_base_is_refused_as_that(tmp_path):
    write(tmp_path / "ad", path_initial_model_for_weight_conversion="start")
    with pytest.raises(ValueError, match="not supported \\(a start that changes the base"):
        read_contents(tmp_path / "ad")


def test_an_adapter_in_shards_runs_where_the_model_does(tmp_path, capsys):
    """Its effect is that of the one file that convert makes of it."""
    config = replace(GPT2, n_layer=1)
    write_gpt2(tmp_path / "base", config)
    D, rng, module = config.d_model, np.random.default_rng(0), "transformer.h.0.attn.c_attn"
    pairs = {module: (on_host(rng, 2, D), on_host(rng, 3 * D, 2))}
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    layout = {"before": PREFIX, "after": "", "base_layer": False, "in_shards": True}
    write_layout(tmp_path / "ad", pairs, about, rng, **layout)
    folders = ["--base", str(tmp_path / "base"), "--adapter", str(tmp_path / "ad")]
    assert cli.main(["verify", *folders]) == 0
    effect = capsys.readouterr().out
    assert "the largest change of a logit is" in effect
    assert cli.main(["convert", *folders, "--out", str(tmp_path / "right")]) == 0
    capsys.readouterr()
    assert cli.main(["verify", *folders[:3], str(tmp_path / "right")]) == 0
    assert capsys.readouterr().out == effect


# --- Hostile files ---------------------------------------------------------------------------------------------------


def says_one_line(folder):
    """A folder's reading ends in contents or one line, and so does what is remarked."""
    said = []
    try:
        said += survey(folder).remarks
    except (ValueError, FileNotFoundError) as error:
        said.append(str(error))
    assert all(is_safe(line) and len(line) <= MAX_LINE for line in said)


@given(data=st.data())
def test_any_configuration_gives_contents_or_one_line(tmp_path_factory, data):
    home = home_of(tmp_path_factory)
    write(home / "ad", exclude_modules=["k_proj"], modules_to_save=["norm"], target_parameters=["experts.up"])
    text = (home / "ad" / CONFIG).read_text()
    (home / "ad" / CONFIG).write_bytes(data.draw(hostile_json(text)))
    says_one_line(home / "ad")


@given(names=st.lists(hostile_texts() | st.sampled_from([Q, "model", ""]), min_size=1, max_size=4))
def test_any_name_gives_contents_or_one_line(tmp_path_factory, names):
    home = home_of(tmp_path_factory)
    name = ".".join(names).encode("utf-8", "replace").decode()
    write(home / "ad", {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B, f"{name}.weight": A})
    says_one_line(home / "ad")


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("text", ["(a+)+$", "[", "(?P<x>a)(?P<x>b)", "a{99999}{99999}", r"(.*)\1\1\1x"])
def test_an_expression_ends_in_bounded_time(tmp_path, key, text):
    write(tmp_path / "ad")
    edit_json(tmp_path / "ad" / CONFIG, **{key: {text: 2} if key.endswith("pattern") else text})
    says_one_line(tmp_path / "ad")


def test_time_grows_with_the_number_of_tensors_alone(tmp_path):
    """Twice as many modules and targets take twice the steps, and some: not four times."""
    steps = []
    for n in (100, 200):
        folder = tmp_path / str(n)
        write_peft(folder, {f"model.layers.{i}.q_proj": (A, B) for i in range(n)}, r=2, alpha=4)
        steps.append(steps_of(lambda folder=folder: survey(folder)))
    assert steps[1] < 2.5 * steps[0]
