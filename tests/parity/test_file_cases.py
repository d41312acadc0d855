"""Adapters as files: PEFT's own updates are what is expected."""

import numpy as np
import peers  # skips this file where torch, transformers or peft is missing
import pytest
from peers import peft, torch, transformers
from safetensors.numpy import save_file

from lora_np.vectors.adapter_files import file_cases, write_file_cases
from lora_np.vectors.adapter_results import judge_files

pytestmark = [
    *peers.FILTERS,
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]


def adapted(folder, case):
    """The case's base in float64 with its adapter, in PEFT."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "bases" / case.base, dtype=torch.float64)
    return peft.PeftModel.from_pretrained(base, str(folder / case.name))


def updates(model, case):
    """dW of each adapted module, and what has replaced the base's."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            found[f"dW/{name}.weight"] = module.get_delta_weight("default")
            if module.lora_bias["default"]:
                found[f"dW/{name}.bias"] = module.lora_B["default"].bias * module.scaling["default"]
    merged = model.merge_and_unload().state_dict()
    found |= {f"W/{key}": merged[key] for key in case.replaced}
    return {name: np.ascontiguousarray(value.detach().numpy()) for name, value in found.items()}


@pytest.mark.proves("L1")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_updates_are_pefts(tmp_path):
    write_file_cases(tmp_path / "files")
    found = {}
    for case in file_cases():
        got = updates(adapted(tmp_path / "files", case), case)
        found |= {f"{case.name}/{name}": a for name, a in got.items()}
    save_file(found, tmp_path / "files.safetensors")
    verdict = judge_files(tmp_path / "files.safetensors")
    assert verdict.passed
    assert verdict.unread == []
