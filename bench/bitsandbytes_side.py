"""The other side of `large`: PyTorch + PEFT on bitsandbytes' NF4, the same numbers, a tensor at a time; float32."""

from __future__ import annotations

import os
from typing import Any

import bitsandbytes
import torch
import transformers
from bitsandbytes.functional import QuantState

from lora_np.backend import asnumpy
from lora_np.formats.models.huggingface import places
from lora_np.storage import DYNAMIC, LEVELS, NF4, OUTER

from .large import large_work, tensors
from .peft_side import adapted, family, step_of, their_config
from .timing import Cases


def step(shape: str, quick: bool) -> Cases:
    """A LoRA step with gradient checkpointing, as `large.ours` does it; what it gives is the loss."""
    torch.set_num_threads(os.cpu_count() or 1)
    w = large_work(shape, quick)
    net = adapted(held_net(w.config), w.lora, w.config).train()
    net.gradient_checkpointing_enable()
    net.enable_input_require_grads()  # or checkpointing gives the adapters below no gradient
    return step_of(net, w)


def held_net(config: Any) -> Any:
    """The model in transformers, its layers' matrices in NF4: it starts without memory, and nothing of them is wide."""
    with torch.device("meta"):
        net = transformers.LlamaForCausalLM(their_config(family(config), config, pad=0))
    net.model.rotary_emb = type(net.model.rotary_emb)(net.config)
    keys = {name: key for key, place in places(config, in_trunk=True).items() for name in place.parts}
    for name, value in tensors(config, "NF4"):
        path, _, last = keys[name].removesuffix(".weight").rpartition(".")
        parent = net.get_submodule(path)
        if isinstance(value, NF4):
            setattr(parent, last, linear_4bit(value))
        else:
            getattr(parent, last).weight = torch.nn.Parameter(torch.from_numpy(asnumpy(value)), requires_grad=False)
    net.tie_weights()
    net.is_loaded_in_4bit = True  # by which PEFT knows
    return net


def linear_4bit(W: NF4) -> Any:
    """bitsandbytes' linear of the same codes."""
    module = bitsandbytes.nn.Linear4bit(W.shape[1], W.shape[0], bias=False, quant_type="nf4", device="meta")

    def tensor(a: Any) -> Any:
        return torch.from_numpy(asnumpy(a).copy())

    outer = QuantState(absmax=tensor(W.outer), blocksize=OUTER, code=tensor(DYNAMIC), dtype=torch.float32)
    state = QuantState(
        absmax=tensor(W.absmax), shape=torch.Size(W.shape), code=tensor(LEVELS), blocksize=W.block, quant_type="nf4",
        dtype=torch.float32, offset=tensor(W.offset), state2=outer,
    )  # fmt: skip
    module.weight = bitsandbytes.nn.Params4bit(
        tensor(W.codes)[:, None], quant_state=state, quant_type="nf4", bnb_quantized=True, module=module
    )
    module.quant_state = state
    return module
