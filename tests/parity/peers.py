"""One model in two libraries: transformers and PEFT in float64 beside lora_np, with the same weights.

`make` builds a random model in transformers and maps its weights; `adapt` puts a random adapter into both; `compare`
runs a batch through both and compares logits, loss and every gradient.
"""

import types
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import weights

import lora_np as ln
from lora_np.backend import xp
from lora_np.ops import dropout_mask

REASON = "a peer of the parity tests: the extra peers"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the peers say about themselves at import
    torch = pytest.importorskip("torch", reason=REASON)
    transformers = pytest.importorskip("transformers", reason=REASON)
    peft = pytest.importorskip("peft", reason=REASON)
    from bench import peft_side

torch.set_num_threads(1)  # the models are small: more threads would only wait for each other

FILTERS = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "fan_in_fan_out is set to",  # PEFT on GPT-2's Conv1D; it sees to that itself
        "Model has `tie_word_embeddings=True`",  # PEFT on a look-up or head that are tied: we adapt one of the two
        "`is_gradient_checkpointing` is deprecated",  # PEFT asks transformers so
    )
]
TOLERANCE = 1e-10  # relative to the largest element of the array compared
PAD = 1  # the padding token; no real token is it
IGNORED = -100

SMALL: dict[str, Any] = {
    "vocab_size": 31, "n_positions": 40, "n_layer": 2, "n_head": 3, "d_model": 24, "d_ff": 20, "n_labels": 4,
}  # fmt: skip
GPT2 = replace(ln.PRESETS["gpt2"], **SMALL)
BERT = replace(ln.PRESETS["bert-base"], **SMALL)
ROBERTA = replace(ln.PRESETS["roberta-base"], **SMALL, head="classify")
LLAMA = replace(ln.PRESETS["smollm2-135m"], **SMALL, n_kv_head=1)


@dataclass(frozen=True)
class Pair:
    """A model of transformers, in float64 and evaluation mode, and ours with the same weights."""

    family: str
    module: Any  # torch.nn.Module; wrapped by PEFT where there is an adapter
    model: ln.Model
    adapter: ln.Adapter | None = None


@dataclass(frozen=True)
class Batch:
    """What goes into both. targets[n,t] is what logits[n,t] is scored against; padding carries none."""

    tokens: np.ndarray  # (N,T)
    targets: np.ndarray  # (N,T), or (N,) for a classifier
    mask: np.ndarray | None  # (N,T)
    token_types: np.ndarray | None  # (N,T)

    @property
    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of lora_np's functions."""
        return {"mask": self.mask, "token_types": self.token_types}


# --- One model twice -------------------------------------------------------------------------------------------------


def _rms_norm(self: Any, x: Any) -> Any:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def _rotary(self: Any, x: Any, position_ids: Any) -> Any:
    K = self.config.hidden_size // self.config.num_attention_heads
    theta = self.config.rope_parameters["rope_theta"]
    angles = position_ids[..., None] / theta ** (torch.arange(0, K, 2, dtype=x.dtype) / K)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _in_float64(module: Any) -> Any:
    """The module in float64 throughout.

    Llama's RMS norm and rotary angles are float32 in any model, so these two forwards are replaced. So is the softmax
    of its eager attention, which is why a Llama runs with "sdpa" here.
    """
    module = module.double().eval()
    for part in module.modules():
        forward = {"LlamaRMSNorm": _rms_norm, "LlamaRotaryEmbedding": _rotary}.get(type(part).__name__)
        if forward is not None:
            part.forward = types.MethodType(forward, part)
    return module


def _shake(module: Any, seed: int) -> None:
    """Adds N(0, 0.2^2) to every trainable parameter: no zero B, no unit norm, no even attention is left."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def trained(pair: Pair) -> dict[str, Any]:
    """Their trainable parameters by their names."""
    return {n: p for n, p in pair.module.named_parameters() if p.requires_grad and "original_module" not in n}


def parameters(pair: Pair) -> dict[str, np.ndarray]:
    """Copies of their trainable parameters under our names."""
    return weights.flat(pair.family, {n: p.detach().numpy().copy() for n, p in trained(pair).items()})


def saved_by_peft(pair: Pair, settings: dict[str, Any], folder: Any) -> Pair:
    """The pair with an adapter of PEFT's own making, no parameter of it zero, which PEFT has saved in the folder."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **settings})
    pair = replace(pair, module=peft.get_peft_model(pair.module, config).eval())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trained(pair).values():
            p += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    pair.module.save_pretrained(str(folder))
    return pair


