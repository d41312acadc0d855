"""The weights that `large` draws: held from the first, of the bytes that it says, the same each time."""

import numpy as np
import pytest

from bench import large
from lora_np.storage import Held, widened


@pytest.mark.parametrize("how", list(large.BITS))
def test_a_base_takes_the_bytes_that_the_table_says(how):
    """But NF4's offsets, 4 bytes a matrix, and the last 256 maxima of a matrix, where they are fewer."""
    config = large.large_work("Llama-2-7B", quick=True).config
    weights = dict(large.tensors(config, how))
    found, said = sum(W.nbytes for W in weights.values()), large.weights_bytes(config, how)
    matrices = sum(isinstance(W, Held) for W in weights.values())
    assert said <= found <= said + (8 * matrices if how == "NF4" else 0)


@pytest.mark.parametrize("how", list(large.DRAWS))
def test_held_weights_are_of_the_size_of_those_that_training_starts_from(how):
    config = large.large_work("Llama-2-7B", quick=True).config
    for (name, W), (again, same) in zip(large.tensors(config, how), large.tensors(config, how), strict=True):
        assert name == again
        np.testing.assert_array_equal(widened(W), widened(same))
        if isinstance(W, Held):
            assert 0.015 < np.sqrt(np.mean(widened(W) ** 2)) < 0.03


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [("Llama-3.2-1B", 1_235_814_400), ("Llama-3.2-3B", 3_212_749_824), ("Llama-2-7B", 6_738_415_616)],
)
def test_the_shapes_have_as_many_weights_as_the_models(shape, numbers):
    assert large.weights_bytes(large.SHAPES[shape], large.WIDE) == 4 * numbers
