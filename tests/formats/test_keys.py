"""Keys of an adapter's tensors: which module each is of, under every wrapper that programs leave in them."""

import pytest
from hostile import hostile_texts, is_safe
from hypothesis import given
from hypothesis import strategies as st

from lora_np.formats.adapters.keys import adapter_names, read_key

PREFIX = "base_model.model."
PARTS = st.sampled_from(["model", "layers", "0", "17", "self_attn", "q_proj", "language_model", "experts", "lora", "h"])
MODULES = st.lists(PARTS, min_size=1, max_size=6).map(".".join)
WRAPPERS = st.sampled_from(["", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
FACTORS = st.sampled_from(
    [("lora_A", "weight", "A"), ("lora_B", "weight", "B"), ("lora_B", "bias", "bias"),
     ("lora_embedding_A", "", "embedding_A"), ("lora_embedding_B", "", "embedding_B"),
     ("lora_magnitude_vector", "", "m"), ("lora_magnitude_vector", "weight", "m")]
)  # fmt: skip


@given(
    module=MODULES, factor=FACTORS, outer=WRAPPERS, inner=WRAPPERS, times=st.integers(0, 3), depth=st.integers(0, 2),
    name=st.sampled_from(["", "default", "mine", "weights"]),
)  # fmt: skip
def test_a_factor_is_of_its_module_whatever_stands_around_it(module, factor, outer, inner, times, depth, name):
    part, end, due = factor
    middle = module + ".base_layer" * depth
    key = outer + PREFIX * times + inner + ".".join(filter(None, [middle, part, name, end]))
    found = read_key(key)
    proper = PREFIX + ".".join(filter(None, [middle, part, end]))
    assert (found.module, found.part, found.depth, found.proper) == (module, due, depth, proper)
    assert found.alone == PREFIX + ".".join(filter(None, [module, part, end]))


@given(module=MODULES, name=st.sampled_from(["default", "mine", "my-adapter"]), inner=st.sampled_from(["", "a", "b.0"]))
def test_what_is_trained_whole_loses_the_adapters_name_and_nothing_else(module, name, inner):
    """A factor's key, or the copy of the original, tells an adapter's name from a submodule's."""
    tail = ".".join(filter(None, [inner, "weight"]))
    key = f"{PREFIX}{module}.modules_to_save.{name}.{tail}"
    for sign in (f"{PREFIX}x.lora_A.{name}.weight", f"{PREFIX}{module}.original_module.{tail}"):
        assert read_key(key, adapter_names([key, sign])).module == f"{module}.{tail}"
    without = f"{PREFIX}{module}.modules_to_save.{tail}"
    assert read_key(without, adapter_names([without, f"{PREFIX}x.lora_A.weight"])).module == f"{module}.{tail}"


def test_a_submodule_that_no_sign_shows_to_be_an_adapter_stays():
    key = f"{PREFIX}heads.modules_to_save.red.weight"
    assert read_key(key, adapter_names([key, f"{PREFIX}x.lora_A.weight"])).module == "heads.red.weight"


def test_a_copy_of_the_original_is_no_tensor_of_the_adapters():
    assert read_key(f"{PREFIX}score.original_module.weight") == (
        "score.weight",
        "original",
        0,
        f"{PREFIX}score.original_module.weight",
    )


@pytest.mark.parametrize(
    ("name", "method"),
    [("lokr_w2", "LoKr"), ("hada_w2_a", "LoHa"), ("oft_R", "OFT"), ("vera_lambda_b", "VeRA"), ("lora_E", "AdaLoRA"),
     ("ia3_l", "IA3"), ("prompt_embeddings", "prompt tuning")],
)  # fmt: skip
def test_another_methods_tensor_is_refused_by_the_methods_name(name, method):
    with pytest.raises(ValueError, match=f"a tensor of {method}, which is not supported"):
        read_key(f"{PREFIX}model.layers.0.q_proj.{name}.default")


@given(parts=st.lists(hostile_texts() | FACTORS.map(lambda one: one[0]) | PARTS, max_size=8))
def test_any_key_is_read_or_refused_in_one_line(parts):
    key = ".".join(parts)
    said = ""
    try:
        read_key(key, adapter_names([key]))
    except ValueError as error:
        said = str(error)
    assert is_safe(said)
    assert len(said) < 500