def make(family: str, config: ln.Config, *, seed: int) -> Pair:
    """A random model of this family and size, in transformers and here."""
    torch.manual_seed(seed)
    model_class = getattr(transformers, peft_side.CLASSES[family, config.head])
    their_config = peft_side.their_config(
        family, config, pad=PAD, attn_implementation="sdpa" if family == "llama" else "eager"
    )
    extra = {"add_pooling_layer": False} if config.head == "none" else {}
    module = _in_float64(model_class(their_config, **extra))
    _shake(module, seed)
    state = {n: p.detach().numpy().copy() for n, p in module.named_parameters()}
    return Pair(family, module, ln.Model(config, weights.flat(family, state)))


def make_batch(config: ln.Config, *, seed: int, N: int = 4, T: int = 7, padding: str | None = None) -> Batch:
    """Random texts; with padding ("right" or "left") of different lengths, the first full. One target in 5 is off."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(PAD + 1, config.vocab_size, (N, T))
    mask = None
    if padding is not None:
        lengths = np.append(T, rng.integers(1, T, N - 1))
        mask = np.arange(T) < lengths[:, None]
        mask = mask[:, ::-1] if padding == "left" else mask
        tokens = np.where(mask, tokens, PAD)
    if config.head == "classify":
        targets = rng.integers(0, config.head_size, N)
    else:
        targets = rng.integers(0, max(config.head_size, 1), (N, T))
        targets[rng.random((N, T)) < 0.2] = IGNORED
        targets[0, 0] = 0  # one counts at least
        if mask is not None:
            targets[~mask] = IGNORED
    types = rng.integers(0, config.n_types, (N, T)) if config.n_types > 1 else None
    return Batch(tokens, targets, mask, types)


# --- One adapter twice -----------------------------------------------------------------------------------------------


def peft_config(pair: Pair, lora: ln.LoRAConfig) -> Any:
    """PEFT's configuration of our `lora`."""
    layers = r"\d+" if lora.layers is None else f"(?:{'|'.join(map(str, lora.layers))})"
    targets = "|".join(weights.pattern(pair.family, target, layers) for target in lora.targets)
    heads = [name for name in ("lm_head", "score", "classifier") if hasattr(pair.module, name)]
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=rf"(?:.*\.)?(?:{targets})",
        lora_dropout=lora.dropout,
        bias=lora.bias,
        modules_to_save=heads if lora.train_head else None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        rank_pattern={weights.pattern(pair.family, name): r for name, r in lora.rank_pattern.items()},
        alpha_pattern={weights.pattern(pair.family, name): a for name, a in lora.alpha_pattern.items()},
    )


def adapt(pair: Pair, lora: ln.LoRAConfig, *, seed: int, name: str = "default", start: bool = False) -> Pair:
    """The pair with the same adapter in both; pair.module is changed. With another name it joins those there, active.

    start: as PEFT starts it, with B = 0; else random.
    """
    torch.manual_seed(seed)
    if isinstance(pair.module, peft.PeftModel):
        pair.module.add_adapter(name, peft_config(pair, lora))
        pair.module.set_adapter(name)
        module = pair.module
    else:
        module = peft.get_peft_model(pair.module, peft_config(pair, lora), adapter_name=name)
    pair = replace(pair, module=module.eval())
    if not start:
        _shake(pair.module, seed)
    return replace(pair, adapter=ln.Adapter(lora, parameters(pair)))


class Masked(torch.nn.Module):
    """Stands where PEFT has its dropout, with a mask given from outside."""

    def __init__(self, mask: np.ndarray):
        super().__init__()
        self.mask = torch.tensor(mask)

    def forward(self, x: Any) -> Any:
        return x * self.mask


