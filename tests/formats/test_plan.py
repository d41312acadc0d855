"""Merged folders: each number against exact arithmetic, all else the base's bytes, little memory, nothing half-done."""

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
from hostile import GPT2, OWN, contents, edit_json, edit_tensors, write_gpt2, write_peft
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from strategies import bits, same_bits, seeds, trained_adapter
from test_rounding import FORMATS, dtype_of, nearest

import lora_np as ln
from lora_np.formats.merged.folder import merge_folder
from lora_np.formats.models.shards import Stored

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
D, F = GPT2.d_model, GPT2.d_ff
MODULES = {"transformer.h.0.attn.c_attn": (3 * D, D), "transformer.h.1.mlp.c_proj": (D, F)}


def factors(seed, *, r=2, modules=MODULES):
    """A and B of small whole numbers, and one product so small that it only breaks ties: every sum is exact."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for name, (n_out, n_in) in modules.items():
        A = rng.integers(-4, 5, (r, n_in)).astype("float32") / 4
        B = rng.integers(-4, 5, (n_out, r)).astype("float32") / 4
        A[0], B[:, 0] = 2.0**-15, 2.0**-15
        pairs[name] = (A, B)
    return pairs


def exact_sum(W0, terms):
    """W0 (in, out) as Conv1D has it, and the sum of s B A, as Fractions: a list of rows, (out, in)."""
    rows = [[Fraction(float(x)) for x in row] for row in np.asarray(W0, "float64").T]
    for s, A, B in terms:
        for row, b in zip(rows, B.astype(float).tolist(), strict=True):
            for j, a in enumerate(A.T.astype(float).tolist()):
                row[j] += Fraction(s) * sum(Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True))
    return rows


@pytest.fixture
def home(tmp_path):
    """A base and an adapter of its."""
    write_gpt2(tmp_path / "base", GPT2, metadata={"format": "pt"})
    write_peft(tmp_path / "ad", factors(1), r=2, alpha=4)
    return tmp_path


def merge(home, *adapters, weights=None, out="out"):
    paths = [home / name for name in adapters or ("ad",)]
    return merge_folder(home / "base", paths, weights or [1.0] * len(paths), home / out)


# --- The numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.proves("L5", "L9")
@pytest.mark.parametrize("name", FORMATS)
@given(seed=seeds, scales=st.lists(st.sampled_from([1.0, -0.5, 0.25, 2.0]), min_size=1, max_size=2))
def test_merged_weights_are_the_exact_sum_rounded_once(tmp_path_factory, name, seed, scales):
    """W0 + sum_i w_i s_i B_i A_i of one adapter or two, by Fractions, in the file's own dtype, Conv1D transposed."""
    home, dtype = tmp_path_factory.mktemp("home"), dtype_of(name)
    rng = np.random.default_rng(seed)
    base = write_gpt2(home / "base", GPT2, dtype=dtype, seed=seed)
    for key in base:  # half of the numbers are such that a quarter or an eighth more lies halfway between two
        odd = rng.integers(128, 255, base[key].shape) * 2.0**-7 * (16 if name == "BF16" else 1)
        base[key] = np.where(rng.random(odd.shape) < 0.5, odd.astype(dtype), base[key])
    save_file(base, home / "base" / WEIGHTS)
    pairs = [factors(seed + i) for i in range(len(scales))]
    for i, pair in enumerate(pairs):
        write_peft(home / f"ad{i}", pair, r=2, alpha=4)
    merge(home, *(f"ad{i}" for i in range(len(pairs))), weights=scales)
    merged = load_file(home / "out" / WEIGHTS)
    assert merged.keys() == base.keys()
    for key, W0 in base.items():
        module = key.removesuffix(".weight")
        if module not in MODULES:
            assert same_bits(merged[key], W0)
            continue
        terms = [(w * 4 / 2, *pair[module]) for w, pair in zip(scales, pairs, strict=True)]
        expected = [[nearest(float(x), name) for x in row] for row in exact_sum(W0, terms)]
        assert merged[key].astype(float).T.tolist() == expected


