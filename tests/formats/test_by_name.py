"""Merges by modules' names onto bases of no known architecture: each number from the algebra, computed here."""

import json

import numpy as np
import pytest
from hostile import write_peft
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from strategies import seeds, whole_numbers

from lora_np.backend import asnumpy
from lora_np.formats.merged.folder import merge_folder

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
V, D, E, F = 7, 4, 3, 5
TABLE, HEAD, Q = "model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj"


def on_host(rng, *shape, **limits):
    """Small whole numbers, in host memory."""
    return asnumpy(whole_numbers(rng, *shape, **limits))


def home_of(tmp_path_factory, tensors, **about):
    """A base with these tensors, in a folder of its own."""
    home = tmp_path_factory.mktemp("home")
    (home / "base").mkdir()
    save_file(tensors, home / "base" / "model.safetensors")
    about = {"model_type": "strange", "architectures": ["StrangeForCausalLM"], **about}
    (home / "base" / "config.json").write_text(json.dumps(about))
    return home


def write_adapter(home, tensors, **settings):
    (home / "ad").mkdir()
    save_file({PREFIX + key: np.ascontiguousarray(value) for key, value in tensors.items()}, home / "ad" / WEIGHTS)
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **settings}  # s = 1.5
    (home / "ad" / CONFIG).write_text(json.dumps(about))


def merged(home):
    """The merged tensors, its config.json, and what was remarked."""
    done = merge_folder(home / "base", [home / "ad"], [1.0], home / "out")
    return (
        load_file(home / "out" / "model.safetensors"),
        json.loads((home / "out" / "config.json").read_text()),
        done.remarks,
    )


def factors(rng, n_out, n_in, r=2):
    return on_host(rng, r, n_in), on_host(rng, n_out, r)


# --- Tied heads ------------------------------------------------------------------------------------------------------


def adapted_ends(rng, ends):
    """Tensors of an adapter of the table, the head or both; and what each adds."""
    tensors, added = {}, {TABLE: np.zeros((V, D)), HEAD: np.zeros((V, D))}
    for end in ends:
        A, B = factors(rng, D, V) if end == TABLE else factors(rng, V, D)
        keys = ("lora_embedding_A", "lora_embedding_B") if end == TABLE else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{end}.{key}": value for key, value in zip(keys, (A, B), strict=True)}
        added[end] = 1.5 * (A.T @ B.T if end == TABLE else B @ A)
    return tensors, added


@pytest.mark.proves("L5")
@given(seed=seeds, ends=st.sampled_from([[TABLE], [HEAD], [TABLE, HEAD]]), nested=st.booleans(), is_tied=st.booleans())
def test_adapting_either_end_of_what_is_tied_writes_both_and_says_so(tmp_path_factory, seed, ends, nested, is_tied):
    rng = np.random.default_rng(seed)
    E0 = on_host(rng, V, D)
    H0 = E0 if is_tied else on_host(rng, V, D)
    said = {"tie_word_embeddings": is_tied}
    about = {"text_config": {"vocab_size": V, **said}} if nested else said
    base = {f"{TABLE}.weight": E0, f"{Q}.weight": on_host(rng, D, D)}
    home = home_of(tmp_path_factory, base | ({} if is_tied else {f"{HEAD}.weight": H0}), **about)
    tensors, added = adapted_ends(rng, ends)
    write_adapter(home, tensors, target_modules=["embed_tokens", "lm_head"][: len(ends)] if len(ends) == 2 else ends)
    found, config, remarks = merged(home)
    np.testing.assert_array_equal(found[f"{TABLE}.weight"], E0 + added[TABLE])
    np.testing.assert_array_equal(found[f"{HEAD}.weight"], H0 + added[HEAD])
    if is_tied:
        assert config["tie_word_embeddings"] is False
        assert not nested or config["text_config"]["tie_word_embeddings"] is False
    else:
        assert config == json.loads((home / "base" / "config.json").read_text())
    assert remarks == []


