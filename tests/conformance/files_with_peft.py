"""transformers and PEFT beside the adapters' files: opens each, and writes its updates, or the words of its refusal.

python files_with_peft.py VECTORS RESULTS
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT says about itself at import
    import peft


def opened(base, adapter):
    """A base in float64 with its adapter."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing keys and of fan_in_fan_out: no refusal
        return peft.PeftModel.from_pretrained(model, str(adapter))


def updates(model, replaced):
    """dW of each adapted module; DoRA's, and what has replaced the base's, by the merged model."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            if module.use_dora["default"]:
                replaced = [*replaced, f"W/{name}.weight"]
            else:
                found[f"dW/{name}.weight"] = module.get_delta_weight("default")
            if module.lora_bias["default"]:
                found[f"dW/{name}.bias"] = module.lora_B["default"].bias * module.scaling["default"]
    merged = model.merge_and_unload().state_dict()
    return found | {name: merged[name.removeprefix("W/")] for name in replaced}


def refusal(base, adapter):
    """The words with which an adapter is refused before its logits are there, else None."""
    try:
        opened(base, adapter)(torch.arange(4)[None])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def entries(folder):
    """The cases of a folder, each with its base's folder and its own."""
    for case in json.loads((folder / "manifest.json").read_text())["cases"]:
        yield case, folder / case["base"], folder / case["name"]


def main(vectors, results):
    """Writes files.safetensors and refusals.json."""
    results.mkdir(parents=True, exist_ok=True)
    found = {}
    for case, base, adapter in entries(vectors / "files"):
        replaced = [name for name in case["expected"] if name.startswith("W/")]
        for name, value in updates(opened(base, adapter), replaced).items():
            found[f"{case['name']}/{name}"] = value.detach().clone().contiguous()
    save_file(found, results / "files.safetensors")
    said = {case["name"]: refusal(base, adapter) for case, base, adapter in entries(vectors / "refusals")}
    (results / "refusals.json").write_text(json.dumps(said, indent=1))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
