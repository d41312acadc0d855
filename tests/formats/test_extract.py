"""The nearest LoRA to what changed between two folders: its update, what it says is lost, and what it leaves out."""

import json

import numpy as np
import pytest
from hostile import GPT2, edit_json, edit_tensors, write_gpt2
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from strategies import seeds

from lora_np.formats.adapters.contents import read_contents
from lora_np.formats.merged.extract import extract, total_lost
from lora_np.formats.merged.folder import merge_folder

WEIGHTS, LAYER = "model.safetensors", "transformer.h.0"
SQUARE = f"{LAYER}.attn.c_proj"


@pytest.fixture
def folders(tmp_path):
    """A GPT-2, and itself again."""
    for name in ("base", "tuned"):
        write_gpt2(tmp_path / name, GPT2, dtype="float32")
    return tmp_path


def change(home, **values):
    """Adds to tensors of the tuned model, by their names with / for a dot."""
    edit_tensors(home / "tuned" / WEIGHTS, lambda t: [t.update({k: t[k] + v}) for k, v in values.items()])


def run(home, rank=2, **more):
    return extract(home / "base", home / "tuned", rank, home / "out", **more)


def updates(path):
    """s B A of each module, float64."""
    found = read_contents(path).pairs
    return {name: p.s * p.B.astype("f8") @ p.A.astype("f8") for name, (p,) in found.items()}


def two_llamas(home, shape, dW, dtype="float64"):
    """Two folders of an architecture that nobody knows, whose one matrix differs by dW."""
    W0 = np.zeros(shape, dtype)
    for name, W in (("base", W0), ("tuned", W0 + dW)):
        (home / name).mkdir(parents=True)
        save_file({"model.layers.0.mlp.up_proj.weight": W.astype(dtype)}, home / name / WEIGHTS)
        (home / name / "config.json").write_text('{"model_type": "unheard_of"}')


@pytest.mark.proves("L9")
@given(out=st.integers(1, 9), n_in=st.integers(1, 9), rank=st.integers(1, 10), seed=seeds)
def test_what_is_lost_is_what_is_left_and_no_other_of_that_rank_is_nearer(tmp_path_factory, out, n_in, rank, seed):
    """|dW - s B A| is the root of the discarded squares, the least there is; the file's, to float32's rounding."""
    home, rng = tmp_path_factory.mktemp("e"), np.random.default_rng(seed)
    dW = rng.standard_normal((out, n_in))
    two_llamas(home, dW.shape, dW)
    (module,) = run(home, rank).modules
    (got,) = updates(home / "out").values()
    squares = np.sort(np.linalg.eigvalsh(dW @ dW.T if out < n_in else dW.T @ dW))[::-1]
    least = np.sqrt(np.clip(squares[rank:], 0, None).sum())
    size = np.linalg.norm(dW)
    assert module.norm == pytest.approx(size, rel=1e-12)
    assert abs(module.lost - least) <= 1e-7 * size  # the square root of float64's rounding
    assert abs(np.linalg.norm(dW - got) - module.lost) <= 1e-6 * size
    assert module.rank == min(rank, out, n_in)
    A = read_contents(home / "out").pairs["model.layers.0.mlp.up_proj"][0].A
    assert A.dtype == np.float32
    assert total_lost([module]) == (module.norm, module.lost)


def test_a_merged_adapter_comes_back(folders):
    """Of GPT-2's matrices, which are stored (in, out), the square one too; and only modules that changed."""
    first = folders / "first"
    change(folders, **{f"{LAYER}.attn.c_attn.weight": np.float32(0.5)})
    dW = np.outer(np.arange(8.0), np.linspace(1, 2, 8)).astype("f4")
    change(folders, **{f"{SQUARE}.weight": dW})
    edit_json(folders / "base" / "config.json", _name_or_path="who/what")
    found = extract(folders / "base", folders / "tuned", 3, first)
    assert [m.name for m in found.modules] == [f"{LAYER}.attn.c_attn", SQUARE]
    np.testing.assert_allclose(updates(first)[SQUARE], dW.T, atol=1e-5)
    about = json.loads((first / "adapter_config.json").read_text())
    assert about["fan_in_fan_out"] is True
    assert about["base_model_name_or_path"] == "who/what"
    assert about["target_modules"] == [f"{LAYER}.attn.c_attn", SQUARE]
    merge_folder(folders / "base", [first], [1.0], folders / "merged")
    merged, tuned = (load_file(folders / name / WEIGHTS) for name in ("merged", "tuned"))
    for key, value in tuned.items():
        np.testing.assert_allclose(merged[key], value, atol=1e-5)
    again = extract(folders / "base", folders / "merged", 3, folders / "second")
    assert max(m.share for m in again.modules) < 1e-6
    for name, due in updates(first).items():
        np.testing.assert_allclose(updates(folders / "second")[name], due, atol=1e-5)


