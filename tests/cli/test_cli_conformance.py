"""lora-np vectors and conform, as their user meets them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import run
from our_vectors import of, ours

pytest.importorskip("safetensors", reason="files of vectors: the extra cli")

from lora_np.formats.files.atomic import write_tensors
from lora_np.formats.files.safetensors_file import open_tensors
from lora_np.vectors.adapter_files import file_cases
from lora_np.vectors.files import digest, read_vectors
from lora_np.vectors.refusals import refusals

VECTORS = Path(__file__).parents[1] / "conformance" / "vectors" / "v2"
ALL, L4 = len(ours().cases), len(of("L4"))


def expected(folder, *ids, change=lambda name, a: a):
    """The expected tensors themselves, as results."""
    folder.mkdir()
    for id in ids:
        with open_tensors(VECTORS / f"{id}.safetensors") as file:
            wanted = {name: file.read(name) for name in file.shapes if name.split("/")[1] in ("out", "grad")}
        write_tensors(folder / f"{id}.safetensors", {name: np.array(change(name, a)) for name, a in wanted.items()})
    return folder


def test_vectors_says_what_it_wrote(tmp_path, capsys, monkeypatch):
    """Of those that are made once for all tests."""
    monkeypatch.setattr("lora_np.cli.conformance.made", lambda **which: ours())
    status, out, _ = run(capsys, "vectors", "--out", tmp_path / "vectors", "--json")
    result = json.loads(out)
    assert status == 0
    names = {path.name for path in (tmp_path / "vectors").iterdir()}
    assert result["ids"] == len(names - {"manifest.json", "files", "refusals"}) == len(names) - 3
    files = [path for path in (tmp_path / "vectors").rglob("*") if path.is_file()]
    assert result["bytes"] == sum(path.stat().st_size for path in files)
    assert result["cases"] == len(json.loads((tmp_path / "vectors" / "manifest.json").read_text())["cases"])
    assert result["digest"] == json.loads((VECTORS / "manifest.json").read_text())["digest"]
    status, _, err = run(capsys, "vectors", "--out", tmp_path / "vectors")
    assert status == 2
    assert "exists already" in err


@pytest.mark.parametrize("given", [True, False])
def test_conform_says_yes(tmp_path, capsys, given):
    results = expected(tmp_path / "r", "L4", "T10")
    status, out, _ = run(capsys, "conform", results, *(["--vectors", VECTORS] if given else []))
    lines = out.splitlines()
    assert status == 0
    assert lines[-1] == f"conforms: yes, {L4 + 3} of {ALL} cases"
    assert lines[-2].startswith("no results: A1 A2 L1 L2 L3 L5")
    assert [line.split()[:5] for line in lines[1:3]] == [
        ["L4", f"{L4}", f"{L4}", "0", "0"],
        ["T10", "3", "3", "0", "0"],
    ]


def test_conform_says_no_and_what_it_looks_like(tmp_path, capsys):
    results = expected(tmp_path / "r", "T10", "L4", change=lambda name, a: a * 1.5 if name == "bias/grad/A" else a)
    status, out, _ = run(capsys, "conform", results, "--vectors", VECTORS)
    assert status == 1
    assert "L4 bias: grad/A is " in out
    assert "looks like" not in out
    assert out.splitlines()[-1] == f"conforms: no, {L4 + 2} of {ALL} cases"
    third = expected(tmp_path / "third", "L4", change=lambda name, a: a / 3 if name.endswith("bias/grad/A") else a)
    status, out, _ = run(capsys, "conform", third, "--vectors", VECTORS)
    assert "L4 looks like this mistake: dA lacks the scale s (1 of 1 failing cases)" in out
    status, out, _ = run(capsys, "conform", third, "--vectors", VECTORS, "--json")
    result = json.loads(out)
    assert status == 1
    assert not result["holds"]
    assert [(one["id"], one["passed"], one["looks_like"]) for one in result["ids"]] == [
        ("L4", False, "dA lacks the scale s")
    ]
    assert [case["name"] for case in result["ids"][0]["cases"] if case["failed"]] == ["bias"]


def test_what_is_missing_fails_where_all_is_asked_for(tmp_path, capsys):
    results = expected(tmp_path / "r", "T10")
    assert run(capsys, "conform", results)[0] == 0
    assert run(capsys, "conform", results, "--all")[0] == 1


def test_vectors_of_an_earlier_version_are_written_and_read(tmp_path, capsys, monkeypatch):
    """Those that are committed, where they would be made."""
    earlier, written = VECTORS.with_name("v1"), tmp_path / "v1"
    monkeypatch.setattr(
        "lora_np.cli.conformance.made", lambda *_, version, precision: read_vectors(VECTORS.with_name(version))
    )
    assert run(capsys, "vectors", "--out", written, "--version", "v1")[0] == 0
    assert read_vectors(written).digest == read_vectors(earlier).digest
    status, out, _ = run(capsys, "conform", expected(tmp_path / "r", "T10"), "--vectors", written)
    assert (status, out.splitlines()[-1]) == (0, "conforms: yes, 3 of 180 cases")


def test_what_is_not_read_is_named_and_no_case_of_an_id_is_no(tmp_path, capsys):
    """Each gradient under another name: of none of L4's cases is there all."""
    results = expected(tmp_path / "r", "T10")
    with open_tensors(VECTORS / "L4.safetensors") as file:
        wanted = {name: file.read(name) for name in file.shapes if name.split("/")[1] in ("out", "grad")}
    write_tensors(results / "L4.safetensors", {name.replace("/grad/", "/gradient/"): a for name, a in wanted.items()})
    status, out, _ = run(capsys, "conform", results)
    assert status == 1
    assert "L4: no case of it is there whole, and right" in out
    gradients = [name for name in wanted if "/grad/" in name]
    first = sorted(name.replace("/grad/", "/gradient/") for name in gradients)[0]
    (line,) = (line for line in out.splitlines() if line.startswith("L4: not read, as no case asks for it: "))
    assert first in line
    assert line.endswith(f"and {len(gradients) - 8} more")
    assert out.splitlines()[-1] == f"conforms: no, 3 of {ALL} cases"
    result = json.loads(run(capsys, "conform", results, "--json")[1])
    assert (result["holds"], result["right"], result["cases"]) == (False, 3, ALL)
    assert [(one["id"], one["holds"], len(one["not_read"])) for one in result["ids"]] == [
        ("L4", False, len(gradients)), ("T10", True, 0)
    ]  # fmt: skip


