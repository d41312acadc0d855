"""The training loop: the bits of a resumed run, what is trained and what is not, and failures."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_np as ln
from lora_np.backend import asnumpy
from lora_np.optim import learning_rates
from lora_np.training import loop as training
from lora_np.training.checkpoint import load_checkpoint, save_checkpoint
from lora_np.training.loop import Settings, TrainingError, evaluate, placed, start, train
from lora_np.vectors.derivatives import example_batch, perturbed

CONFIG = ln.Config(11, 8, n_layer=2, n_head=2, d_model=8, d_ff=12)


def make(dtype="float32", **lora):
    model = ln.Model(CONFIG, ln.init_weights(CONFIG, seed=0, dtype=dtype))
    return model, ln.init_adapter(model, ln.LoRAConfig(r=2, **lora), seed=1)


def batches(step, N=5, T=6):
    rng = np.random.default_rng([7, step])
    tokens = rng.integers(0, 11, (N, T + 1))
    targets = tokens[:, 1:].copy()
    targets[rng.random(targets.shape) < 0.2] = -100
    return {"tokens": tokens[:, :-1], "targets": targets}


def same(one, other):
    return one.keys() == other.keys() and all((asnumpy(one[n]) == asnumpy(other[n])).all() for n in one)


@settings(max_examples=min(8, settings().max_examples))
@given(
    k=st.integers(0, 6),
    shards=st.sampled_from([None, 1, 3, 9]),
    dropout=st.sampled_from([0.0, 0.3]),
    full=st.booleans(),
)
@pytest.mark.proves("O1", "O2", "O4", "T12")
def test_a_resumed_run_ends_in_the_same_bits(tmp_path_factory, k, shards, dropout, full):
    """n steps = k steps, a checkpoint, and n - k steps from it: identical parameters."""
    model, adapter = make(dropout=dropout)
    adapter = None if full else adapter
    plan = Settings(steps=6, lr=1e-2, warmup=2, weight_decay=0.1, shards=shards, seed=3)
    path = tmp_path_factory.mktemp("run") / "checkpoint.npz"
    states = {0: start(model, adapter)}
    straight = train(model, adapter, batches, plan, report=lambda r: states.update({r.step: r.state}))
    save_checkpoint(path, states[k], {"note": "kept"})
    state, about = load_checkpoint(path, states[0].params)
    assert about == {"note": "kept"}
    assert state.step == k
    resumed = train(model, adapter, batches, plan, state=state)
    assert same(resumed.params, straight.params)
    assert not same(straight.params, states[0].params)


@pytest.mark.proves("L4", "O1")
def test_training_lowers_the_loss_and_leaves_the_base_as_it_was():
    model, adapter = make("float64")
    before = {name: asnumpy(w).tobytes() for name, w in model.weights.items()}
    one = batches(0)
    losses = []
    state = train(model, adapter, lambda _: one, Settings(steps=30, lr=3e-2), report=lambda r: losses.append(r.loss))
    assert losses[0] == pytest.approx(ln.loss(model, **one), rel=1e-12)
    assert (
        ln.loss(*placed(model, adapter, state)[:1], **one, adapter=placed(model, adapter, state)[1]) < losses[0] - 0.01
    )
    assert {name: asnumpy(w).tobytes() for name, w in model.weights.items()} == before
    assert state.params.keys() == adapter.params.keys()


@given(shards=st.integers(2, 7), dropout=st.sampled_from([0.0, 0.4]))
@settings(max_examples=min(8, settings().max_examples))
@pytest.mark.proves("O4", "T15")
def test_the_shards_of_a_step_are_the_whole_batch(shards, dropout):
    """Uneven parts, uncounted targets and dropout included: the mean is over the whole batch's counted targets."""
    model, adapter = make("float64", dropout=dropout)
    plan = Settings(steps=1, lr=1e-2, seed=5)
    seen = []
    for parts in (1, shards):
        train(model, adapter, batches, replace(plan, shards=parts), report=seen.append)
    assert seen[0].loss == pytest.approx(seen[1].loss, rel=1e-13)
    assert seen[0].norm == pytest.approx(seen[1].norm, rel=1e-11)


@pytest.mark.proves("T12")
def test_each_step_and_each_seed_has_dropout_masks_of_its_own():
    """The same batch and, for want of a rate, the same parameters: what differs between the losses is the masks."""
    model, adapter = make("float64", dropout=0.5)
    adapter = perturbed(adapter)
    losses = {}
    for seed in (0, 1):
        plan = Settings(steps=3, lr=1e-300, seed=seed)
        train(
            model,
            adapter,
            lambda _: batches(0),
            plan,
            report=lambda r, seed=seed: losses.update({(seed, r.step): r.loss}),
        )
    assert len(set(losses.values())) == 6