# --- Experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.proves("L5")
@given(
    seed=seeds,
    turned=st.booleans(),
    in_pieces=st.booleans(),
    r=st.sampled_from([1, 2]),
    width=st.sampled_from([F, D // 2]),
)
def test_experts_are_a_sum_over_ranks_of_each_expert(tmp_path_factory, seed, turned, in_pieces, r, width):
    """dW_e = s sum_r B[o, r, e] A[e, r, i], turned where the parameter is (E, in, out); in pieces it is (out, in).

    width: with D / 2, gate_up_proj is square, and down_proj says how both are stored.
    """
    rng, module, turned = np.random.default_rng(seed), "model.layers.0.mlp.experts", turned and not in_pieces
    shapes = {"gate_up_proj": (2 * width, D), "down_proj": (D, width)}
    W0 = {name: on_host(rng, E, *shape) for name, shape in shapes.items()}  # (E, out, in)
    base = {f"{module}.{name}": np.ascontiguousarray(W.swapaxes(1, 2)) if turned else W for name, W in W0.items()}
    if in_pieces:
        base = {f"{module}.{e}.down_proj.weight": W0["down_proj"][e] for e in range(E)}
        for i, name in enumerate(("gate_proj", "up_proj")):
            base |= {
                f"{module}.{e}.{name}.weight": W0["gate_up_proj"][e, i * width : (i + 1) * width] for e in range(E)
            }
    home = home_of(tmp_path_factory, {key: np.ascontiguousarray(value) for key, value in base.items()})
    tensors, due = {}, {}
    for name, wrapper in (("gate_up_proj", ".base_layer"), ("down_proj", "")):  # in the order that the module has them
        n_out, n_in = shapes[name]
        A, B = on_host(rng, E * r, n_in), on_host(rng, n_out, r * E)
        tensors |= {f"{module}{wrapper}.lora_A.weight": A, f"{module}{wrapper}.lora_B.weight": B}
        dW = np.einsum("ore,eri->eoi", B.reshape(n_out, r, E), A.reshape(E, r, n_in))
        due[name] = W0[name] + 4 / r * dW
    names = [f"mlp.experts.{name}" for name in shapes]
    write_adapter(home, tensors, r=r, lora_alpha=4, target_modules=[], target_parameters=names)
    found, _, remarks = merged(home)
    for name, W in due.items():
        if not in_pieces:
            got = found[f"{module}.{name}"]
            np.testing.assert_array_equal(got.swapaxes(1, 2) if turned else got, W)
            continue
        parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
        for e in range(E):
            rows = [found[f"{module}.{e}.{part}.weight"] for part in parts]
            np.testing.assert_array_equal(np.concatenate(rows), W[e])
    assert remarks == []


# --- Orientation, tables ---------------------------------------------------------------------------------------------


@pytest.mark.proves("L5")
@given(seed=seeds, turned=st.booleans(), n_in=st.sampled_from([D, D + 1]))
def test_a_square_matrix_is_turned_as_the_configuration_says(tmp_path_factory, seed, turned, n_in):
    """Of another the shape says it, whatever the configuration does."""
    rng = np.random.default_rng(seed)
    W0, (A, B) = on_host(rng, D, n_in), factors(rng, D, n_in)
    is_stored_turned = turned if n_in == D else bool(rng.integers(2))
    home = home_of(tmp_path_factory, {f"{Q}.weight": np.ascontiguousarray(W0.T) if is_stored_turned else W0})
    write_peft(home / "ad", {Q: (A, B)}, r=2, alpha=3, fan_in_fan_out=turned)
    got = merged(home)[0][f"{Q}.weight"]
    np.testing.assert_array_equal(got.T if is_stored_turned else got, W0 + 1.5 * B @ A)


@pytest.mark.proves("L5")
@given(seed=seeds, size=st.integers(V - 2, V + 3), is_tied=st.booleans(), nested=st.booleans())
def test_a_table_of_another_size_is_the_adapters_and_so_is_vocab_size(tmp_path_factory, seed, size, is_tied, nested):
    rng = np.random.default_rng(seed)
    base = {f"{TABLE}.weight": on_host(rng, V, D), f"{Q}.weight": on_host(rng, D, D)}
    base |= {} if is_tied else {f"{HEAD}.weight": on_host(rng, V, D)}
    sizes = {"vocab_size": V, "tie_word_embeddings": is_tied}
    home = home_of(tmp_path_factory, base, **({"text_config": sizes} if nested else sizes))
    A, B = factors(rng, D, D)
    table, head = on_host(rng, size, D), on_host(rng, size, D)
    tensors = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{TABLE}.weight": table}
    write_adapter(home, tensors | ({} if is_tied else {f"{HEAD}.weight": head}), target_modules=["q_proj"])
    found, config, _ = merged(home)
    np.testing.assert_array_equal(found[f"{TABLE}.weight"], table)
    np.testing.assert_array_equal(found[f"{Q}.weight"], base[f"{Q}.weight"] + 1.5 * B @ A)
    if not is_tied:
        np.testing.assert_array_equal(found[f"{HEAD}.weight"], head)
    assert (config["text_config"] if nested else config)["vocab_size"] == size


@given(seed=seeds, is_tied=st.booleans())
def test_trained_rows_take_the_place_of_the_bases(tmp_path_factory, seed, is_tied):
    """Of a tied table they stand for the head too, which stays tied."""
    rng = np.random.default_rng(seed)
    table, head = on_host(rng, V, D), on_host(rng, V, D)
    base = {f"{TABLE}.weight": table} | ({} if is_tied else {f"{HEAD}.weight": head})
    home = home_of(tmp_path_factory, base, tie_word_embeddings=is_tied)
    numbers = rng.permutation(V)[: rng.integers(1, V)].tolist()
    rows = on_host(rng, len(numbers), D) + 0.5
    key = f"{TABLE}.token_adapter.trainable_tokens_delta"
    write_adapter(home, {key: rows}, target_modules=[], trainable_token_indices=numbers)
    found, config, _ = merged(home)
    table[numbers] = rows
    np.testing.assert_array_equal(found[f"{TABLE}.weight"], table)
    assert config["tie_word_embeddings"] is is_tied
    assert (f"{HEAD}.weight" in found) == (not is_tied)


@given(seed=seeds)
def test_gpt2s_files_without_a_trunks_name_are_no_fault_of_an_adapters(tmp_path_factory, seed):
    """transformers' own GPT-2 has such files; in memory the model has the trunk, and so has PEFT's adapter."""
    rng = np.random.default_rng(seed)
    W0, (A, B) = on_host(rng, D, 3 * D), factors(rng, 3 * D, D)
    home = home_of(tmp_path_factory, {"h.0.attn.c_attn.weight": W0}, architectures=["GPT2LMHeadModel"])
    write_peft(home / "ad", {"transformer.h.0.attn.c_attn": (A, B)}, r=2, alpha=3)
    found, _, remarks = merged(home)
    np.testing.assert_array_equal(found["h.0.attn.c_attn.weight"].T, W0.T + 1.5 * B @ A)
    assert remarks == []
