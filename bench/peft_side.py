"""The other side of the comparisons: PyTorch + PEFT, with the settings that both share."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lora_np as ln
from lora_np.backend import backend_name
from lora_np.formats.models.huggingface import places
from lora_np.optim import warmup_cosine

from .device import HOST
from .load import peak_and_kept
from .models import Work, work
from .timing import Cases

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what they say about themselves at import
    import peft
    import transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks transformers so

DEVICE = "cuda" if backend_name == "cupy" else "cpu"
if DEVICE == "cuda" and not torch.cuda.is_available():
    raise ImportError(f"PyTorch {torch.__version__} finds no GPU: install its build for your version of CUDA")
CLASSES = {
    ("gpt2", "lm"): "GPT2LMHeadModel",
    ("gpt2", "classify"): "GPT2ForSequenceClassification",
    ("gpt2", "tag"): "GPT2ForTokenClassification",
    ("bert", "none"): "BertModel",
    ("bert", "classify"): "BertForSequenceClassification",
    ("bert", "tag"): "BertForTokenClassification",
    ("roberta", "classify"): "RobertaForSequenceClassification",
    ("llama", "lm"): "LlamaForCausalLM",
    ("llama", "classify"): "LlamaForSequenceClassification",
}
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu_gated": "silu"}
# GPT-2's fused c_attn with r = 8 trains as many parameters as q and v with r = 8 each, and costs as many operations.
TARGETS = {"gpt2": ["c_attn"], "bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}


# --- Our models in transformers --------------------------------------------------------------------------------------


def family(config: ln.Config) -> str:
    """The family that our Config is a setting of."""
    if config.positions == "rotary":
        return "llama"
    return "gpt2" if config.norm_first else "roberta" if config.position_offset else "bert"


def their_config(family: str, c: ln.Config, *, pad: int, **options: Any) -> Any:
    """Their configuration of our `c`, which has no dropout. pad: the padding token; options: others of theirs."""
    common = {
        "vocab_size": c.vocab_size, "pad_token_id": pad, "bos_token_id": None, "eos_token_id": None,
        "tie_word_embeddings": c.tie_head, **({} if c.n_labels is None else {"num_labels": c.n_labels}), **options,
    }  # fmt: skip
    if family == "gpt2":
        return transformers.GPT2Config(
            n_positions=c.n_positions, n_embd=c.d_model, n_layer=c.n_layer, n_head=c.n_head, n_inner=c.d_ff,
            layer_norm_epsilon=c.eps, activation_function=ACTIVATIONS[c.activation], resid_pdrop=0, embd_pdrop=0,
            attn_pdrop=0, **common,
        )  # fmt: skip
    common |= {
        "hidden_size": c.d_model, "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
        "intermediate_size": c.d_ff, "max_position_embeddings": c.n_positions, "hidden_act": ACTIVATIONS[c.activation],
    }  # fmt: skip
    if family == "llama":
        return transformers.LlamaConfig(
            num_key_value_heads=c.kv_heads, rms_norm_eps=c.eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, **common,
        )  # fmt: skip
    config_class = transformers.BertConfig if family == "bert" else transformers.RobertaConfig
    return config_class(
        type_vocab_size=c.n_types, layer_norm_eps=c.eps, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **common
    )


def twin(w: Work) -> Any:
    """The same model in transformers, with its weights, of which one at a time is made: memory is measured here."""
    name = family(w.config)
    net = getattr(transformers, CLASSES[name, w.config.head])(their_config(name, w.config, pad=0))
    state = net.state_dict()
    for key, place in places(w.config, in_trunk=True).items():
        state[key].copy_(torch.from_numpy(w.stored(place)))
    return net.to(DEVICE)


def adapted(net: Any, lora: ln.LoRAConfig, config: ln.Config) -> Any:
    """The model with LoRA on query and value, from PEFT's own start; a classifier's head is trained whole."""
    name = family(config)
    task = {"classify": "SEQ_CLS", "lm": "CAUSAL_LM"}[config.head]
    settings = peft.LoraConfig(
        task_type=task, r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=TARGETS[name],
        fan_in_fan_out=name == "gpt2",
    )  # fmt: skip
    return peft.get_peft_model(net, settings)


def settle(*, tf32: bool = False) -> None:
    """All cores; float32 products on a GPU as they are, or from factors rounded to TF32, as many people set it."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def step(name: str, *, compiled: bool = False, optimizer: bool = False, tf32: bool = False, **sizes: Any) -> Cases:
    """A LoRA step: the loss and its gradients by A and B; compiled: by torch.compile; optimizer: and AdamW's step."""
    settle(tf32=tf32)
    w = work(name, **sizes)
    net = adapted(twin(w), w.lora, w.config).train()
    return step_of(net, w, compiled=compiled, optimizer=optimizer)


