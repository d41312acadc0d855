"""A file that is written to, cut short or replaced while it is read: one line, whatever is read of it."""

import os

import numpy as np
import pytest
from hostile import GPT2, OWN, contents, write_gpt2, write_peft
from safetensors.numpy import load_file, save_file
from test_plan import CONFIG, INDEX, WEIGHTS, factors, split

import lora_np as ln
from lora_np.formats.files.safetensors_file import TensorFile
from lora_np.formats.files.stamp import open_unchanged, stamp
from lora_np.formats.merged import folder as merged_folder


def cut(path):
    """Shorter, in place: a map of it would end the process."""
    os.truncate(path, 100)


def one_byte(path):
    """As long as before, in place."""
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def longer(path):
    with open(path, "ab") as file:
        file.write(b"more")


def another(path):
    """Another file of the same size, and of the same time, under the name."""
    before, new = path.stat(), path.with_name("new")
    new.write_bytes(path.read_bytes()[:-1] + b"\x01")
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(path)


CHANGES = [cut, one_byte, longer, another]


@pytest.mark.parametrize("change", CHANGES)
def test_an_open_file_is_what_it_was(tmp_path, change):
    path = tmp_path / "x"
    path.write_bytes(b"some bytes" * 20)
    with open_unchanged(path) as file:
        known = stamp(file)
        assert file.read(4) == b"some"
    with open_unchanged(path, known) as file:
        assert file.read(4) == b"some"
    if change is not another:  # of which an open file knows nothing: it is the one before
        with pytest.raises(ValueError, match=r"x: the file was changed while it was read"), open_unchanged(path):
            change(path)
    else:
        change(path)
    with pytest.raises(ValueError, match=r"x: the file was changed"), open_unchanged(path, known):
        pytest.fail("nothing may be read of it")


def after(monkeypatch, owner, name, n, change):
    """Calls `change` after the n-th call of a method."""
    real, seen = getattr(owner, name), []

    def watched(*args, **kwargs):
        result = real(*args, **kwargs)
        seen.append(name)
        if len(seen) == n:
            change()
        return result

    monkeypatch.setattr(owner, name, watched)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("kind", ["own", "gpt2"])
def test_a_base_that_changes_while_it_is_loaded(tmp_path, monkeypatch, kind, n, change):
    base = tmp_path / "base"
    if kind == "own":
        ln.save_model(base, ln.Model(OWN, ln.init_weights(OWN, seed=0)))
    else:
        write_gpt2(base, GPT2)
    after(monkeypatch, TensorFile, "_next", n, lambda: change(base / WEIGHTS))
    with pytest.raises(ValueError, match=r"model\.safetensors: the file was changed while it was read"):
        ln.load_model(base)


@pytest.mark.parametrize("change", [cut, one_byte, longer])
def test_a_gguf_file_that_changes_while_it_is_loaded(tmp_path, monkeypatch, change):
    pytest.importorskip("gguf", reason="reads GGUF files: the extra models")
    from test_gguf import SMALL, write

    from lora_np.formats.models.gguf_file import GGUFFile

    write(tmp_path / "x.gguf", SMALL)
    after(monkeypatch, GGUFFile, "read_raw", 1, lambda: change(tmp_path / "x.gguf"))
    with pytest.raises(ValueError, match=r"x\.gguf: (the file was changed|.*the file ends within it)"):
        ln.load_model(tmp_path / "x.gguf")


def test_a_gguf_header_that_is_cut_short(tmp_path, monkeypatch):
    """While it is read, after its size was."""
    pytest.importorskip("gguf", reason="reads GGUF files: the extra models")
    from test_gguf import SMALL, write

    from lora_np.formats.models import gguf_file

    write(tmp_path / "x.gguf", SMALL, keys={"general.description": "long" * 10_000})
    monkeypatch.setattr(gguf_file, "AHEAD", 1)
    after(monkeypatch, gguf_file.GGUFFile, "_count", 2, lambda: cut(tmp_path / "x.gguf"))
    with pytest.raises(ValueError, match=r"x\.gguf: the file was changed"):
        ln.load_model(tmp_path / "x.gguf")


# --- Merging ---------------------------------------------------------------------------------------------------------


def reworded(path):
    """A JSON file that says something else, and is as long as before."""
    text = path.read_text()
    path.write_text(text.replace('"n_positions": 10', '"n_positions": 11').replace("model-00001", "model-00002"))


