"""What inspect shows of numbers at the edge of what a file may hold."""

import numpy as np
import pytest
from hostile import EXOTIC, GPT2, edit_json, edit_tensors, raw_safetensors
from strategies import random_model, trained_adapter

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
