"""Adapters as files: a plain reader of PEFT's two files, and our own, are right; each thing left out is seen."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="files of vectors: the extra cli")

from safetensors.numpy import load_file, save_file

from lora_np.formats.merged.plan import plan_merge
from lora_np.vectors.adapter_files import base_tensor, bases, file_cases, files_digest, write_file_cases
from lora_np.vectors.adapter_results import judge_files
from lora_np.vectors.answers import error_ratio

COMMITTED = Path(__file__).parents[1] / "conformance" / "vectors" / "v2" / "files"
NAMES = [case.name for case in file_cases()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The cases' files."""
    folder = tmp_path_factory.mktemp("vectors") / "files"
    write_file_cases(folder)
    return folder


def plain_reader(base, adapter, *, ignores=()):
    """dW and W by the base's tensors, from what stands in the files; of `ignores` nothing is known."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = {k: v.astype("f8") for k, v in load_file(adapter / "adapter_model.safetensors").items()}
    in_conv1d = json.loads((base / "config.json").read_text())["model_type"] == "gpt2"
    result = {}
    for key, A in tensors.items():
        module, found, kind = key.removeprefix("base_model.model.").partition(".lora_")
        if module.endswith(".lora_magnitude_vector"):
            continue
        if not found:
            module = module.replace(".base_layer", "")
            if "whole" not in ignores:
                result[f"W/{module}"] = A
        elif kind in ("A.weight", "embedding_A"):
            B = tensors[key.replace("_A", "_B")]
            s = scale(config, module, ignores)
            stored = load_file(base / "model.safetensors").get(f"{module}.weight")
            turned = kind == "embedding_A" or (in_conv1d and "flag" not in ignores)
            if "flag" in ignores and in_conv1d:
                turned = (len(B), A.shape[1]) != stored.shape or config.get("fan_in_fan_out", False)
            dW = s * B @ A
            m = tensors.get(f"base_model.model.{module}.lora_magnitude_vector")
            if m is not None and "use_dora" not in ignores:
                V = (stored.T if turned else stored) + dW
                dW = V * (m / np.linalg.norm(V, axis=1))[:, None] - (stored.T if turned else stored)
            result[f"dW/{module}.weight"] = np.ascontiguousarray(dW.T) if turned else dW
            if f"base_model.model.{module}.lora_B.bias" in tensors and "lora_bias" not in ignores:
                result[f"dW/{module}.bias"] = s * tensors[f"base_model.model.{module}.lora_B.bias"]
    return result


def scale(config, module, ignores):
    """s of a module, as PEFT finds it."""
    values = []
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        patterns = {} if pattern in ignores else config.get(pattern, {})
        patterns = dict(reversed(patterns.items())) if "order" in ignores else patterns
        fitting = (value for name, value in patterns.items() if re.match(rf"(.*\.)?({name})$", module))
        values.append(next(fitting, config.get(key, 16 if key in ignores else 8)))
    r, alpha = values
    return alpha / (r**0.5 if config.get("use_rslora") and "use_rslora" not in ignores else r)


def results(folder, path, reader):
    """A file of what a reader gives for all cases."""
    found = {}
    for case in file_cases():
        for name, a in reader(folder / "bases" / case.base, folder / case.name).items():
            found[f"{case.name}/{name}"] = a
    save_file(found, path)
    return path


def wrong(verdict):
    return [found.case.name for found in verdict.failed]


@pytest.mark.proves("L1")
def test_a_plain_reader_is_right(folder, tmp_path):
    """In float64: what is expected is what the files' own numbers give."""
    verdict = judge_files(results(folder, tmp_path / "r.safetensors", plain_reader))
    assert verdict.passed
    assert verdict.unread == []


IGNORED = {
    "use_rslora": ["rslora", "patterns-rslora", "dora-rslora"],
    "use_dora": ["dora", "dora-rslora", "conv1d-dora"],
    "rank_pattern": ["patterns", "patterns-rslora", "pattern-expression"],
    "alpha_pattern": ["patterns", "pattern-order", "patterns-rslora", "pattern-expression"],
    "order": ["pattern-order"],
    "lora_alpha": ["no-alpha"],
    "flag": ["conv1d-unsaid", "conv1d-denied"],
}


@pytest.mark.parametrize("what", IGNORED)
def test_what_a_reader_ignores_is_seen(folder, tmp_path, what):
    """And in what is written of it alone."""
    path = results(folder, tmp_path / "r.safetensors", lambda *paths: plain_reader(*paths, ignores=(what,)))
    verdict = judge_files(path)
    assert wrong(verdict) == IGNORED[what]
    assert not verdict.holds