@pytest.mark.parametrize("folder", ["own", "gpt2", "shards"])
@pytest.mark.parametrize("change", [*CHANGES, reworded])
def test_a_base_that_changes_between_the_plan_and_the_writing(tmp_path, monkeypatch, folder, change):
    """An adapter that records its base's hash: what is merged must be the weights that were hashed."""
    base = tmp_path / "base"
    if folder == "own":
        ln.save_model(base, ln.Model(OWN, ln.init_weights(OWN, seed=0)))
    else:
        write_gpt2(base, GPT2)
    if folder == "shards":
        split(base)
    model = ln.load_model(base)
    ln.save_adapter(tmp_path / "ad", ln.init_adapter(model, ln.LoRAConfig(r=2), seed=0), model)
    name = WEIGHTS if folder != "shards" else "model-00002-of-00004.safetensors"
    if change is reworded:
        name = INDEX if folder == "shards" else CONFIG
    if (folder, change) == ("own", reworded):
        return  # its config.json is made, not copied
    after(monkeypatch, merged_folder, "plan_merge", 1, lambda: change(base / name))
    with pytest.raises(ValueError, match=rf"base/{name}: the file was changed while it was read"):
        merged_folder.merge_folder(base, [tmp_path / "ad"], [1.0], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["ad", "base"]


# --- Numbers that are none, in what is copied ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_base_with_a_number_that_is_none_is_not_merged(tmp_path, dtype, value):
    """In a weight that no adapter touches: load_model refuses it too. A buffer may hold what it will."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="reads bfloat16: the extra models")
    base = tmp_path / "base"
    tensors = write_gpt2(base, GPT2, dtype=ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    buffer = "transformer.h.0.attn.masked_bias"
    tensors[buffer] = np.full(1, value).astype(tensors["transformer.wte.weight"].dtype)
    save_file(tensors, base / WEIGHTS)
    write_peft(tmp_path / "ad", factors(1), r=2, alpha=4)
    merged_folder.merge_folder(base, [tmp_path / "ad"], [1.0], tmp_path / "out")
    assert load_file(tmp_path / "out" / WEIGHTS)[buffer].tobytes() == tensors[buffer].tobytes()
    tensors["transformer.h.1.ln_2.bias"][-1] = value
    save_file(tensors, base / WEIGHTS)
    for refused in (
        lambda: ln.load_model(base),
        lambda: merged_folder.merge_folder(base, [tmp_path / "ad"], [1.0], tmp_path / "never"),
    ):
        with pytest.raises(ValueError, match=r"base/model\.safetensors: transformer\.h\.1\.ln_2\.bias: holds .*NaN"):
            refused()
    assert sorted(os.listdir(tmp_path)) == ["ad", "base", "out"]


def test_no_model_of_our_own_holds_a_number_that_is_none(tmp_path):
    weights = ln.init_weights(OWN, seed=0)
    weights["norm.weight"][3] = np.nan
    with pytest.raises(ValueError, match=r"save_model: norm\.weight: holds NaN"):
        ln.save_model(tmp_path / "base", ln.Model(OWN, weights))
    assert not list(tmp_path.iterdir())


# --- Links -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    write_gpt2(tmp_path / "base", GPT2)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    write_peft(tmp_path / "ad", factors(1), r=2, alpha=4)
    return tmp_path


def test_a_folder_of_a_hubs_cache_is_merged(home):
    """Every file of a snapshot is a link to a blob beside the snapshots."""
    merged_folder.merge_folder(home / "base", [home / "ad"], [1.0], home / "plain")
    snapshot, blobs = home / "models--x--y" / "snapshots" / "0123", home / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted((home / "base").iterdir())):
        path.rename(blobs / f"{i:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040x}")
    (home / "named").symlink_to(snapshot)
    for name, base in (("cached", snapshot), ("linked", home / "named")):
        assert ln.load_model(base)
        merged_folder.merge_folder(base, [home / "ad"], [1.0], home / name)
        assert contents(home / name) == contents(home / "plain")
        assert not any(path.is_symlink() for path in (home / name).iterdir())


@pytest.mark.parametrize("name", ["tokenizer.json", CONFIG, WEIGHTS, "model-00001-of-00004.safetensors", "sub/more"])
def test_a_link_out_of_the_folder_is_not_copied(home, name):
    base, secret = home / "base", home / "secret"
    if "0000" in name:
        split(base)
    (base / "sub").mkdir()
    (base / "sub" / "more").write_text("more")
    (base / name).rename(secret)
    (base / name).symlink_to(secret)
    assert ln.load_model(base)
    with pytest.raises(ValueError, match=rf"base/{name}: a link out of the base's folder, to .*/secret"):
        merged_folder.merge_folder(base, [home / "ad"], [1.0], home / "out")
    assert not (home / "out").exists()


def test_a_link_within_the_folder_and_one_to_weights_that_are_left_out(home):
    (home / "base" / "vocab.json").symlink_to("tokenizer.json")
    (home / "elsewhere").write_bytes(b"weights")
    (home / "base" / "pytorch_model.bin").symlink_to(home / "elsewhere")
    done = merged_folder.merge_folder(home / "base", [home / "ad"], [1.0], home / "out")
    assert done.left_out == ["pytorch_model.bin"]
    assert (home / "out" / "vocab.json").read_text() == "{}"


def test_a_link_to_what_looks_like_blobs_and_lies_elsewhere(home):
    """Only beside the snapshots that the folder is in."""
    (home / "blobs").mkdir()
    (home / "blobs" / "x").write_text("a secret")
    (home / "base" / "vocab.json").symlink_to(home / "blobs" / "x")
    with pytest.raises(ValueError, match=r"vocab\.json: a link out"):
        merged_folder.merge_folder(home / "base", [home / "ad"], [1.0], home / "out")


def test_a_subfolder_that_cannot_be_read_is_an_error(home, monkeypatch):
    (home / "base" / "1_Pooling").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("1_Pooling"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="1_Pooling"):
        merged_folder.merge_folder(home / "base", [home / "ad"], [1.0], home / "out")
    assert not (home / "out").exists()