def install_dropout(pair: Pair, batch: Batch, seed: int) -> None:
    """Puts our dropout masks of this seed into every adapted module of the peer."""
    assert pair.adapter is not None
    N, T = batch.tokens.shape
    for theirs, layer in pair.module.named_modules():
        if not isinstance(layer, peft.tuners.lora.LoraLayer) or "default" not in layer.lora_A:
            continue
        name = weights.our_name(pair.family, weights.bare(theirs))
        D, p = pair.adapter.params[f"{name}.A"].shape[1], pair.adapter.config.dropout
        n, t = np.divmod(np.arange(N * T), T)
        mask = dropout_mask(xp.asarray(n), xp.asarray(t), D, p, seed=seed, stream=name, dtype="float64")
        layer.training = pair.adapter.config.dora  # DoRA asks the layer itself whether there is dropout
        layer.lora_dropout["default"] = Masked(ln.asnumpy(mask).reshape(N, T, D))


# --- One batch through both ------------------------------------------------------------------------------------------


def their_inputs(pair: Pair, batch: Batch) -> dict[str, Any]:
    """The keyword arguments of their forward.

    Positions are given only where they do not follow from the defaults: with padding on the left. RoBERTa counts them
    itself, from the padding tokens.
    """
    inputs = {"input_ids": torch.tensor(batch.tokens)}
    if batch.mask is not None:
        inputs["attention_mask"] = torch.tensor(batch.mask.astype(np.int64))
        if not batch.mask[:, 0].all() and pair.family != "roberta":
            inputs["position_ids"] = torch.clamp(inputs["attention_mask"].cumsum(1) - 1, min=0)
    if batch.token_types is not None:
        inputs["token_type_ids"] = torch.tensor(batch.token_types)
    return inputs


def their_logits(pair: Pair, batch: Batch, **options: Any) -> Any:
    """Their logits, or without a head their last states, with the graph behind them."""
    output = pair.module(**their_inputs(pair, batch), **options)
    return output.last_hidden_state if pair.model.config.head == "none" else output.logits


def their_loss(pair: Pair, batch: Batch) -> Any:
    """The mean cross-entropy over counted targets. Their own loss of a language model would be float32."""
    logits = their_logits(pair, batch)
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), torch.tensor(batch.targets).flatten())


def real(pair: Pair, batch: Batch, logits: Any) -> np.ndarray:
    """The logits that mean something: not those of padding."""
    logits = logits.detach().numpy() if isinstance(logits, torch.Tensor) else ln.asnumpy(logits)
    return logits if batch.mask is None or pair.model.config.head == "classify" else logits[batch.mask]


def assert_close(ours: dict[str, Any], theirs: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> None:
    """The same names, shapes and dtypes, and each array within the tolerance of its own largest element.

    A key's bias moves no softmax: its gradient is zero but for rounding, and is measured by the largest of all.
    """
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    largest = max(abs(value).max() for value in theirs.values())
    wrong = {}
    for name, value in theirs.items():
        got = ln.asnumpy(ours[name])
        assert (got.shape, got.dtype) == (value.shape, value.dtype), name
        error, size = abs(got - value).max(), largest if name.endswith(".k.bias") else abs(value).max()
        if not error <= tolerance * size:
            wrong[name] = f"{error:.1e} of {size:.1e}"
    assert not wrong, f"errors above {tolerance}: {wrong}"


def compare_logits(pair: Pair, batch: Batch) -> None:
    """The logits of a batch at real tokens."""
    ours = ln.forward(pair.model, batch.tokens, pair.adapter, **batch.inputs)
    with torch.no_grad():
        theirs = their_logits(pair, batch)
    assert_close({"logits": real(pair, batch, ours)}, {"logits": real(pair, batch, theirs)})


def compare_gradients(pair: Pair, batch: Batch, *, dropout_seed: int | None = None) -> None:
    """The loss, and its gradients by everything trained: the adapter, or without one every weight."""
    if dropout_seed is not None:
        install_dropout(pair, batch, dropout_seed)
    loss, grads = ln.loss_and_grads(
        pair.model, pair.adapter, batch.tokens, batch.targets, **batch.inputs, dropout_seed=dropout_seed,
        trainable="all" if pair.adapter is None else "adapter",
    )  # fmt: skip
    pair.module.zero_grad()
    theirs = their_loss(pair, batch)
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), rel=TOLERANCE)
    assert_close(grads, weights.flat(pair.family, {name: p.grad.numpy() for name, p in trained(pair).items()}))
