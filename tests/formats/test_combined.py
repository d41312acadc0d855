"""A weighted sum of adapters, from their files alone: the sum of their updates, or the nearest of a lower rank."""

import json

import numpy as np
import pytest
from hostile import edit_json, edit_tensors, write_peft
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from strategies import seeds

from lora_np.formats.adapters.contents import read_contents
from lora_np.formats.merged.combined import combine_files

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.{}.lora_{}.weight"


def adapter(folder, ranks, seed, *, alpha=3, dtype="float64", out=6, n_in=5, **settings):
    """An adapter by hand with modules of these ranks. -> dW of each, in float64."""
    rng = np.random.default_rng(seed)
    factors = {
        name: (rng.standard_normal((r, n_in)).astype(dtype), rng.standard_normal((out, r)).astype(dtype))
        for name, r in ranks.items()
    }
    patterns = {f"^{name}": r for name, r in ranks.items()}
    write_peft(folder, factors, r=1, alpha=alpha, **{"rank_pattern": patterns, **settings})
    return {name: alpha / ranks[name] * B.astype("f8") @ A.astype("f8") for name, (A, B) in factors.items()}


def updates(path):
    return {name: p.s * p.B.astype("f8") @ p.A.astype("f8") for name, (p,) in read_contents(path).pairs.items()}


@pytest.mark.proves("L9")
@given(ranks=st.tuples(*[st.integers(1, 3)] * 3), weights=st.tuples(*[st.floats(-2, 2)] * 2), seed=seeds)
def test_the_sum_of_all_updates_and_a_module_of_one_alone(tmp_path_factory, ranks, weights, seed):
    home = tmp_path_factory.mktemp("c")
    one = adapter(home / "a", {"x.q": ranks[0], "x.v": ranks[2]}, seed)
    two = adapter(home / "b", {"x.q": ranks[1]}, seed + 1, alpha=5)
    found = combine_files([home / "a", home / "b"], weights, home / "out")
    got = updates(home / "out")
    assert got.keys() == {"x.q", "x.v"}
    due = weights[0] * one["x.q"] + weights[1] * two["x.q"]
    np.testing.assert_allclose(got["x.q"], due, atol=1e-12)
    np.testing.assert_allclose(got["x.v"], weights[0] * one["x.v"], atol=1e-12)
    assert {m.name: m.rank for m in found.modules} == {"x.q": ranks[0] + ranks[1], "x.v": ranks[2]}
    assert {m.lost for m in found.modules} == {0}
    assert {name: p.s for name, (p,) in read_contents(home / "out").pairs.items()} == {"x.q": 1, "x.v": 1}


@pytest.mark.proves("L9")
@given(rank=st.integers(1, 6), seed=seeds)
def test_truncated_it_is_the_nearest_of_its_rank(tmp_path_factory, rank, seed):
    home = tmp_path_factory.mktemp("c")
    dW = adapter(home / "a", {"x.q": 2}, seed)["x.q"] - 0.5 * adapter(home / "b", {"x.q": 2}, seed + 1)["x.q"]
    (module,) = combine_files([home / "a", home / "b"], [1, -0.5], home / "out", rank).modules
    U, S, Vt = np.linalg.svd(dW)
    k = min(rank, 4)
    np.testing.assert_allclose(updates(home / "out")["x.q"], (U[:, :k] * S[:k]) @ Vt[:k], atol=1e-11)
    assert module.rank == k
    assert module.norm == pytest.approx(np.linalg.norm(S), rel=1e-12)
    assert module.lost == pytest.approx(np.linalg.norm(S[rank:]), rel=1e-9, abs=1e-12)


def test_factors_of_16_bits_are_summed_in_float64_and_rounded_once(tmp_path):
    adapter(tmp_path / "a", {"x.q": 3}, 1, alpha=1, dtype="float16")
    source = load_file(tmp_path / "a" / WEIGHTS)
    combine_files([tmp_path / "a"], [0.1], tmp_path / "out")
    got = load_file(tmp_path / "out" / WEIGHTS)
    B = source[KEY.format("x.q", "B")].astype("f8")
    assert np.array_equal(got[KEY.format("x.q", "A")], source[KEY.format("x.q", "A")].astype("f4"))
    assert np.array_equal(got[KEY.format("x.q", "B")], (B * (0.1 * (1 / 3))).astype("f4"))


