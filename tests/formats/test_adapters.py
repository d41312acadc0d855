"""Adapters as single files: loralib's names in safetensors, and our own in .npz. Nothing is lost or passed over."""

import io
import json
import os
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from hostile import GPT2, GPT2_FIELDS, LLAMA, OWN, edit_tensors, raw_safetensors, tensors_and_metadata
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from strategies import configs, dtypes, lora_configs, random_model, same_bits, seeds, trained_adapter

import lora_np as ln
from lora_np.formats.files import atomic
from lora_np.formats.models.names import family_of, module_of

ENDINGS = [".safetensors", ".npz"]
each_kind = pytest.mark.parametrize("ending", ENDINGS)


@pytest.fixture
def model():
    return random_model(GPT2, seed=1)


def adapter_of(model, *targets, seed=3, **fields):
    fields = {"r": 2, "alpha": 3, "targets": targets or ("q", "v"), **fields}
    return trained_adapter(model, ln.LoRAConfig(**fields), seed=seed)


def refusal(path, model, **said):
    """The message of the ValueError: one line that names the file."""
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        ln.load_adapter(path, model, **said)
    assert str(path) in str(caught.value)
    return str(caught.value)


def assert_same(loaded, adapter):
    assert loaded.config == adapter.config
    assert list(loaded.params) == list(adapter.params)
    assert same_bits(dict(loaded.params), dict(adapter.params))


def fits_loralib(config, adapter):
    """No head trained whole, no DoRA; and q, k, v of one c_attn of one rank and scale."""
    groups = {}
    for name in adapter.matrices:
        if module_of(name, family_of(config)) != name:
            groups.setdefault(name[:-2], set()).add((adapter.config.rank(name), adapter.config.scale(name)))
    return not (adapter.config.train_head or adapter.config.dora) and all(len(group) == 1 for group in groups.values())


def own_file(path, adapter, model, ending):
    path = path / f"a{ending}"
    ln.save_adapter(path, adapter, model)
    return path


# --- Out and back ----------------------------------------------------------------------------------------------------


@each_kind
@given(data=st.data(), config=st.one_of(configs(), configs(**GPT2_FIELDS)), dtype=dtypes, seed=seeds)
def test_adapter_to_file_to_adapter_is_the_identity(tmp_path_factory, ending, data, config, dtype, seed):
    path = tmp_path_factory.mktemp("adapter")
    model = random_model(config, seed=seed, dtype=dtype)
    adapter = trained_adapter(model, data.draw(lora_configs(config)), seed=seed)
    if ending == ".safetensors" and not fits_loralib(config, adapter):
        with pytest.raises(ValueError, match="loralib"):
            own_file(path, adapter, model, ending)
        assert os.listdir(path) == []
        return
    file = own_file(path, adapter, model, ending)
    assert_same(ln.load_adapter(file, model), adapter)
    ln.save_adapter(path / f"b{ending}", ln.load_adapter(file, model), model)
    if ending == ".safetensors":
        assert file.read_bytes() == (path / f"b{ending}").read_bytes()


@given(data=st.data(), config=st.one_of(configs(), configs(**GPT2_FIELDS)), seed=seeds)
def test_the_three_kinds_of_files_hold_the_same_adapter(tmp_path_factory, data, config, seed):
    path = tmp_path_factory.mktemp("adapter")
    model = random_model(config, seed=seed)
    adapter = trained_adapter(model, data.draw(lora_configs(config)), seed=seed)
    last = adapter
    kinds = ["", ".npz", *([".safetensors"] if fits_loralib(config, adapter) else [])]
    for i, ending in enumerate(data.draw(st.permutations(kinds))):
        try:
            ln.save_adapter(path / f"{i}{ending}", last, model)
        except ValueError as error:
            assert re.search("one scale|each of whose rows DoRA scales", str(error))  # noqa: PT017 (of q, k, v as one)
            continue
        last = ln.load_adapter(path / f"{i}{ending}", model)
    assert_same(last, adapter)


@each_kind
def test_some_layers_and_a_fused_update(tmp_path, ending):
    for i, (config, targets) in enumerate([(GPT2, ("qkv",)), (LLAMA, ("qkv", "o")), (OWN, ("qkv", "embed"))]):
        model = random_model(config, seed=1)
        adapter = adapter_of(model, *targets, layers=(1,))
        ln.save_adapter(tmp_path / f"{i}{ending}", adapter, model)
        assert_same(ln.load_adapter(tmp_path / f"{i}{ending}", model), adapter)


