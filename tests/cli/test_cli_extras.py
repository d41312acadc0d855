"""What a command lacks, it says before it works, not after."""

import sys

import pytest

from lora_np import cli
from lora_np.training import embedded, loop


@pytest.fixture
def unable(monkeypatch, tmp_path):
    """A home without safetensors, in which nothing may be trained or computed."""

    def work(*_, **__):
        raise AssertionError("work was done that cannot be kept")

    monkeypatch.setenv("LORA_NP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    monkeypatch.setattr(loop, "_step", work)
    monkeypatch.setattr("lora_np.cli.conformance.made", work)
    return tmp_path


@pytest.mark.parametrize("argv", ["demo", "demo --quick", "finetune --data text --out new", "vectors --out new"])
def test_without_safetensors_nothing_is_begun_that_could_not_be_written(unable, monkeypatch, capsys, argv):
    monkeypatch.chdir(unable)
    (unable / "text").write_text("some words " * 100)
    assert cli.main(argv.split()) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "needs safetensors: pip install" in said[0]
    assert sorted(path.name for path in unable.iterdir()) == ["text"]


def test_with_its_base_in_the_cache_too(unable, monkeypatch, capsys):
    monkeypatch.setattr(embedded, "_is_whole", lambda folder: True)
    assert cli.main(["demo"]) == 2
    assert "needs safetensors" in capsys.readouterr().err
