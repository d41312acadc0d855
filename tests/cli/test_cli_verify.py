"""lora-np verify of an adapter alone: what is zero, whose base it names, what is empty or no number."""

import json

import numpy as np
import pytest
from hostile import GPT2, edit_json, edit_tensors, write_gpt2, write_peft
from safetensors.numpy import save_file

from lora_np import cli

D, F, R = GPT2.d_model, GPT2.d_ff, 2
TENSORS = "adapter_model.safetensors"
MODULES = [f"transformer.h.{i}.mlp.c_fc" for i in range(2)]


@pytest.fixture
def home(tmp_path):
    rng = np.random.default_rng(0)
    write_gpt2(tmp_path / "base", GPT2)
    pairs = {name: (rng.standard_normal((R, D), "float32"), rng.standard_normal((F, R), "float32")) for name in MODULES}
    write_peft(tmp_path / "ad", pairs, r=R, alpha=4)
    return tmp_path


def verify(capsys, home):
    """The status, the lines, and what --json has."""
    argv = ["verify", "--base", str(home / "base"), "--adapter", str(home / "ad")]
    capsys.readouterr()
    status = cli.main(argv)
    out, err = capsys.readouterr()
    if status == 2:
        return status, err.splitlines(), None
    assert cli.main([*argv, "--json"]) == status
    return status, out.splitlines(), json.loads(capsys.readouterr().out)


def test_a_trained_adapter_of_this_base_has_nothing_to_remark(home, capsys):
    edit_json(home / "ad" / "adapter_config.json", base_model_name_or_path="someone/base")
    status, lines, result = verify(capsys, home)
    assert status == 0
    assert "trained: yes" in lines
    assert result["zero"] == []
    assert not any("names its base" in line for line in lines)


def test_modules_whose_b_is_zero_are_named_where_some_are(home, capsys):
    edit_tensors(home / "ad" / TENSORS, lambda t: t[f"base_model.model.{MODULES[1]}.lora_B.weight"].fill(0))
    status, lines, result = verify(capsys, home)
    assert status == 0
    assert f"trained: yes, but B is zero in 1 modules: {MODULES[1]}" in lines
    assert result["zero"] == [MODULES[1]]


@pytest.mark.parametrize(("name", "is_remarked"), [("someone/another", True), ("someone/this-one", False)])
def test_another_base_s_name_is_a_remark_and_no_failure(home, capsys, name, is_remarked):
    """This base's name is its folder's, or what its config.json says."""
    edit_json(home / "base" / "config.json", _name_or_path="else/this-one")
    edit_json(home / "ad" / "adapter_config.json", base_model_name_or_path=name)
    status, lines, _ = verify(capsys, home)
    assert status == 0
    assert (
        any(f"the adapter names its base {name}; this one is {home / 'base'}" in line for line in lines) == is_remarked
    )


def test_a_file_with_no_tensors_is_an_error_that_says_so(home, capsys):
    save_file({}, home / "ad" / TENSORS)
    status, lines, _ = verify(capsys, home)
    assert status == 2
    assert len(lines) == 1
    assert TENSORS in lines[0]
    assert "no tensors" in lines[0] or "expected" in lines[0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_named(home, capsys, value):
    key = f"base_model.model.{MODULES[0]}.lora_A.weight"
    edit_tensors(home / "ad" / TENSORS, lambda t: t[key].__setitem__((0, 0), value))
    status, lines, _ = verify(capsys, home)
    assert status == 2
    assert len(lines) == 1
    assert key in lines[0]
    assert "NaN" in lines[0]


def test_the_effect_is_left_out_where_the_architecture_is_not_run(home, capsys):
    edit_json(home / "base" / "config.json", model_type="gpt_of_someone")
    status, lines, result = verify(capsys, home)
    assert status == 0
    assert "effect of the adapter: left out: this architecture is not run here" in lines
    assert result["effect"] == {}