def test_a_file_of_no_id_is_named(tmp_path, capsys):
    results = expected(tmp_path / "r", "T10", "L4")
    (results / "L4.safetensors").rename(results / "l-4.safetensors")
    status, out, _ = run(capsys, "conform", results)
    assert (status, "not read: l-4.safetensors: there is no such id" in out) == (0, True)
    assert out.splitlines()[-1] == f"conforms: yes, 3 of {ALL} cases"
    (results / "T10.safetensors").unlink()
    status, out, err = run(capsys, "conform", results)
    assert (status, out, "there are no results: expected files like" in err) == (2, "", True)


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    status, _, err = run(capsys, "conform", tmp_path)
    assert (status, "there are no results: expected files like L2.safetensors" in err) == (2, True)
    status, _, err = run(capsys, "conform", tmp_path / "none")
    assert (status, "no such folder" in err) == (2, True)
    status, _, err = run(capsys, "conform", tmp_path, "--vectors", tmp_path)
    assert (status, "manifest.json: no such file" in err) == (2, True)


def test_vectors_of_others_are_compared_without_naming_mistakes(tmp_path, capsys):
    """Their definitions may be others: only the numbers in their files count."""
    (tmp_path / "theirs").mkdir()
    shutil.copy(VECTORS / "L4.safetensors", tmp_path / "theirs")
    manifest = json.loads((VECTORS / "manifest.json").read_text())
    manifest["cases"] = [entry for entry in manifest["cases"] if entry["id"] == "L4"]
    manifest["digest"] = digest((one for one in read_vectors(VECTORS).cases if one[0].id == "L4"), "v2")
    (tmp_path / "theirs" / "manifest.json").write_text(json.dumps(manifest))
    third = expected(tmp_path / "third", "L4", change=lambda name, a: a / 3 if name.endswith("bias/grad/A") else a)
    status, out, _ = run(capsys, "conform", third, "--vectors", tmp_path / "theirs")
    assert status == 1
    assert "L4 bias: grad/A" in out
    assert "looks like" not in out


def of_adapters(folder, *, change=lambda name, a: a, accepted=()):
    """The expected updates themselves, and every refusal but those of `accepted`, as results."""
    folder.mkdir()
    found = {f"{case.name}/dW/{key}": answer.value for case in file_cases() for key, answer in case.added.items()}
    found |= {f"{case.name}/W/{key}": a for case in file_cases() for key, a in case.replaced.items()}
    write_tensors(folder / "files.safetensors", {name: change(name, a) for name, a in found.items()})
    said = {case.name: None if case.name in accepted else "no" for case in refusals()}
    (folder / "refusals.json").write_text(json.dumps(said))
    return folder


def test_conform_judges_adapters_as_files(tmp_path, capsys):
    """Cases apart from the ids', which are counted by themselves."""
    status, out, _ = run(capsys, "conform", of_adapters(tmp_path / "r"))
    n, m = len(file_cases()), len(refusals())
    assert status == 0
    assert out.splitlines()[1].split()[:5] == ["files", f"{n}", f"{n}", "0", "0"]
    assert out.splitlines()[-2:] == [f"refusals: {m} of {m} refused", f"conforms: yes, 0 of {ALL} cases"]


def test_conform_says_which_adapter_is_read_wrongly(tmp_path, capsys):
    results = of_adapters(tmp_path / "r", change=lambda name, a: a * 2 if name.startswith("rslora/") else a)
    status, out, _ = run(capsys, "conform", results)
    assert status == 1
    assert "files rslora: dW/model.layers." in out
    assert out.splitlines()[-1] == f"conforms: no, 0 of {ALL} cases"


def test_conform_says_what_was_not_refused(tmp_path, capsys):
    results = of_adapters(tmp_path / "r", accepted=("nan", "missing-B"))
    status, out, _ = run(capsys, "conform", results)
    assert status == 1
    assert "refusals: accepted: nan missing-B" in out.splitlines()
    result = json.loads(run(capsys, "conform", results, "--json")[1])
    assert (result["holds"], result["refusals"]["accepted"]) == (False, ["nan", "missing-B"])
    assert len(result["refusals"]["refused"]) == len(refusals()) - 2
    (results / "refusals.json").write_text('{"nan": 0}')
    status, _, err = run(capsys, "conform", results)
    assert (status, "refusals.json: nan: expected an error's words, or null where there was none, got 0" in err) == (
        2,
        True,
    )
