"""What inspect shows of numbers at the edge of what a file may hold."""

import numpy as np
import pytest
from hostile import EXOTIC, GPT2, edit_json, edit_tensors, raw_safetensors, write_peft
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_model, seeds, trained_adapter

import lora_np as ln
from lora_np.formats.merged.survey import survey

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    model = random_model(GPT2, seed=1)
    ln.save_adapter(tmp_path, trained_adapter(model, ln.LoRAConfig(r=2, targets=("o",)), seed=1), model)
    return tmp_path


@pytest.mark.parametrize("size", [1e-150, 1.0, 1e140])
def test_norms_of_numbers_whose_squares_overflow_or_vanish(folder, size):
    before = survey(folder).modules
    edit_tensors(folder / WEIGHTS, lambda t: t.update({key: value * size for key, value in t.items()}))
    for small, large in zip(before, survey(folder).modules, strict=True):
        expected = [small.norm_A * size, small.norm_B * size, small.norm_update * size * size]
        np.testing.assert_allclose([large.norm_A, large.norm_B, large.norm_update], expected, rtol=1e-12, atol=0)


def test_a_scale_that_no_float_holds(folder):
    edit_json(folder / CONFIG, lora_alpha=10**400)
    with pytest.raises(ValueError, match="no float holds"):
        survey(folder)
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace(str(10**400), "1e999"))
    with pytest.raises(ValueError, match="no float holds"):
        survey(folder)


@pytest.mark.parametrize(
    ("said", "value", "message"),
    [
        ("r", -3.5, "LoRAConfig.r: a value of the wrong type: -3.5"),
        ("r", 0, "LoRAConfig.r: expected an integer of at least 1, got 0"),
        ("r", 3, "expected rank 2, as its tensors have, got 3"),
        ("r", None, "LoRAConfig.r: a value of the wrong type: None"),
        ("rank_pattern", {"attn.c_proj": -2}, "expected rank 2, as its tensors have, got -2"),
        ("lora_alpha", "16", "LoRAConfig.alpha: a value of the wrong type: '16'"),
        ("lora_dropout", "abc", "LoRAConfig.dropout: a value of the wrong type: 'abc'"),
        ("lora_dropout", 1.5, "LoRAConfig.dropout: expected 0 <= p < 1, got 1.5"),
        ("use_rslora", 5, "LoRAConfig.rslora: a value of the wrong type: 5"),
        ("bias", "x", "LoRAConfig.bias: expected none, all or lora_only, got 'x'"),
    ],
)
def test_a_configuration_that_no_adapter_has(folder, said, value, message):
    edit_json(folder / CONFIG, **{said: value})
    with pytest.raises(ValueError, match=r"adapter_config\.json: ") as caught:
        survey(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("shapes", [([2, 8], [8, 3]), ([0, 8], [8, 0]), ([2], [8, 2]), ([1, 0, 8], [8, 1])])
def test_tensors_that_are_no_factors(folder, shapes):
    names = [f"base_model.model.transformer.h.0.attn.c_proj.lora_{factor}.weight" for factor in "AB"]
    header, end = {}, 0
    for name, shape in zip(names, shapes, strict=True):
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    raw_safetensors(folder / WEIGHTS, header, bytes(end))
    expected = r"a tensor with elements, got shape" if 0 in shapes[0] else r"A \(r, in\) and B \(out, r\), got"
    with pytest.raises(ValueError, match=rf"lora_A\.weight: expected {expected}"):
        survey(folder)


@pytest.mark.parametrize("dtype", EXOTIC)
def test_factors_that_are_no_floats_are_refused_by_name(folder, dtype):
    name = "base_model.model.transformer.h.0.attn.c_proj.lora_{}.weight".format
    size = EXOTIC[dtype] * 16 // 8
    header = {
        name(factor): {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        for factor, shape, start in (("A", [2, 8], 0), ("B", [8, 2], size))
    }
    raw_safetensors(folder / WEIGHTS, header, bytes(2 * size))
    with pytest.raises(ValueError, match=rf"c_proj\.lora_A\.weight: expected one of F64 F32 F16 BF16, got {dtype}"):
        survey(folder)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((3, 8), np.nan, "float32"), "holds NaN or infinite numbers"),
        (np.ones((3, 8), "int64"), "expected one of F64 F32 F16 BF16, got I64"),
        (np.ones((3, 8), bool), "expected one of F64 F32 F16 BF16, got BOOL"),
    ],
)
def test_what_is_trained_whole_is_finite_floats_too(folder, value, message):
    edit_tensors(folder / WEIGHTS, lambda t: t.update({"base_model.model.classifier.weight": value}))
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: base_model\.model\.classifier\.weight: {message}"):
        survey(folder)