@pytest.mark.parametrize(
    ("what", "cases"), [("whole", ["bias", "modules-to-save"]), ("lora_bias", ["conv1d-lora-bias"])]
)
def test_what_a_reader_leaves_out_is_missing(folder, tmp_path, what, cases):
    path = results(folder, tmp_path / "r.safetensors", lambda *paths: plain_reader(*paths, ignores=(what,)))
    verdict = judge_files(path)
    assert [found.case.name for found in verdict.missing] == cases
    assert not verdict.passed


def our_reader(base, adapter):
    """Every tensor of the model that our merge writes."""
    targets = plan_merge(base, [adapter], [1.0]).targets
    return {f"W/{one.key}": one.source.read("float32") if one.kept else one.values() for one in targets}


@pytest.mark.proves("L5")
def test_our_own_merge_is_right(folder, tmp_path):
    verdict = judge_files(results(folder, tmp_path / "r.safetensors", our_reader))
    assert verdict.passed
    assert verdict.worst.ratio <= 1
    assert verdict.unread == []


@pytest.mark.parametrize("name", ["tied-head", "tied-table"])
def test_an_update_of_the_tied_other_is_wrong(folder, tmp_path, name):
    """As a merge in place makes it, where the table is the head."""

    def reader(base, adapter):
        found = plain_reader(base, adapter)
        if adapter.name == name:
            (dW,) = found.values()
            found = {"dW/lm_head.weight": dW, "dW/model.embed_tokens.weight": dW}
        return found

    assert wrong(judge_files(results(folder, tmp_path / "r.safetensors", reader))) == [name]


@pytest.mark.parametrize(
    ("change", "misshapen"), [(lambda a: a * (1 + 2.0**-20), []), (lambda a: a[:, :-1], ["W/model.norm.weight"])]
)
def test_what_is_replaced_is_so_exactly(folder, tmp_path, change, misshapen):
    def reader(base, adapter):
        found = plain_reader(base, adapter)
        if "W/model.norm.weight" in found:
            found["W/model.norm.weight"] = change(found["W/model.norm.weight"][None])[0].copy()
        return found

    verdict = judge_files(results(folder, tmp_path / "r.safetensors", reader))
    assert wrong(verdict) == ["modules-to-save"]
    assert verdict.failed[0].misshapen == misshapen


def test_a_tensor_that_no_base_has_is_said_to_be_unread(folder, tmp_path):
    def reader(base, adapter):
        return plain_reader(base, adapter) | (
            {"dW/model.layers.9.weight": np.ones(2)} if adapter.name == "plain" else {}
        )

    assert judge_files(results(folder, tmp_path / "r.safetensors", reader)).unread == ["plain/dW/model.layers.9.weight"]


@pytest.mark.parametrize("name", NAMES)
def test_the_files_say_what_is_expected(folder, name):
    case = next(case for case in file_cases() if case.name == name)
    expected = load_file(folder / name / "expected.safetensors")
    (entry,) = (one for one in json.loads((folder / "manifest.json").read_text())["cases"] if one["name"] == name)
    assert {f"dW/{k}" for k in case.added} | {f"W/{k}" for k in case.replaced} == set(entry["expected"])
    assert {key for key in expected if not key.startswith("bound/")} == set(entry["expected"])
    for key, (value, bound) in case.added.items():
        np.testing.assert_array_equal(expected[f"dW/{key}"], value)
        np.testing.assert_array_equal(expected[f"bound/{key}"], bound)
        assert value.shape == base_tensor(bases()[case.base], key).shape
        assert np.abs(value).max() > 1e5 * bound.max()
    stored = load_file(folder / entry["base"] / "model.safetensors")
    assert {key: a.shape for key, a in stored.items()} == {
        key: a.shape for key, a in bases()[case.base].tensors.items()
    }


def test_the_digest_is_that_of_the_files(folder):
    assert json.loads((folder / "manifest.json").read_text())["digest"] == files_digest()


def test_the_committed_files_are_these(folder):
    """All but the last bits of what is expected, which depend on BLAS."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(COMMITTED) for path in COMMITTED.rglob("*") if path.is_file())
    for name in names:
        if name.name != "expected.safetensors":
            assert (folder / name).read_bytes() == (COMMITTED / name).read_bytes(), name
    for case in file_cases():
        found = load_file(COMMITTED / case.name / "expected.safetensors")
        for key, (value, bound) in case.added.items():
            assert error_ratio(found[f"dW/{key}"], value, bound) <= 1, (case.name, key)
            np.testing.assert_allclose(found[f"bound/{key}"], bound, rtol=1e-6)