@pytest.mark.proves("O1")
def test_b_has_a_rate_of_its_own():
    names = [
        "layers.0.attn.q.A",
        "layers.0.attn.q.B",
        "head.weight",
        "head.bias",
        "pooler.weight",
        "layers.0.attn.q.bias",
    ]
    rates = learning_rates(dict.fromkeys(names), 0.5, b_ratio=16)
    assert list(rates.values()) == [0.5, 8.0, 0.5, 0.5, 0.5, 0.5]
    model, adapter = make("float64")
    # AdamW's first step from zero moves each element by its rate, whatever the gradient's size.
    first = [train(model, adapter, batches, Settings(steps=1, lr=1e-3, b_ratio=r)).params for r in (1.0, 4.0)]
    size = [np.abs(asnumpy(p["layers.0.attn.v.B"])).max() for p in first]
    assert size[1] / size[0] == pytest.approx(4.0, rel=1e-6)


@pytest.mark.proves("O2")
def test_the_rate_is_warmed_up_and_then_falls():
    model, adapter = make()
    rates = []
    train(model, adapter, batches, Settings(steps=6, lr=1.0, warmup=2, clip=1e-9), report=lambda r: rates.append(r.lr))
    expected = [0.5, 1.0, 1.0, 0.5 * (1 + np.cos(np.pi / 4)), 0.5, 0.5 * (1 + np.cos(3 * np.pi / 4))]
    assert rates == pytest.approx(expected)


@pytest.mark.proves("T15")
def test_evaluation_weighs_batches_by_their_counted_targets():
    model, adapter = make("float64")
    given_batches = [batches(0, N=2), batches(1, N=7)]
    counts = [int((b["targets"] != -100).sum()) for b in given_batches]
    losses = [ln.loss(model, **b, adapter=adapter) for b in given_batches]
    loss, _ = evaluate(model, adapter, given_batches)
    assert loss == pytest.approx(np.average(losses, weights=counts), rel=1e-13)
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate(model, adapter, [])


def test_a_base_that_is_not_finite_stops_training_at_its_first_step():
    model, adapter = make()
    weights = {name: asnumpy(w).copy() for name, w in model.weights.items()}
    weights["layers.1.mlp.up.weight"][0, 0] = np.nan
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan: before any update.*base's weights"):
        train(replace(model, weights=weights), adapter, batches, Settings(steps=3, lr=1e-2))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_divergence_stops_with_its_step_and_cause_and_the_last_good_state_is_kept(tmp_path):
    model, adapter = make()
    last = {}

    def keep(report):
        last["state"] = report.state
        save_checkpoint(tmp_path / "c.npz", report.state, {})

    with pytest.raises(TrainingError, match=r"step [2-9]: the .*learning rate, [0-9.]+e\+3\d"):
        train(model, adapter, batches, Settings(steps=50, lr=1e38, warmup=50), report=keep)
    state, _ = load_checkpoint(tmp_path / "c.npz", adapter.params)
    assert state.step == last["state"].step >= 1
    assert all(np.isfinite(asnumpy(p)).all() for p in state.params.values())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_update_that_overflows_is_never_reported_as_a_state():
    model, adapter = make()
    with pytest.raises(TrainingError, match=r"step 1: the update overflows: the learning rate, 1e\+38, is too high"):
        train(model, adapter, batches, Settings(steps=50, lr=1e38), report=lambda r: pytest.fail(str(r)))


@pytest.mark.proves("T15")
@pytest.mark.parametrize("head", ["lm", "tag", "classify"])
def test_accuracy_is_how_often_the_target_has_the_largest_logit(head):
    """Counted by hand over padded batches, targets left out left out; the loss beside it is `loss`'s."""
    fields = {} if head == "lm" else {"n_labels": 3}
    config = replace(CONFIG, head=head, **fields)
    weights = ln.init_weights(config, seed=0, dtype="float64")
    model = ln.Model(config, {name: 10 * w if w.ndim == 2 else w for name, w in weights.items()})
    given_batches = [example_batch(config, seed=seed, N=3 + seed, T=6) for seed in range(3)]
    hits = []
    for batch in given_batches:
        logits = asnumpy(ln.forward(model, batch["tokens"], mask=batch["mask"]))
        counted = batch["targets"] != -100
        hits += (logits.argmax(axis=-1) == batch["targets"])[counted].tolist()
    assert 0 < sum(hits) < len(hits)
    assert evaluate(model, None, given_batches).accuracy == sum(hits) / len(hits)


def test_settings_say_what_they_expect():
    for wrong in ({"steps": 0}, {"steps": 2.5}, {"warmup": 5}, {"shards": 0}, {"seed": -1}, {"lr": 0}, {"clip": 0}):
        with pytest.raises(ValueError, match=f"Settings.{next(iter(wrong))}: expected"):
            Settings(**{"steps": 4, "lr": 1e-3} | wrong)
    with pytest.raises(ValueError, match="weight_decay: expected 0 or more, got nan"):
        Settings(steps=1, lr=1, weight_decay=float("nan"))


def test_the_loop_prints_nothing(capsys):
    model, adapter = make()
    training.train(model, adapter, batches, Settings(steps=2, lr=1e-3))
    assert capsys.readouterr() == ("", "")