def factors(rng, r, out=7, n_in=6):
    return rng.standard_normal((r, n_in)), rng.standard_normal((out, r))


@given(r=st.integers(1, 5), seed=seeds)
def test_shares_are_those_of_the_updates_own_singular_values(tmp_path_factory, r, seed):
    A, B = factors(np.random.default_rng(seed), r)
    folder = tmp_path_factory.mktemp("s") / "a"
    write_peft(folder, {"x.q": (A, B)}, r=r, alpha=3)
    (module,) = survey(folder).modules
    squares = np.linalg.svd(B @ A, compute_uv=False)[:r] ** 2
    np.testing.assert_allclose(module.shares, squares / squares.sum(), atol=1e-12)
    for share in (0.9, 0.99):
        n = module.carrying(share)
        assert squares[: n - 1].sum() < share * squares.sum() <= squares[:n].sum() * (1 + 1e-12)


def test_experts_are_taken_one_by_one(tmp_path):
    """dW_e = s B[:, e::E] A[e r : (e + 1) r]: another matrix than B A, and of rank r."""
    A, B = factors(np.random.default_rng(1), 6)
    write_peft(tmp_path / "a", {"x.experts": (A, B)}, r=2, alpha=6, target_parameters=["experts.w"])
    (module,) = survey(tmp_path / "a").modules
    dW = [3 * B[:, e::3] @ A[2 * e : 2 * e + 2] for e in range(3)]
    assert (module.rank, module.experts, module.n_out, module.n_in) == (2, 3, 7, 6)
    assert module.norm_update == pytest.approx(np.linalg.norm(dW), rel=1e-12)
    sigmas = np.array([np.linalg.svd(one, compute_uv=False)[:2] for one in dW])
    squares = (sigmas**2).sum(axis=0)
    np.testing.assert_allclose(module.shares, squares / squares.sum(), atol=1e-12)
    p = sigmas / sigmas.sum(axis=1, keepdims=True)
    assert module.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum(axis=1)).mean(), rel=1e-12)


def test_layers_and_modules_that_change_nothing(tmp_path):
    rng = np.random.default_rng(2)
    alive, (A, B) = factors(rng, 2), factors(rng, 2)
    pairs = {
        "m.0.q": alive, "m.0.k": (A, B * 0), "m.1.q": (A * 0, B), "m.1.k": (A, B * 0), "m.2.q": alive,
        "m.3.q": (np.array([[0.0], [1.0]]) * A, np.array([0.0, 1.0]) * B), "head": (A * 0, B),
    }  # fmt: skip
    write_peft(tmp_path / "a", pairs, r=2, alpha=1, alpha_pattern={"m.2.q": 0})
    found = survey(tmp_path / "a")
    assert sorted(found.dead_layers) == ["m.1", "m.2"]
    assert sorted(found.dead_modules) == ["head", "m.0.k"]
    by_name = {module.name: module for module in found.modules}
    assert [by_name[name].zero_directions for name in ("m.0.q", "m.0.k", "m.3.q")] == [0, 2, 1]
    assert [by_name[name].shares for name in ("m.0.k", "m.1.q", "m.2.q")] == [[], [], []]
    assert [by_name[name].carrying(0.9) for name in ("m.0.k", "m.3.q")] == [0, 1]
