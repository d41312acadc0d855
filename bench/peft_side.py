"""The other side of the comparisons: PyTorch + PEFT, with the settings that both share."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_np.optim import warmup_cosine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what they say about themselves at import
    import peft
    import transformers
transformers.logging.set_verbosity_error()


def classifier(folder: Path, n_labels: int, lora: Mapping[str, Any], seed: int) -> Any:
    """A BERT with a new classifier, adapted on query and value; the classifier is trained whole."""
    torch.manual_seed(seed)
    net = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=n_labels)
    return peft.get_peft_model(net, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], **lora))


def language_model(path: Path, adapter: Path) -> Any:
    """A Llama from a .gguf file, in float32, with the adapter in a folder to start from."""
    net = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(net, adapter, is_trainable=True)


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {"input_ids": torch.tensor(batch["tokens"]), "attention_mask": torch.tensor(batch["mask"]).long()}


def loss_of(net: Any, batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """The sum of the losses over the targets that count, and how many there are; a classifier's over texts."""
    logits = net(**_inputs(batch)).logits
    targets = torch.tensor(batch["targets"])
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return losses, (targets != -100).sum()


def train(net: Any, batch: Callable[[int], Mapping[str, Any]], *, steps: int, lr: float, clip: float) -> float:
    """AdamW over steps, with the schedule of O2. -> seconds."""
    net.train()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup_cosine(step, warmup=0, total=steps)
        losses, count = loss_of(net, batch(step))
        optimizer.zero_grad()
        (losses / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
    return time.perf_counter() - start


@torch.no_grad()
def evaluate(net: Any, batches: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """The mean loss over all targets that count, and the part of them whose logit is the largest."""
    net.eval()
    loss, hits, count = 0.0, 0, 0
    for batch in batches:
        logits = net(**_inputs(batch)).logits
        targets = torch.tensor(batch["targets"])
        counted = targets != -100
        logits, targets = logits[counted], targets[counted]
        loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        hits += int((logits.argmax(-1) == targets).sum())
        count += len(targets)
    return loss / count, hits / count


@torch.no_grad()
def generate(net: Any, prompt: list[int], n: int, eos: int | None) -> list[int]:
    """n greedy tokens after a prompt, or up to the end of the text."""
    net.eval()
    ids = net.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False, eos_token_id=eos, pad_token_id=eos)
    return np.asarray(ids[0, len(prompt) :]).tolist()