@pytest.mark.parametrize("targets", [("q", "v"), ("qkv", "down"), ("embed", "o"), ("head", "k")])
@pytest.mark.parametrize("folder", ["own", "gpt2"])
def test_a_merged_folder_is_the_merged_model_to_the_bit(tmp_path, folder, targets):
    """For a look-up or a tied head too, which are tied no more; and our own folder records its new weights' hash."""
    if folder == "own":
        ln.save_model(tmp_path / "base", ln.Model(OWN, ln.init_weights(OWN, seed=0)))
    else:
        write_gpt2(tmp_path / "base", GPT2)
    model = ln.load_model(tmp_path / "base")
    adapter = trained_adapter(model, ln.LoRAConfig(r=2, targets=targets, bias="lora_only"), seed=1)
    ln.save_adapter(tmp_path / "ad", adapter, model)
    merge(tmp_path)
    expected, got = ln.merge(model, adapter), ln.load_model(tmp_path / "out")
    assert got.config == expected.config
    assert same_bits(dict(got.weights), dict(expected.weights))


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_first_classifier(tmp_path, prefix):
    """A head that the base lacks: its names get the trunk's in front, its labels are those of task.json.

    What the base has of another head, here a tied one written out, has no place beside it.
    """
    table = write_gpt2(tmp_path / "base", GPT2, prefix=prefix)[f"{prefix}wte.weight"]
    edit_tensors(tmp_path / "base" / WEIGHTS, lambda tensors: tensors.update({"lm_head.weight": table}))
    model = ln.load_model(tmp_path / "base", head="classify", n_labels=3, seed=0)
    adapter = trained_adapter(model, ln.LoRAConfig(r=2, train_head=True), seed=1)
    ln.save_adapter(tmp_path / "ad", adapter, model)
    (tmp_path / "ad" / "task.json").write_text(json.dumps({"name": "classify", "labels": ["no", "yes", "so"]}))
    merge(tmp_path)
    got, expected = ln.load_model(tmp_path / "out"), ln.merge(model, adapter)
    assert (got.config.head, got.config.n_labels) == ("classify", 3)
    assert same_bits(dict(got.weights), dict(expected.weights))
    names = load_file(tmp_path / "out" / WEIGHTS).keys()
    assert all(name.startswith("transformer.") for name in names - {"score.weight"})
    about = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert about["architectures"] == ["GPT2ForSequenceClassification"]
    assert about["id2label"] == {"0": "no", "1": "yes", "2": "so"}
    assert about["label2id"] == {"no": 0, "yes": 1, "so": 2}
    (tmp_path / "ad" / "task.json").unlink()
    merge(tmp_path, out="unnamed")
    about = json.loads((tmp_path / "unnamed" / CONFIG).read_text())
    assert about["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    for labels, message in (
        (["no", "yes"], "expected task classify with 3 labels, as the weights are, got classify with 2"),
        (["no", "no", "so"], r"Task\.labels: expected two different names at least, got \('no', 'no', 'so'\)"),
        ("no", r"Task\.labels: a value of the wrong type: 'no'"),
        ([1, 2, 3], r"Task\.labels: a value of the wrong type: \[1, 2, 3\]"),
    ):
        (tmp_path / "ad" / "task.json").write_text(json.dumps({"name": "classify", "labels": labels}))
        with pytest.raises(ValueError, match=rf"task\.json: {message}$"):
            merge(tmp_path, out="never")
    assert not (tmp_path / "never").exists()


# --- The bytes -------------------------------------------------------------------------------------------------------