def test_what_no_adapter_of_linears_holds_is_named_with_its_size(folders):
    values = {"transformer.wte.weight": 2.0, f"{LAYER}.ln_1.weight": 1.0, f"{LAYER}.mlp.c_fc.weight": 1.0}
    change(folders, **{key: np.float32(value) for key, value in values.items()})

    def more(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
        wpe = tensors.pop("transformer.wpe.weight")
        tensors["transformer.wpe.weight"] = np.concatenate([wpe, wpe])
        tensors["transformer.new"] = np.zeros(2, "int64")

    edit_tensors(folders / "tuned" / WEIGHTS, more)
    found = run(folders)
    assert [m.name for m in found.modules] == [f"{LAYER}.mlp.c_fc"]
    left = {one.name: one for one in found.left_out}
    assert {name: one.reason for name, one in left.items()} == {
        "transformer.wte.weight": "a table",
        f"{LAYER}.ln_1.weight": "no matrix of a module",
        "lm_head.weight": "the base's is tied to the token table",
        "transformer.wpe.weight": "of shape 20 x 8, and 10 x 8 in the base",
        "transformer.new": "the base has no such tensor",
    }
    table = left["transformer.wte.weight"]
    assert table.norm == pytest.approx(2 * np.sqrt(11 * 8), rel=1e-6)
    W0 = load_file(folders / "base" / WEIGHTS)["transformer.wte.weight"]
    assert table.norm_W0 == pytest.approx(np.linalg.norm(W0), rel=1e-6)


def test_only_targets_are_adapted(folders):
    change(folders, **{f"{SQUARE}.weight": np.float32(1), f"{LAYER}.mlp.c_proj.weight": np.float32(1)})
    found = run(folders, targets=["mlp.c_proj"])
    assert [m.name for m in found.modules] == [f"{LAYER}.mlp.c_proj"]
    assert [(one.name, one.reason) for one in found.left_out] == [(f"{SQUARE}.weight", "not among --targets")]


def test_no_module_is_taken_whose_name_ends_in_anothers(tmp_path):
    """PEFT takes each module whose name ends in one of a list; an expression must fit the whole name."""
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        changed = np.eye(3, dtype="f4") * (name == "tuned")
        save_file({"proj.weight": changed, "inner.proj.weight": np.eye(3, dtype="f4")}, tmp_path / name / WEIGHTS)
        (tmp_path / name / "config.json").write_text('{"model_type": "unheard_of"}')
    run(tmp_path)
    about = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert about["target_modules"] == "proj"


def test_names_that_differ_by_the_trunks_are_those_of_the_tuned_model(tmp_path):
    write_gpt2(tmp_path / "base", GPT2, prefix="")
    write_gpt2(tmp_path / "tuned", GPT2)
    change(tmp_path, **{f"{SQUARE}.weight": np.float32(1)})
    assert [m.name for m in run(tmp_path).modules] == [SQUARE]


def test_a_new_head_with_a_bias_leaves_the_trunk_clear(tmp_path):
    """The shortest name, of a pooler's bias, ends like the head's: most names say which prefix it is."""
    names = ["pooler.dense.bias", "encoder.layer.0.query.weight", "encoder.layer.0.query.bias"]
    base = {name: np.zeros((3, 3) if name.endswith("weight") else 3, "f4") for name in names}
    tuned = {f"bert.{name}": value for name, value in base.items()}
    tuned |= {"bert.encoder.layer.0.query.weight": np.eye(3, dtype="f4"), "classifier.bias": np.zeros(2, "f4")}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / WEIGHTS)
        (tmp_path / name / "config.json").write_text('{"model_type": "unheard_of"}')
    assert [m.name for m in run(tmp_path).modules] == ["bert.encoder.layer.0.query"]


def test_dtypes_may_differ(tmp_path):
    """dW is exact in float64: 1 + 2^-12 of float32 is not lost beside 1 of bfloat16."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    two_llamas(tmp_path, (3, 4), 0)
    key = "model.layers.0.mlp.up_proj.weight"
    save_file({key: np.ones((3, 4), bfloat16)}, tmp_path / "base" / WEIGHTS)
    save_file({key: np.full((3, 4), 1 + 2**-12, "f4")}, tmp_path / "tuned" / WEIGHTS)
    assert run(tmp_path, 1).modules[0].norm == pytest.approx(2**-12 * np.sqrt(12), rel=1e-12)


def test_a_folder_in_shards(folders):
    change(folders, **{f"{SQUARE}.weight": np.float32(1)})
    path = folders / "tuned" / WEIGHTS
    names = list(load_file(path))
    path.rename(folders / "tuned" / "a.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")}
    (folders / "tuned" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert [m.name for m in run(folders).modules] == [SQUARE]


@pytest.mark.parametrize(
    ("spoil", "more", "message"),
    [
        (lambda t: None, {}, "got the same in every tensor"),
        (
            lambda t: t.update({f"{SQUARE}.weight": np.full((8, 8), np.nan, "f4")}),
            {},
            rf"{SQUARE}.weight: holds numbers",
        ),
        (lambda t: t.update({"transformer.ln_f.weight": np.zeros(8, "f4")}), {}, "no matrix that an adapter can hold"),
        (lambda t: None, {"rank": 0}, "--rank: expected at least 1, got 0"),
        (lambda t: None, {"targets": ["c_prok"]}, "--targets: c_prok: .* has no such module"),
        (lambda t: (t.clear(), t.update(other=np.zeros(2, "f4"))), {}, "got none of the same name"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(folders, spoil, more, message):
    edit_tensors(folders / "tuned" / WEIGHTS, spoil)
    with pytest.raises(ValueError, match=message) as caught:
        run(folders, **more)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folders.iterdir()) == ["base", "tuned"]


def test_nothing_is_written_over(folders):
    (folders / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        run(folders)
    with pytest.raises(ValueError, match="expected a folder outside of"):
        extract(folders / "base", folders / "tuned", 1, folders / "tuned" / "out")


def test_a_scalar_and_an_empty_tensor(folders):
    """Which files may have, and adapters not."""
    for name, value in (("base", 1.0), ("tuned", 2.0)):
        more = {"scale": np.array(value, "f4"), "none": np.zeros((0, 3), "f4")}
        edit_tensors(folders / name / WEIGHTS, lambda t, more=more: t.update(more))
    change(folders, **{f"{SQUARE}.weight": np.float32(1)})
    found = run(folders)
    assert [(one.name, one.norm, one.norm_W0) for one in found.left_out] == [("scale", 1.0, 1.0)]