def step_of(net: Any, w: Work, *, compiled: bool = False, optimizer: bool = False) -> Cases:
    """The loss of a batch and its gradients by what is trained; compiled, optimizer: as for `step`."""
    tokens, targets = (torch.tensor(a, device=DEVICE) for a in w.batch())
    trained = [p for p in net.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-4) if optimizer else None

    def loss() -> Any:
        options = {"use_cache": False} if w.config.causal else {}
        logits = net(input_ids=tokens, **options).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())

    loss_of_batch = _compiled(loss) if compiled else loss

    def run() -> float:
        found = loss_of_batch()
        for p in trained:
            p.grad = None
        found.backward()
        if adamw is not None:
            adamw.step()
        return found.item()

    return {"step": run}


def _compiled(loss: Callable[[], Any]) -> Callable[[], Any]:
    """torch.compile's version, compiled; an ImportError where it cannot: it needs a C++ compiler."""
    compiled = torch.compile(loss)
    try:
        compiled()
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ImportError(f"torch.compile: {str(error).splitlines()[0]}") from error
    return compiled


def decode(name: str, n: int, *, prompt: int, tf32: bool = False, **sizes: Any) -> Cases:
    """Greedy decoding of n tokens after a prompt, with their cache."""
    settle(tf32=tf32)
    w = work(name, **sizes)
    net = twin(w).eval()
    tokens = torch.tensor(w.batch()[0][:1, :prompt], device=DEVICE)
    mask = torch.ones_like(tokens)

    @torch.no_grad()
    def run() -> list[int]:
        ids = net.generate(
            tokens, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0
        )
        return ids[0, prompt:].tolist()

    return {"greedy": run}


def load(path: str, dtype: str) -> Cases:
    """`bench.load:ours`, by from_pretrained."""
    folder, file = (Path(path).parent, Path(path).name) if path.endswith(".gguf") else (Path(path), None)
    _ = transformers.GPT2LMHeadModel, transformers.LlamaForCausalLM  # imports them
    before = HOST.peak()

    def run() -> list[int]:
        net = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=getattr(torch, dtype))
        for p in net.parameters():
            p.sum()  # a safetensors file is mapped: its pages come when they are read
        return peak_and_kept(sum(p.nbytes for p in net.parameters()), before)

    return {"load": run}


def switch(name: str, **sizes: Any) -> Cases:
    """From one adapter, merged, to the other, and back."""
    settle()
    net, turns = with_two_adapters(work(name, **sizes)), cycle("10")
    return {"switch": lambda: go_over(net, next(turns))}


def with_two_adapters(w: Work) -> Any:
    """The model with two adapters of ours, "0" and "1", of which the first is merged."""
    model, net = w.model(), twin(w)
    with tempfile.TemporaryDirectory() as folder:
        for seed in (0, 1):
            ln.save_adapter(Path(folder) / str(seed), w.trained_adapter(model, seed), model)
        net = peft.PeftModel.from_pretrained(net, Path(folder) / "0", adapter_name="0")
        net.load_adapter(Path(folder) / "1", adapter_name="1")
    net.base_model.merge_adapter()
    return net


def go_over(net: Any, name: str) -> None:
    """A merged model to another of its adapters: unmerge, set_adapter, merge."""
    net.base_model.unmerge_adapter()
    net.set_adapter(name)
    net.base_model.merge_adapter()


def layer(M: int, D: int, r: int) -> Cases:
    """One adapted matrix (D,D), forward and backward, for M rows."""
    settle()
    net = torch.nn.Sequential(torch.nn.Linear(D, D))
    net = peft.get_peft_model(net, peft.LoraConfig(r=r, lora_alpha=16, target_modules=["0"])).to(DEVICE)
    return {"layer": forward_and_backward(net.base_model.model[0], M, D)}


def loralib_layer(M: int, D: int, r: int) -> Cases:
    """loralib's, likewise."""
    import loralib

    settle()
    module = loralib.Linear(D, D, r=r, lora_alpha=16).to(DEVICE)
    loralib.mark_only_lora_as_trainable(module)
    return {"layer": forward_and_backward(module, M, D)}


def forward_and_backward(module: torch.nn.Module, M: int, D: int) -> Callable[[], Any]:
    """h, and its gradients by x and by what is trained."""
    x = torch.randn(M, D, device=DEVICE, requires_grad=True)
    dh = torch.randn(M, D, device=DEVICE)
    trained = [x, *(p for p in module.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(module(x), trained, dh)


# --- Real models -----------------------------------------------------------------------------------------------------


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
