"""What inspect shows of numbers at the edge of what a file may hold."""

import numpy as np
import pytest
from hostile import GPT2, edit_json, edit_tensors
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
