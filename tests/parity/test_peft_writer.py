"""What PEFT saved, read by name and written anew: the same keys and bytes, of every kind of tensor it has."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_np.formats.adapters.contents import read_contents
from lora_np.formats.adapters.peft_writer import write_peft

families = pytest.importorskip("families", reason="the extra peers")
pytestmark = families.QUIET
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("mixtral", {}),  # two parameters of one module, one around the other
        ("qwen2-bias", {}),
        ("granite", {}),  # a table and a head
        ("olmo2", {}),  # modules_to_save
        ("qwen3", {"trainable_token_indices": [1, 5]}),
    ],
)
def test_a_file_of_pefts_comes_out_as_it_was(tmp_path, family, more):
    dtype = families.torch.bfloat16
    model = families.make(family, dtype, seed=1)
    settings = {**families.FAMILIES[family][3], **more}
    families.adapted(model, settings, dtype, seed=2).save_pretrained(str(tmp_path / "theirs"))
    found = read_contents(tmp_path / "theirs")
    write_peft(tmp_path / "ours", found.raw, found.pairs, found.whole, found.rows)
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs"))
    copies = {key for key in theirs if ".base_layer.weight" in key}  # of tables, the base's own
    assert {key for key in ours if "lora_" in key or "delta" in key} <= theirs.keys()
    assert ours.keys() >= theirs.keys() - copies
    for key in theirs.keys() - copies:
        assert ours[key].dtype == theirs[key].dtype
        assert np.array_equal(ours[key], theirs[key]), key
    again = read_contents(tmp_path / "ours")
    assert {name: [(p.s, p.r) for p in pairs] for name, pairs in again.pairs.items()} == {
        name: [(p.s, p.r) for p in pairs] for name, pairs in found.pairs.items()
    }