def test_a_rank_of_its_own_is_that_of_the_full_name(tmp_path):
    """A pattern that fits the end of another name would give that module the wrong rank."""
    adapter(tmp_path / "a", {"proj": 2, "x.proj": 1, "x.k": 1}, 1)
    combine_files([tmp_path / "a"], [1], tmp_path / "out")
    about = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert about["rank_pattern"] == about["alpha_pattern"] == {"^proj": 2}
    assert (about["r"], about["lora_alpha"]) == (1, 1)
    assert about["target_modules"] == ["proj", "x.k", "x.proj"]


def test_bases_of_other_names_are_a_remark(tmp_path):
    for name in "ab":
        adapter(tmp_path / name, {"x.q": 1}, 1, base_model_name_or_path=f"who/{name}")
    found = combine_files([tmp_path / "a", tmp_path / "b"], [1, 1], tmp_path / "out")
    assert found.remarks == ["the adapters name different bases: who/a and who/b"]


def test_adapters_with_no_module_in_common_are_a_remark(tmp_path):
    adapter(tmp_path / "a", {"x.q": 1}, 1)
    adapter(tmp_path / "b", {"model.x.q": 1}, 1)
    found = combine_files([tmp_path / "a", tmp_path / "b"], [1, 1], tmp_path / "out")
    assert found.remarks == ["no module is adapted by all of them: their names may differ in a prefix"]


def add(**tensors):
    return lambda t: t.update({f"base_model.model.{name}": value for name, value in tensors.items()})


ONE = np.ones((1, 5), "f4"), np.ones((6, 1), "f4")


@pytest.mark.parametrize(
    ("spoil", "said", "message"),
    [
        (add(**{"norm.weight": np.ones(3, "f4")}), {}, r"norm\.weight: trained whole"),
        (
            add(**{"e.lora_embedding_A": ONE[0], "e.lora_embedding_B": ONE[1]}),
            {"rank_pattern": {}},
            "e: a look-up: not supported",
        ),
        (add(**{"x.q.lora_B.bias": np.ones(6, "f4")}), {"lora_bias": True}, r"x\.q: a bias of B \(lora_bias\)"),
        (
            lambda t: t.update({k: np.concatenate([v, v], 0 if "_A" in k else 1) for k, v in t.items()}),
            {"target_parameters": ["x.q"]},
            r"x\.q: experts: not supported",
        ),
        (lambda t: None, {"fan_in_fan_out": True}, "fan_in_fan_out: expected all adapters to have the same"),
        (
            lambda t: t.update({KEY.format("x.q", "A"): np.ones((1, 4), "f4")}),
            {},
            r"x\.q: expected the shape that the others have",
        ),
        (lambda t: t.update({KEY.format("x.q", "B"): np.full((6, 1), 3e38, "f4")}), {}, "too large for float32"),
    ],
)
def test_what_cannot_be_stacked_is_refused_by_name(tmp_path, spoil, said, message):
    for name in "ab":
        adapter(tmp_path / name, {"x.q": 1}, 1, dtype="float32")
    edit_tensors(tmp_path / "b" / WEIGHTS, spoil)
    edit_json(tmp_path / "b" / CONFIG, **said)
    with pytest.raises(ValueError, match=message) as caught:
        combine_files([tmp_path / "a", tmp_path / "b"], [1, 1], tmp_path / "out")
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "rank", "message"),
    [
        ([1.0, 2.0], None, "combine: expected a weight for each adapter, got 1 and 2"),
        ([float("nan")], None, "combine: expected finite weights"),
        ([1.0], 0, "--rank: expected at least 1, got 0"),
    ],
)
def test_weights_and_ranks_that_are_none(tmp_path, weights, rank, message):
    adapter(tmp_path / "a", {"x.q": 1}, 1)
    with pytest.raises(ValueError, match=message):
        combine_files([tmp_path / "a"], weights, tmp_path / "out", rank)