def test_what_loralibs_names_are(tmp_path, model):
    path = own_file(tmp_path, adapter_of(model, "q", "v", "o", "embed", bias="lora_only"), model, ".safetensors")
    tensors, metadata = tensors_and_metadata(path)
    D = GPT2.d_model
    assert {key: t.shape for key, t in tensors.items() if ".1." not in key} == {
        "transformer.wte.lora_A": (2, 11),
        "transformer.wte.lora_B": (D, 2),
        "transformer.h.0.attn.c_attn.lora_A": (4, D),
        "transformer.h.0.attn.c_attn.lora_B": (2 * D, 2),
        "transformer.h.0.attn.c_attn.bias": (3 * D,),
        "transformer.h.0.attn.c_proj.lora_A": (2, D),
        "transformer.h.0.attn.c_proj.lora_B": (D, 2),
        "transformer.h.0.attn.c_proj.bias": (D,),
    }
    assert list(metadata) == ["lora_np"]


def test_what_npzs_names_are(tmp_path, model):
    adapter = adapter_of(model, "q", train_head=True)
    with np.load(own_file(tmp_path, adapter, model, ".npz"), allow_pickle=False) as file:
        assert file.files == ["header", *adapter.params]
        header = json.loads(file["header"].tobytes())
        assert header["config"]["targets"] == ["q"]
        assert header["head"] == "lm"
        assert same_bits(
            {name: file[name] for name in adapter.params}, {n: ln.asnumpy(p) for n, p in adapter.params.items()}
        )


@each_kind
def test_a_base_that_was_widened_and_one_that_is_another(tmp_path, model, ending):
    narrow = ln.Model(GPT2, {name: w.astype("float32") for name, w in model.weights.items()})
    wide = ln.Model(GPT2, {name: w.astype("float64") for name, w in narrow.weights.items()})
    adapter = adapter_of(narrow)
    path = own_file(tmp_path, adapter, narrow, ending)
    loaded = ln.load_adapter(path, wide)
    assert same_bits(dict(loaded.params), {name: p.astype("float64") for name, p in adapter.params.items()})
    assert "another base" in refusal(path, model)
    path.unlink()
    assert "would be rounded" in refusal(own_file(tmp_path, adapter_of(wide), wide, ending), narrow)


# --- Files without our metadata --------------------------------------------------------------------------------------

C_ATTN = "transformer.h.0.attn.c_attn"


