"""One layer, the optimizer, its schedule, and 20 steps of training against PEFT, loralib, PyTorch and transformers."""

import math

import numpy as np
import peers
import pytest
from peers import GPT2, peft, torch, transformers

import lora_np as ln
from lora_np.backend import xp
from lora_np.ops import dropout_mask
from lora_np.optim import clip, warmup_cosine

pytestmark = peers.FILTERS
STEPS = 20


# --- One layer -------------------------------------------------------------------------------------------------------


def peft_layer(n_in, n_out, r, alpha, mask, bias):
    """PEFT's adapted linear, with our dropout mask, and its A and B."""
    net = torch.nn.Sequential(torch.nn.Linear(n_in, n_out, bias=bias)).double()
    net = peft.get_peft_model(net, peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"]))
    layer = net.base_model.model[0]
    if mask is not None:
        layer.lora_dropout["default"] = peers.Masked(mask)
    return layer, layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight


def loralib_layer(n_in, n_out, r, alpha, mask, bias):
    """loralib's, likewise."""
    loralib = pytest.importorskip("loralib", reason="a peer of the parity tests: pip install loralib")
    layer = loralib.Linear(n_in, n_out, r=r, lora_alpha=alpha, bias=bias).double()
    if mask is not None:
        layer.lora_dropout = peers.Masked(mask)
    return layer, layer, layer.lora_A, layer.lora_B


@pytest.mark.proves("L1", "L2", "L4", "T12")
@pytest.mark.parametrize("peer", [peft_layer, loralib_layer])
@pytest.mark.parametrize(("n_in", "n_out", "r"), [(7, 5, 1), (16, 48, 8), (12, 12, 12)])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_lora_linear(peer, n_in, n_out, r, p, bias):
    """h, dx, dA and dB of one adapted matrix."""
    torch.manual_seed(n_in)
    mask = None
    if p:
        n, t = xp.arange(12) // 4, xp.arange(12) % 4
        mask = dropout_mask(n, t, n_in, p, seed=1, stream="x", dtype="float64").reshape(3, 4, n_in)
    layer, base, A, B = peer(n_in, n_out, r, 5, None if mask is None else ln.asnumpy(mask), bias)
    torch.nn.init.normal_(B)
    x = torch.randn(3, 4, n_in, dtype=torch.float64, requires_grad=True)
    dh = torch.randn(3, 4, n_out, dtype=torch.float64)
    their_h = layer(x)
    their_h.backward(dh)

    def array(t):
        return None if t is None else xp.asarray(t.detach().numpy().copy())

    h, saved = ln.lora_linear(
        array(x), array(base.weight), array(base.bias), array(A), array(B), 5 / r, dropout_mask=mask
    )
    dx, dA, dB = ln.lora_linear_backward(array(dh), saved)
    theirs = {"h": their_h, "dx": x.grad, "dA": A.grad, "dB": B.grad}
    peers.assert_close({"h": h, "dx": dx, "dA": dA, "dB": dB}, {name: t.detach().numpy() for name, t in theirs.items()})


# --- The optimizer ---------------------------------------------------------------------------------------------------

SHAPES = {"a.A": (3, 8), "a.B": (8, 3), "bias": (8,)}


def random_arrays(seed):
    """NumPy arrays of SHAPES; of gradients some are exactly zero, as dA is at the start."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) * (rng.random(shape) < 0.8) for name, shape in SHAPES.items()}


def on_device(arrays):
    return {name: xp.asarray(a) for name, a in arrays.items()}


def their_parameters(arrays):
    return {name: torch.nn.Parameter(torch.tensor(a)) for name, a in arrays.items()}


@pytest.mark.proves("O1")
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-3},
        {"lr": 0.02, "weight_decay": 0.1},
        {"lr": 0.3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.01},
        {"lr": 1e-2, "betas": (0.0, 0.5)},
    ],
)
def test_adamw(options):
    """20 steps end within a few units in the last place of the largest parameter."""
    params, state = on_device(random_arrays(0)), None
    theirs = their_parameters(random_arrays(0))
    optimizer = torch.optim.AdamW(theirs.values(), **{"weight_decay": 0.0, **options})
    for step in range(1, STEPS + 1):
        grads = random_arrays(step)
        params, state = ln.adamw(params, on_device(grads), state, **options)
        for name, p in theirs.items():
            p.grad = torch.tensor(grads[name])
        optimizer.step()
    peers.assert_close(params, {name: p.detach().numpy() for name, p in theirs.items()}, tolerance=1e-15)


@pytest.mark.proves("O3")
@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e3])
def test_clip(max_norm):
    """The norm is theirs. Where it is above max_norm they divide by norm + 1e-6, so theirs is smaller by that much."""
    grads = random_arrays(1)
    clipped, norm = clip(on_device(grads), max_norm)
    theirs = their_parameters(grads)
    for name, p in theirs.items():
        p.grad = torch.tensor(grads[name])
    their_norm = torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm).item()
    assert norm.item() == pytest.approx(their_norm, rel=1e-15)
    shrunk = their_norm / (their_norm + 1e-6) if their_norm > max_norm else 1.0
    peers.assert_close(
        {name: g * shrunk for name, g in clipped.items()},
        {name: p.grad.numpy() for name, p in theirs.items()},
        tolerance=1e-15,
    )


@pytest.mark.proves("O2")
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (1, 10), (4, 20), (10, 10)])
def test_warmup_cosine(warmup, total):
    """After the warm-up the same factor at the same step, counted from 0.

    In the warm-up ours is one step ahead: their first step has rate 0 and changes nothing, our first has 1 / warmup.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, total)
    theirs = []
    for _ in range(total + 1):
        theirs += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    ours = [warmup_cosine(step, warmup=warmup, total=total) for step in range(total)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:-1], abs=1e-15)
    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1], abs=1e-15)


# --- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.proves("L3", "L4", "O1", "O2")
@pytest.mark.parametrize(
    "config",
    [
        ln.LoRAConfig(r=4, targets=("qkv",)),
        ln.LoRAConfig(r=2, targets=("qkv", "o", "up", "down"), dropout=0.1, bias="lora_only"),
    ],
    ids=["qkv", "all"],
)
def test_training(config):
    """20 steps of LoRA on a GPT-2 from PEFT's own start: every loss within 1e-9, and the adapter at the end."""
    pair = peers.adapt(peers.make("gpt2", GPT2, seed=1), config, seed=2, start=True)
    trained = peers.trained(pair)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.01)
    params, state = pair.adapter.params, None
    losses, theirs = [], []
    for step in range(STEPS):
        batch = peers.make_batch(GPT2, seed=step % 3, padding="right")
        rate = 1e-2 * warmup_cosine(step, warmup=3, total=STEPS)

        loss, grads = ln.loss_and_grads(
            pair.model, ln.Adapter(config, params), batch.tokens, batch.targets, **batch.inputs, dropout_seed=step
        )
        params, state = ln.adamw(params, grads, state, lr=rate, weight_decay=0.01)
        losses.append(loss)

        if config.dropout:
            peers.install_dropout(pair, batch, step)
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = rate
        their_loss = peers.their_loss(pair, batch)
        their_loss.backward()
        optimizer.step()
        theirs.append(their_loss.item())
    assert losses == pytest.approx(theirs, rel=1e-9)
    assert min(losses[-3:]) < 0.8 * max(losses[:3])
    assert all(map(math.isfinite, losses))
    peers.assert_close(params, peers.parameters(pair), tolerance=1e-8)
