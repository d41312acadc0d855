"""The other sides of the benchmarks do the same work: the same weights, so the same loss and the same tokens."""

from dataclasses import replace

import numpy as np
import peers
import pytest
from peers import torch

import lora_np as ln
from bench import decode, held, step
from bench.models import WORKS, work

peft_side = peers.peft_side
pytestmark = peers.FILTERS


@pytest.fixture(autouse=True)
def threads():
    """The benchmarks take all cores; the other tests take one."""
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("optimizer", [False, True])
def test_a_step_has_the_same_loss(name, optimizer):
    """Both start from B = 0; with AdamW the loss of the first step is the one before it."""
    theirs = peft_side.step(name, quick=True, optimizer=optimizer)["step"]()
    ours = step.ours(name, full=False, quick=True)[step.LORA]()
    assert theirs == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize("name", WORKS)
def test_lora_trains_as_many_parameters(name):
    """GPT-2's c_attn counts as q and v; a classifier's head is trained on both sides."""
    w = work(name, quick=True)
    net = peft_side.adapted(peft_side.twin(w), w.lora, w.config)
    ours = sum(value.size for value in w.adapter(w.model()).params.values())
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == ours


@pytest.mark.parametrize("name", ["gpt2", "smollm2"])
def test_decoding_gives_the_same_tokens(name):
    given = {"name": name, "n": 6, "prompt": 3, "quick": True}
    assert peft_side.decode(**given)["greedy"]() == decode.ours(**given)["greedy"]()


def test_llama_cpp_says_the_same_tokens_of_the_same_file(tmp_path):
    """Of the float32 file: of others it rounds a product's inputs too. With its table for a head, a random model says
    its last token again and again."""
    llama_cpp_side = pytest.importorskip("bench.llama_cpp_side", reason="a peer: the extra peers", exc_type=ImportError)
    pytest.importorskip("gguf", reason="writes GGUF files: the extra models")
    path = tmp_path / "model.gguf"
    w = held.of_work(quick=True)
    held.write_gguf(path, w._replace(config=replace(w.config, tie_head=False)), "F32")
    given = {"path": str(path), "tokens": [1, 5, 17], "n": 8}
    expected = held.ours(**given, storage=None)["greedy"]()
    assert llama_cpp_side.decode(**given)["greedy"]() == expected
    assert len(set(expected)) > 1


def test_switching_goes_over_to_the_other_adapter():
    """Their merged weight is the first adapter's at first, then the other's, then the first's again."""
    w = work("smollm2", quick=True)
    model = w.model()
    expected = [
        ln.asnumpy(ln.merge(model, w.trained_adapter(model, seed)).weights["layers.0.attn.q.weight"]) for seed in (0, 1)
    ]
    net = peft_side.with_two_adapters(w)
    weight = net.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
    np.testing.assert_allclose(weight.detach().numpy(), expected[0], rtol=0, atol=1e-6)
    for turn in (1, 0):
        peft_side.go_over(net, str(turn))
        np.testing.assert_allclose(weight.detach().numpy(), expected[turn], rtol=0, atol=1e-6)
    assert abs(expected[0] - expected[1]).max() > 1e-3


@pytest.mark.parametrize("layer", [peft_side.layer, peft_side.loralib_layer])
def test_a_layer_is_differentiated_by_its_input_and_by_a_and_b_alone(layer):
    grads = layer(M=4, D=6, r=2)["layer"]()
    assert sorted(tuple(g.shape) for g in grads) == [(2, 6), (4, 6), (6, 2)]
