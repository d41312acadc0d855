"""Tensors in files: when two are the same."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_np.formats.models.shards import stored_tensors

ONE = np.arange(6, dtype="f4").reshape(2, 3)
OTHERS = {
    "the same": (ONE.copy(), True),
    "another number": (ONE + np.eye(2, 3, dtype="f4"), False),
    "the same bytes in another shape": (ONE.reshape(3, 2), False),
    "the same bytes as another dtype": (ONE.view("i4"), False),
    "the same numbers in more bytes": (ONE.astype("f8"), False),
}


@pytest.mark.parametrize("case", OTHERS)
def test_two_are_the_same_in_dtype_shape_and_bytes(tmp_path, case):
    other, same = OTHERS[case]
    save_file({"a": ONE, "b": other}, tmp_path / "model.safetensors")
    found = stored_tensors(tmp_path)
    assert found["a"].equals(found["b"]) is same
    assert found["b"].equals(found["a"]) is same