def test_all_that_is_not_merged_is_the_bases_bytes(home):
    """The header, the order of the tensors, config.json, other files and folders."""
    base = home / "base"
    tensors = load_file(base / WEIGHTS)
    tensors["transformer.h.0.attn.bias"] = np.tri(3, dtype="bool")
    header, data = b'{"__metadata__":{"format":"pt","a":"\\u00e9"}', b""
    for name in sorted(tensors, reverse=True):
        value = tensors[name]
        dtype = "BOOL" if value.dtype == bool else "F32"
        places = [len(data), len(data) + value.nbytes]
        header += f',"{name}":{{"shape":{list(value.shape)},"dtype":"{dtype}","data_offsets":{places}}}'.encode()
        data += value.tobytes()
    header += b"}     "
    (base / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data)
    (base / CONFIG).write_text("  " + (base / CONFIG).read_text())
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "model.safetensors").write_bytes(b"another's")
    (base / "tokenizer.json").write_bytes(b"its tokenizer")
    (base / "pytorch_model.bin").write_bytes(b"the base's weights once more")
    done = merge(home)
    assert done == (2, len(tensors) - 2, ["pytorch_model.bin"], [], [])
    out = home / "out"
    assert sorted(contents(out)) == [CONFIG, WEIGHTS, "tokenizer.json"]
    assert (out / CONFIG).read_bytes() == (base / CONFIG).read_bytes()
    assert (out / "1_Pooling" / "model.safetensors").read_bytes() == b"another's"
    assert (out / "tokenizer.json").read_bytes() == b"its tokenizer"
    was, now = (folder / WEIGHTS for folder in (base, out))
    assert now.read_bytes()[: 8 + len(header)] == was.read_bytes()[: 8 + len(header)]
    merged = load_file(now)
    changed = [name for name in tensors if not same_bits(merged[name], tensors[name])]
    assert sorted(changed) == sorted(f"{module}.weight" for module in MODULES)


def split(base, *, by=7):
    """The base's single file as shards of `by` tensors, with an index."""
    tensors = list(load_file(base / WEIGHTS).items())
    (base / WEIGHTS).unlink()
    places = {}
    for i in range(0, len(tensors), by):
        name = f"model-{i // by + 1:05}-of-{-(-len(tensors) // by):05}.safetensors"
        save_file(dict(tensors[i : i + by]), base / name)
        places |= dict.fromkeys(dict(tensors[i : i + by]), name)
    total = sum(value.nbytes for _, value in tensors)
    about = {"metadata": {"total_size": total, "kept": 1}, "weight_map": places}
    (base / INDEX).write_text(json.dumps(about))


def test_shards_stay_as_they_are(home):
    merge(home, out="whole")
    split(home / "base")
    merge(home)
    base, out = home / "base", home / "out"
    assert contents(base).keys() == contents(out).keys()
    assert (base / INDEX).read_bytes() == (out / INDEX).read_bytes()
    model, whole = ln.load_model(out), ln.load_model(home / "whole")
    assert same_bits(dict(model.weights), dict(whole.weights))
    for path in base.glob("*.safetensors"):
        assert load_file(path).keys() == load_file(out / path.name).keys()


def test_an_index_names_what_is_added(home):
    split(home / "base")
    model = ln.load_model(home / "base")
    adapter = trained_adapter(model, ln.LoRAConfig(r=2, targets=("head",)), seed=1)
    ln.save_adapter(home / "head", adapter, model)
    merge(home, "head")
    was, now = (json.loads((home / folder / INDEX).read_text()) for folder in ("base", "out"))
    added = now["weight_map"].keys() - was["weight_map"].keys()
    assert added == {"lm_head.weight"}
    assert now["metadata"]["kept"] == 1
    assert now["metadata"]["total_size"] - was["metadata"]["total_size"] == 4 * GPT2.vocab_size * D
    assert same_bits(dict(ln.load_model(home / "out").weights), dict(ln.merge(model, adapter).weights))


# --- What is refused, and what is left when it fails -----------------------------------------------------------------


def link_to_a_folder(home):
    (home / "base" / "loop").symlink_to(home / "base")


def link_to_nothing(home):
    (home / "base" / "lost").symlink_to(home / "nowhere")


def two_heads(home):
    model = ln.load_model(home / "base")
    for name in ("one", "two"):
        ln.save_adapter(home / name, trained_adapter(model, ln.LoRAConfig(r=2, bias="all"), seed=1), model)


def pickled(home):
    (home / "base" / WEIGHTS).rename(home / "base" / "pytorch_model.bin")


def too_large(home):
    write_peft(home / "huge", {n: (A * 3e38, B * 3e38) for n, (A, B) in factors(1).items()}, r=2, alpha=4)