@pytest.fixture
def theirs(tmp_path):
    """A file as loralib's own: tensors alone, of one MergedLinear of q and v, rank 2."""
    rng = np.random.default_rng(0)
    D = GPT2.d_model
    tensors = {f"{C_ATTN}.lora_A": rng.normal(size=(4, D)), f"{C_ATTN}.lora_B": rng.normal(size=(2 * D, 2))}
    save_file(tensors, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_tensors_alone(theirs, model, prefix):
    tensors, _ = tensors_and_metadata(theirs)
    save_file({prefix + key.removeprefix("transformer."): t for key, t in tensors.items()}, theirs)
    loaded = ln.load_adapter(theirs, model, alpha=6)
    assert loaded.config == ln.LoRAConfig(r=2, alpha=6, targets=("q", "v"), layers=(0,))
    A, B = tensors[f"{C_ATTN}.lora_A"], tensors[f"{C_ATTN}.lora_B"]
    D = GPT2.d_model
    expected = {"q.A": A[:2], "q.B": B[:D], "v.A": A[2:], "v.B": B[D:]}
    assert same_bits(
        {name: ln.asnumpy(p) for name, p in loaded.params.items()},
        {f"layers.0.attn.{name}": value for name, value in expected.items()},
    )


def test_ranks_that_differ(theirs, model):
    extra = {"transformer.h.1.mlp.c_fc.lora_A": np.ones((1, 8)), "transformer.h.1.mlp.c_fc.lora_B": np.ones((12, 1))}
    edit_tensors(theirs, lambda t: t.update(extra))
    config = ln.load_adapter(theirs, model, alpha=6).config
    assert (config.r, config.rank_pattern, config.alpha) == (2, {"up": 1}, 6)


def test_gpt2s_causal_masks_are_left_out(theirs, model):
    edit_tensors(theirs, lambda t: t.update({"transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), "uint8")}))
    assert ln.load_adapter(theirs, model, alpha=6).config.bias == "none"


@pytest.mark.parametrize(
    ("change", "said", "message"),
    [
        ({}, {}, "alpha: loralib's files do not say it"),
        ({}, {"alpha": "6"}, "alpha: a value of the wrong type"),
        ({}, {"alpha": float("nan")}, "alpha: expected a finite number"),
        ({}, {"alpha": 6, "enabled": ["q"]}, "expected 2 of q, k and v"),
        ({}, {"alpha": 6, "enabled": ["q", "q"]}, "expected 2 of q, k and v"),
        ({}, {"alpha": 6, "enabled": ["q", "o"]}, "expected 2 of q, k and v"),
        ({f"{C_ATTN}.lora_A": np.ones((2, 8)), f"{C_ATTN}.lora_B": np.ones((8, 2))}, {"alpha": 6}, "enabled: one of q"),
        ({f"{C_ATTN}.lora_A": np.ones((5, 8))}, {"alpha": 6}, "expected a Linear, or a MergedLinear"),
        ({f"{C_ATTN}.lora_A": np.ones((8, 8))}, {"alpha": 6}, "expected a Linear, or a MergedLinear"),
        ({f"{C_ATTN}.lora_A": np.ones((4, 9))}, {"alpha": 6}, "expected shape (4, 8), got (4, 9)"),
        ({f"{C_ATTN}.lora_A": np.ones(4)}, {"alpha": 6}, "expected matrices"),
        ({f"{C_ATTN}.lora_A": np.ones((0, 8))}, {"alpha": 6}, "expected matrices"),
        ({f"{C_ATTN}.lora_A": np.ones((4, 8), "int16")}, {"alpha": 6}, "expected one of F64 F32 F16 BF16"),
        ({f"{C_ATTN}.lora_A": np.full((4, 8), np.nan)}, {"alpha": 6}, "holds NaN"),
        ({f"{C_ATTN}.weight": np.ones((8, 24))}, {"alpha": 6}, f"{C_ATTN}.weight has no place"),
        ({"h.1.mlp.c_fc.lora_A": np.ones((1, 8))}, {"alpha": 6}, "has no place"),  # with and without the trunk
        ({"transformer.h.1.mlp.c_fc.lora_A": np.ones((1, 8))}, {"alpha": 6}, "layers.1.mlp.up: lora_B is missing"),
        ({"transformer.h.9.mlp.c_fc.lora_A": np.ones((1, 8))}, {"alpha": 6}, "has no place"),
        ({f"transformer.ln_f.lora_{X}": np.ones((8, 8)) for X in "AB"}, {"alpha": 6}, "norm"),
        ({"lm_head.bias": np.ones(11)}, {"alpha": 6}, "no such bias"),
        ({f"{C_ATTN}.bias": np.ones(8)}, {"alpha": 6}, "expected shape (24,), got (8,)"),
        (None, {"alpha": 6}, "expected lora_A and lora_B of some module"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_file_of_loralibs_may_not_hold(theirs, model, change, said, message):
    edit_tensors(theirs, lambda t: t.clear() if change is None else t.update(change))
    assert message in refusal(theirs, model, **said)


@pytest.mark.parametrize("ending", ["", *ENDINGS])
def test_nothing_is_said_twice(tmp_path, model, ending):
    path = own_file(tmp_path, adapter_of(model), model, ending)
    for said in ({"alpha": 3}, {"enabled": ("q", "v")}):
        assert "alpha and enabled are for" in refusal(path, model, **said)


@pytest.mark.parametrize("ending", [".pt", ".bin", ".pth", ".pkl"])
def test_a_pickle_is_refused_and_how_to_save_it_anew(tmp_path, model, ending):
    (tmp_path / f"lora{ending}").write_bytes(b"\x80\x04.")
    line = f'safetensors.torch.save_file(torch.load("lora{ending}", weights_only=True), "lora.safetensors")'
    assert line in refusal(tmp_path / f"lora{ending}", model)


# --- What we refuse to write, and whole or not at all ----------------------------------------------------------------


def test_what_loralib_has_no_place_for(tmp_path, model):
    for fields, message in [
        ({"train_head": True}, "no head that is trained whole"),
        ({"rank_pattern": {"q": 1}}, "one rank and one scale"),
        ({"alpha_pattern": {"v": 1}}, "one rank and one scale"),
    ]:
        with pytest.raises(ValueError, match=message):
            own_file(tmp_path, adapter_of(model, **fields), model, ".safetensors")
    assert os.listdir(tmp_path) == []


@each_kind
def test_what_is_there_already_is_not_written_over(tmp_path, model, ending):
    path = own_file(tmp_path, adapter_of(model), model, ending)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        ln.save_adapter(path, adapter_of(model, "k"), model)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@each_kind
@pytest.mark.parametrize("at", range(3))
def test_a_file_is_there_whole_or_not(tmp_path, model, monkeypatch, ending, at):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    module, name = [(atomic, "_sync"), (atomic.os, "link"), (atomic.os, "fsync")][at]
    monkeypatch.setattr(module, name, stop)
    with pytest.raises(KeyboardInterrupt):
        own_file(tmp_path, adapter_of(model), model, ending)
    assert os.listdir(tmp_path) == []


@each_kind
def test_an_adapter_that_does_not_fit(tmp_path, model, ending):
    adapter = adapter_of(model)
    for changed, message in [
        ({"norm.weight": model.weights["norm.weight"]}, "norm.weight: the configuration does not say"),
        ({"layers.0.attn.q.B": adapter.params["layers.0.attn.q.B"] * np.nan}, "NaN or infinite"),
    ]:
        with pytest.raises(ValueError, match=message):
            own_file(tmp_path, replace(adapter, params={**adapter.params, **changed}), model, ending)
    complex_model = ln.Model(GPT2, {name: w.astype("complex128") for name, w in model.weights.items()})
    with pytest.raises(TypeError, match="complex128"):
        own_file(tmp_path, adapter, complex_model, ending)
    assert os.listdir(tmp_path) == []


# --- Damaged and hostile files ---------------------------------------------------------------------------------------


@each_kind
def test_a_file_that_is_missing_or_cut_off(tmp_path, model, ending):
    with pytest.raises(FileNotFoundError, match="no such file"):
        ln.load_adapter(tmp_path / f"none{ending}", model)
    path = own_file(tmp_path, adapter_of(model), model, ending)
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        said = "damaged, or not a file of ours" if ending == ".npz" else "truncated, or not a safetensors file"
        assert said in refusal(path, model)


def test_a_header_of_2_to_the_60(tmp_path, model):
    raw_safetensors(tmp_path / "a.safetensors", {}, length=2**60)
    assert str(2**60) in refusal(tmp_path / "a.safetensors", model)


@each_kind
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", 10**400, "'r': expected a number, got one that no float holds"),
        ("r", 10**300, "expected shape|expected floats|ranks? is|q, k and v"),
        ("alpha", "Infinity", "not valid JSON"),
        ("r", -3.5, "LoRAConfig.r: a value of the wrong type: -3.5"),
        ("dropout", "abc", "LoRAConfig.dropout: a value of the wrong type: 'abc'"),
        ("sigma", "1e999", "'sigma': expected a number"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_our_own_description_with_numbers_that_are_none(tmp_path, model, ending, key, value, message):
    path = own_file(tmp_path, adapter_of(model), model, ending)

    def edit(text):
        found = json.loads(text)
        found["config"][key] = value
        return json.dumps(found).replace('"Infinity"', "Infinity").replace('"1e999"', "1e999")

    if ending == ".npz":
        with np.load(path) as file:
            arrays = dict(file)
        text = edit(arrays.pop("header").tobytes().decode())
        np.savez(path, header=np.frombuffer(text.encode(), np.uint8), **arrays)
    else:
        tensors, metadata = tensors_and_metadata(path)
        save_file(tensors, path, {"lora_np": edit(metadata["lora_np"])})
    assert re.search(message, refusal(path, model))


def members_of(path):
    with zipfile.ZipFile(path) as file:
        return {info.filename: file.read(info) for info in file.infolist()}


def write_members(path, members, *, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)


def npy(value, **options):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, value, **options)
    return buffer.getvalue()


A_Q = "layers.0.attn.q.A.npy"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({A_Q: npy(np.ones((2, 9)))}, "expected floats (2, 8), got float64 (2, 9)"),
        ({A_Q: npy(np.ones((2, 8), ">f8"))}, "expected an array of floats"),
        ({A_Q: npy(np.ones((2, 8), "float16"))}, "expected an array of floats"),
        ({A_Q: npy(np.full((2, 8), np.inf))}, "NaN or infinite"),
        ({A_Q: npy(np.asfortranarray(np.ones((2, 8))))}, "expected an array of floats, row by row"),
        ({A_Q: npy(np.array([[None] * 8] * 2), allow_pickle=True)}, "expected an array of floats, row by row"),
        ({A_Q: npy(np.ones((2, 8))).replace(b"(2, 8)", b"(2,9**9)"[:6])}, "expected an array of floats, row by row"),
        ({A_Q: npy(np.ones((2, 8))).replace(b"(2, 8), ", b"(2**40,)")}, "expected an array of floats"),
        ({A_Q: npy(np.ones((2, 8))).replace(b"(2, 8)", b"(2,99)")}, "does not fit its"),
        ({A_Q: npy(np.ones((2, 8))).replace(b"(2, 8), ", b"(-2,-8),")}, "expected an array of floats, row by row"),
        ({A_Q: npy(np.ones((2, 8)))[:-8]}, "does not fit its"),
        ({A_Q: b""}, "expected an array of floats, row by row"),
        ({A_Q: npy(np.ones((2, 8)), version=(2, 0))}, "expected an array of floats, row by row"),
        ({"x.npy": npy(np.ones(2))}, "the array x has no place"),
        ({"../../x\n.npy": npy(np.ones(2))}, "has no place"),
        ({"header.npy": npy(np.frombuffer(b"[]", np.uint8))}, "expected a JSON object"),
        ({"header.npy": npy(np.ones(3))}, "header"),
        ({"header.npy": npy(np.zeros(5 * 2**20, np.uint8))}, "expected at most"),
    ],
    ids=range(18),
)  # fmt: skip
def test_arrays_that_were_changed(tmp_path, model, change, message):
    path = own_file(tmp_path, adapter_of(model), model, ".npz")
    write_members(path, members_of(path) | change)
    assert message in refusal(path, model)


@pytest.mark.parametrize(
    ("name", "message"),
    [("header.npy", "it has no header: it is none of this package's"), (A_Q, "layers.0.attn.q.A is missing")],
)
def test_an_array_that_is_missing(tmp_path, model, name, message):
    path = own_file(tmp_path, adapter_of(model), model, ".npz")
    write_members(path, {key: data for key, data in members_of(path).items() if key != name})
    assert message in refusal(path, model)


def test_an_archive_that_swells_or_holds_a_name_twice(tmp_path, model):
    path = own_file(tmp_path, adapter_of(model), model, ".npz")
    members = members_of(path)
    write_members(path, {**members, "x.npy": npy(np.zeros(10**6))}, compression=zipfile.ZIP_DEFLATED)
    assert "not compressed" in refusal(path, model)
    write_members(path, {**members, A_Q.removesuffix(".npy"): members[A_Q]})
    assert "twice" in refusal(path, model)


def test_an_array_that_is_said_to_take_more_than_the_file(tmp_path, model):
    path = own_file(tmp_path, adapter_of(model), model, ".npz")
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")  # the last of the archive's directory
    content[entry + 20 : entry + 24] = (2**31).to_bytes(4, "little")  # its compressed size
    path.write_bytes(content)
    assert "not compressed" in refusal(path, model)


@each_kind
@given(data=st.data())
def test_any_byte_changed_gives_an_adapter_or_one_line(tmp_path_factory, ending, data):
    model = random_model(GPT2, seed=1)
    bias = data.draw(st.sampled_from(["none", "lora_only"]))
    path = own_file(tmp_path_factory.mktemp("fuzz"), adapter_of(model, bias=bias), model, ending)
    said = {}
    if ending == ".safetensors" and data.draw(st.booleans()):
        save_file(tensors_and_metadata(path)[0], path)
        said = {"alpha": 3}
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        from_end = data.draw(st.booleans())
        place = data.draw(st.integers(0, min(len(content), 3000) - 1))
        content[-place - 1 if from_end else place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        ln.load_adapter(path, model, **said)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 (most changes are refused, some are not)
        assert str(path) in str(error)  # noqa: PT017