REFUSED = {
    "inside the base": (None, ("ad",), [1.0], "base/out", "expected a folder outside of"),
    "inside the adapter": (None, ("ad",), [1.0], "ad/out", "expected a folder outside of"),
    "over a folder": (None, ("ad",), [1.0], "base", "expected a folder outside of|exists already"),
    "too few weights": (None, ("ad", "ad"), [1.0], "out", "a weight for each adapter, got 2 and 1"),
    "a weight that is no number": (None, ("ad",), [float("nan")], "out", "expected finite weights"),
    "a pickle": (pickled, ("ad",), [1.0], "out", "a pickle file can run any code"),
    "a link to a folder": (link_to_a_folder, ("ad",), [1.0], "out", "a link to a folder"),
    "a link to nothing": (link_to_nothing, ("ad",), [1.0], "out", "lost: expected a file"),
    "biases of two": (two_heads, ("one", "two"), [1.0, 1.0], "out", "trained whole.*got another"),
    "half a bias": (two_heads, ("one",), [0.5], "out", "trained whole.*got weight 0.5"),
    "beyond the dtype": (too_large, ("huge",), [1.0], "out", "too large for float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused(home, case):
    change, adapters, weights, out, message = REFUSED[case]
    if change:
        change(home)
    before = {folder: contents(home / folder) for folder in ("base", "ad") if case != "a link to nothing"}
    paths = [home / name for name in adapters]
    with pytest.raises((ValueError, FileExistsError), match=message) as caught:
        merge_folder(home / "base", paths, weights, home / out)
    assert "\n" not in str(caught.value)
    assert not list(home.rglob("*.partial"))
    assert not (home / "out").exists()
    for folder, files in before.items():
        assert contents(home / folder) == files


def test_a_gguf_base_is_refused_with_the_reason(home):
    with pytest.raises(ValueError, match=r"expected a model's folder, got a \.gguf file"):
        merge_folder(home / "base.gguf", [home / "ad"], [1.0], home / "out")


def test_a_damaged_base_of_our_own_is_refused(tmp_path):
    """What is merged gets a hash of its own: damage must not be passed on under it."""
    model = ln.Model(OWN, ln.init_weights(OWN, seed=0))
    ln.save_model(tmp_path / "base", model)
    write_peft(
        tmp_path / "ad", {"layers.0.mlp.up": (np.ones((2, 8), "float32"), np.ones((12, 2), "float32"))}, r=2, alpha=2
    )
    merge(tmp_path)
    edit_tensors(tmp_path / "base" / WEIGHTS, lambda tensors: tensors["norm.weight"].__setitem__(0, 2.0))
    with pytest.raises(ValueError, match="SHA-256 differs"):
        merge(tmp_path, out="never")
    assert not (tmp_path / "never").exists()


def test_a_tied_head_that_differs_from_the_table_is_refused(home):
    change = {"lm_head.weight": np.zeros((GPT2.vocab_size, D), "float32")}
    edit_tensors(home / "base" / WEIGHTS, lambda tensors: tensors.update(change))
    table = {"transformer.wte": (GPT2.vocab_size, D)}
    (A, B) = factors(1, modules=table)["transformer.wte"]
    key = "base_model.model.transformer.wte.lora_embedding_"
    write_peft(home / "table", {}, r=2, alpha=4, target_modules=["wte"])
    save_file({f"{key}A": B.T.copy(), f"{key}B": A.T.copy()}, home / "table" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="tied to the token table, but it differs"):
        merge(home, "table")


def test_adapters_of_different_heads_are_refused(tmp_path):
    write_gpt2(tmp_path / "base", GPT2)
    for n in (2, 3):
        model = ln.load_model(tmp_path / "base", head="classify", n_labels=n, seed=0)
        adapter = trained_adapter(model, ln.LoRAConfig(r=2, train_head=True), seed=1)
        ln.save_adapter(tmp_path / f"ad{n}", adapter, model)
    with pytest.raises(ValueError, match="different heads"):
        merge(tmp_path, "ad2", "ad3")


def test_an_existing_folder_is_not_written_over(home):
    (home / "out").mkdir()
    with pytest.raises(FileExistsError, match="not written over"):
        merge(home)
    assert not list((home / "out").iterdir())


@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_merge_that_fails_in_the_middle_leaves_nothing(home, monkeypatch, at):
    read = Stored.parts
    seen = []

    def full(stored):
        seen.append(stored)
        if len(seen) > at:
            raise OSError("no space left on the device")
        return read(stored)

    monkeypatch.setattr(Stored, "parts", full)
    with pytest.raises(OSError, match="no space"):
        merge(home)
    assert sorted(os.listdir(home)) == ["ad", "base"]


SLOWLY = """
import sys, time
from lora_np.formats.merged.folder import merge_folder
from lora_np.formats.models.shards import Stored

read = Stored.parts

def slow(stored):
    time.sleep(0.05)
    return read(stored)

Stored.parts = slow
merge_folder(sys.argv[1], [sys.argv[2]], [1.0], sys.argv[3])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_merge_that_is_killed_leaves_no_folder_that_looks_whole(home):
    argv = [sys.executable, "-c", SLOWLY, home / "base", home / "ad", home / "out"]
    process = subprocess.Popen([str(part) for part in argv])
    deadline = time.monotonic() + 120
    while not list(home.glob(f".out.*.partial/{WEIGHTS}")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (home / "out").exists()
    (left,) = home.glob(".out.*.partial")
    with pytest.raises((ValueError, FileNotFoundError)):
        ln.load_model(left)
    merge(home)  # what is left stands in nobody's way
    assert ln.load_model(home / "out")


# --- Memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import pathlib, resource, sys
import lora_np.formats.merged.folder, ml_dtypes, safetensors.numpy

def peak():
    # Linux hands ru_maxrss on from the process that started this one; VmHWM starts anew.
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])

before = peak()
lora_np.formats.merged.folder.merge_folder(sys.argv[1], [sys.argv[2]], [1.0], sys.argv[3])
print(peak() - before)
"""
LARGE = ln.Config(20000, 64, 12, 8, 512, 2048)


@pytest.mark.skipif(ln.backend_name != "numpy", reason="it measures the host's memory")
@pytest.mark.skipif(sys.platform == "win32", reason="resource is POSIX")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", ["layers", "embed"])
def test_peak_memory_is_two_copies_of_the_largest_tensor_and_the_adapter(tmp_path, dtype, targets):
    """The base has 192 MB in float32, the largest tensor 41 MB; the adapter is held as it is, and one pair widened."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="reads bfloat16: the extra models")
    write_gpt2(tmp_path / "base", LARGE, dtype=ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    modules = {f"transformer.h.{i}.attn.c_attn": (1536, 512) for i in range(12)}
    rng = np.random.default_rng(0)
    r, largest = 8, 20000 * 512 * (2 if dtype == "bfloat16" else 4)
    pairs = {n: (rng.random((r, i), "float32"), rng.random((o, r), "float32")) for n, (o, i) in modules.items()}
    write_peft(tmp_path / "ad", pairs, r=r, alpha=8)
    held = 3 * sum(A.nbytes + B.nbytes for A, B in pairs.values())  # the parameters; two pairs, and they in float64
    if targets == "embed":
        A, B = rng.random((r, 20000), "float32"), rng.random((512, r), "float32")
        key = "base_model.model.transformer.wte.lora_embedding_"
        save_file({f"{key}A": A, f"{key}B": B}, tmp_path / "ad" / "adapter_model.safetensors")
        edit_json(tmp_path / "ad" / "adapter_config.json", target_modules=["wte"])
        held = 5 * (A.nbytes + B.nbytes)
    argv = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("base", "ad", "out"))]
    grown = int(subprocess.run(argv, capture_output=True, text=True, check=True, env=os.environ).stdout)
    print(f"{grown / 2**20:.0f} MiB; the largest tensor {largest / 2**20:.0f}")
    assert grown < 2 * largest + held + 8 * 2**20
    key = "transformer.wpe.weight" if targets == "embed" else "transformer.wte.weight"
    merged, base = (load_file(tmp_path / folder / WEIGHTS)[key] for folder in ("out", "base"))
    assert bits(merged) == bits(base)
