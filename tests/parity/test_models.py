"""Each family's models of random weights against transformers and PEFT, in float64, within 1e-10.

By their files: what transformers and PEFT save is loaded here, and what is saved here is loaded there. Sequences are
longer than the windows, than the lengths that Llama 3's frequencies were made for, and than the buckets of distance.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import exact
import numpy as np
import peers
import pytest
from peers import IGNORED, PAD, assert_close, peft, torch, transformers
from safetensors.numpy import load_file, save_file

import lora_np as ln
from lora_np import cli
from lora_np.adapter import target_of
from lora_np.backend import xp
from lora_np.batch import check_inputs
from lora_np.binding import bind
from lora_np.decode import keep_source, new_cache, next_logits
from lora_np.formats.merged.folder import merge_folder
from lora_np.formats.models.huggingface import places
from lora_np.formats.models.names import family_of, module_names, module_of, module_parts, stored_name

pytestmark = [*peers.FILTERS, pytest.mark.filterwarnings("ignore::UserWarning")]

V, T, S, LONGEST, FIRST = 31, 13, 11, 40, 2  # FIRST: what an encoder-decoder's generation starts with
D, F, H, LAYERS = 24, 20, 4, 3
TOKENS = {"vocab_size": V, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3}
BERT = {
    **TOKENS, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": H,
    "max_position_embeddings": LONGEST,
}  # fmt: skip
LLAMA = {**BERT, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 10,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 60.0}
PARTIAL = {"rope_type": "default", "rope_theta": 30.0, "partial_rotary_factor": 0.7}
WINDOW = {"sliding_window": 5}
SOME = {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA3 = {"head_dim": 8, "query_pre_attn_scalar": 11, **SOME}
IMAGES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
SOFT_TOKENS = {"mm_tokens_per_image": 4, "image_token_index": V - 1}
OPT = {**BERT, "ffn_dim": F, "word_embed_proj_dim": D}
GPT2 = {**TOKENS, "n_embd": D, "n_inner": F, "n_layer": LAYERS, "n_head": H, "n_positions": LONGEST}
DISTILBERT = {
    "vocab_size": V, "pad_token_id": PAD, "dim": D, "hidden_dim": F, "n_layers": LAYERS, "n_heads": H,
    "max_position_embeddings": LONGEST,
}  # fmt: skip
DEBERTA = {
    **BERT, "relative_attention": True, "position_buckets": 8, "max_relative_positions": 9, "share_att_key": True,
    "norm_rel_ebd": "layer_norm", "pos_att_type": "p2c|c2p", "position_biased_input": False, "pooler_hidden_size": D,
}  # fmt: skip
T5 = {
    **TOKENS, "d_model": D, "d_kv": 5, "d_ff": F, "num_layers": 3, "num_decoder_layers": 2, "num_heads": H,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 9, "decoder_start_token_id": FIRST,
}  # fmt: skip
GATED = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
BART = {
    **TOKENS, "d_model": D, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": H,
    "decoder_attention_heads": H, "encoder_ffn_dim": F, "decoder_ffn_dim": F, "max_position_embeddings": LONGEST,
    "decoder_start_token_id": FIRST, "forced_eos_token_id": None,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model: its classes' prefix and end, what its configuration has, and PEFT's targets.

    positions: whether its forward takes position_ids
    """

    prefix: str
    config: dict[str, Any]
    end: str = "ForCausalLM"
    targets: Any = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    positions: bool = True

    @property
    def decodes(self) -> bool:
        return self.end not in (CLASSIFY, TAG)


CLASSIFY, TAG, TWO = "ForSequenceClassification", "ForTokenClassification", "ForConditionalGeneration"
FUSED = ("qkv_proj", "o_proj", "gate_up_proj")
PLAIN = ("q_proj", "v_proj", "out_proj", "fc1", "fc2")
CASES = {
    "gpt2": Case("GPT2", GPT2, "LMHeadModel", ("c_attn", "c_proj", "c_fc")),
    "bert-classify": Case("Bert", {**BERT, "type_vocab_size": 2}, CLASSIFY, ("query", "output.dense"), False),
    "roberta-tag": Case("Roberta", {**BERT, "max_position_embeddings": LONGEST + 2}, TAG, ("key",), positions=False),
    "llama3": Case("Llama", {**LLAMA, "rope_parameters": LLAMA3}),
    "llama-linear": Case("Llama", {**LLAMA, "rope_parameters": LINEAR}),
    "llama-wide": Case("Llama", {**LLAMA, "head_dim": 10}),
    "mistral": Case("Mistral", {**LLAMA, **WINDOW}),
    "mistral-classify": Case("Mistral", {**LLAMA, "sliding_window": None, "head_dim": 8}, CLASSIFY),
    "qwen2": Case("Qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen2-window": Case("Qwen2", {**LLAMA, **WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    "qwen3": Case("Qwen3", {**LLAMA, "head_dim": 8}),
    "qwen3-tag": Case("Qwen3", {**LLAMA, "head_dim": 8, **SOME, "use_sliding_window": True}, TAG),
    "gemma": Case("Gemma", {**LLAMA, "head_dim": 8}),
    "gemma3_text": Case("Gemma3", {**LLAMA, **GEMMA3}),
    "gemma3": Case(
        "Gemma3",
        {"text_config": {**LLAMA, **GEMMA3}, "vision_config": IMAGES, **SOFT_TOKENS},
        TWO,
        r".*language_model.*\.(q_proj|up_proj)",
    ),
    "phi3": Case("Phi3", {**LLAMA, **WINDOW}, targets=FUSED),
    "phi3-partial": Case("Phi3", {**LLAMA, "rope_parameters": PARTIAL}, targets=FUSED),
    "opt": Case("OPT", OPT, targets=PLAIN, positions=False),
    "distilbert-classify": Case("DistilBert", DISTILBERT, CLASSIFY, ("q_lin", "v_lin", "lin1"), positions=False),
    "distilbert-tag": Case("DistilBert", DISTILBERT, TAG, ("k_lin", "out_lin", "lin2"), positions=False),
    "deberta-classify": Case(
        "DebertaV2", DEBERTA, CLASSIFY, ("query_proj", "value_proj", "output.dense"), positions=False
    ),
    "deberta-tag": Case("DebertaV2", {**DEBERTA, "type_vocab_size": 2}, TAG, ("key_proj",), positions=False),
    "t5": Case("T5", T5, TWO, ("q", "v", "wi"), positions=False),
    "t5-v1.1": Case("T5", GATED, TWO, ("k", "o", "wi_0", "wi_1", "wo"), positions=False),
    "mt5-tied": Case("MT5", {**T5, "feed_forward_proj": "gated-gelu"}, TWO, ("v", "wi_1"), positions=False),
    "mt5": Case("MT5", GATED, TWO, ("q", "wo"), positions=False),
    "bart": Case("Bart", BART, TWO, PLAIN, positions=False),
    "bart-scaled": Case("Bart", {**BART, "scale_embedding": True}, TWO, PLAIN, positions=False),
}
DECODING = [name for name, case in CASES.items() if case.decodes]


@dataclass(frozen=True)
class Pair:
    """transformers' model, the folder that it is in, and what is loaded from there."""

    case: Case
    module: Any
    folder: Any
    model: ln.Model


def shake(module, seed):
    """Adds N(0, 0.2^2) to every trainable parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def with_vocabulary(config, size):
    """A configuration with another vocabulary, which may stand inside of it."""
    changed = {
        name: with_vocabulary(value, size) if isinstance(value, dict) else value for name, value in config.items()
    }
    return changed | ({"vocab_size": size} if "vocab_size" in config else {})


def make(name, folder, seed=0, vocabulary=V):
    case = CASES[name]
    torch.manual_seed(seed)
    with exact.in_float64():
        labels = {"num_labels": 3} if not case.decodes else {}
        text = "Text" if case.prefix == "Gemma3" and case.end == "ForCausalLM" else ""
        config = getattr(transformers, f"{case.prefix}{text}Config")(
            **with_vocabulary(case.config, vocabulary), **labels
        )
        config._attn_implementation = "eager"
        module = getattr(transformers, case.prefix + case.end)(config).eval()
        if case.config.get("tie_word_embeddings") is False and "T5" in case.prefix:
            # A head of its own, as these files have; this version of transformers makes it the token table's.
            module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach().clone())
    shake(module, seed)
    module.save_pretrained(str(folder))
    return Pair(case, module, folder, ln.load_model(folder))


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp(request.param))


# --- A batch ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """tokens and mask (N,T), targets (N,T) or (N,); of an encoder-decoder source and source_mask (N,S)."""

    tokens: Any
    targets: Any
    mask: Any
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self):
        return {"mask": self.mask, **self.more}


def padded(rng, n, longest, padding):
    """Random sequences, the first full, the others shorter; and their mask."""
    tokens = rng.integers(PAD + 3, V - 1, (n, longest))
    if padding is None:
        return tokens, None
    mask = np.arange(longest) < np.append(longest, rng.integers(1, longest, n - 1))[:, None]
    mask = mask[:, ::-1] if padding == "left" else mask
    return np.where(mask, tokens, PAD), mask


def make_batch(config, padding, seed=0, N=4):
    rng = np.random.default_rng(seed)
    tokens, mask = padded(rng, N, T, padding)
    more = {}
    if config.n_encoder:
        more = dict(zip(("source", "source_mask"), padded(rng, N, S, padding), strict=True))
    if config.n_types:
        more = {"token_types": rng.integers(0, config.n_types, tokens.shape)}
    if config.head == "classify":
        return Batch(tokens, rng.integers(0, config.head_size, N), mask, more)
    targets = rng.integers(0, config.head_size, (N, T))
    targets[rng.random((N, T)) < 0.2] = IGNORED
    if mask is not None:
        targets[~mask] = IGNORED
    targets[0, 0] = targets[0, -1] = 0  # some count
    return Batch(tokens, targets, mask, more)


def to_left(values, mask):
    """Each row's true tokens first: models that take no positions count from there."""
    order = np.argsort(~mask, axis=1, kind="stable")
    return np.take_along_axis(values, order, axis=1)


def their_inputs(pair, batch):
    """The keyword arguments of their forward; padding on the left is moved where it takes no positions."""
    tokens, mask, more = batch.tokens, batch.mask, dict(batch.more)
    if not pair.case.positions and mask is not None:
        tokens = to_left(tokens, mask)
        more = {name: to_left(value, mask) if name == "token_types" else value for name, value in more.items()}
        mask = to_left(mask, mask)
        if "source" in more:
            keep = more["source_mask"]
            more = {"source": to_left(more["source"], keep), "source_mask": to_left(keep, keep)}
    start = "decoder_" if "source" in more else ""
    inputs = {
        f"{start}input_ids": tokens,
        f"{start}attention_mask": mask,
        "input_ids": more.get("source", tokens),
        "attention_mask": more.get("source_mask", mask),
        "token_type_ids": more.get("token_types"),
    }
    if pair.case.positions and mask is not None:
        inputs["position_ids"] = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return {name: torch.tensor(value.astype(np.int64)) for name, value in inputs.items() if value is not None}


def their_logits(pair, batch, module):
    with exact.in_float64():
        return module(**their_inputs(pair, batch)).logits


def real(pair, batch, logits, *, theirs):
    """The logits that mean something: not those of padding, which may stand elsewhere in theirs."""
    if batch.mask is None or logits.ndim == 2:
        return logits
    mask = to_left(batch.mask, batch.mask) if theirs and not pair.case.positions else batch.mask
    return logits[mask]


def compare(pair, batch, adapter=None, module=None):
    """The logits; -> their loss, the graph behind it."""
    ours = ln.asnumpy(ln.forward(pair.model, batch.tokens, adapter, **batch.inputs))
    theirs = their_logits(pair, batch, pair.module if module is None else module)
    assert_close(
        {"logits": real(pair, batch, ours, theirs=False)},
        {"logits": real(pair, batch, theirs.detach().numpy(), theirs=True)},
    )
    targets = batch.targets
    if batch.mask is not None and not pair.case.positions and targets.ndim == 2:
        targets = to_left(targets, batch.mask)
    return torch.nn.functional.cross_entropy(theirs.flatten(0, -2), torch.tensor(targets).flatten())


# --- The model -------------------------------------------------------------------------------------------------------


def under_our_names(config, tensors):
    """Their gradients under our names, by the places that loading their weights puts to the proof."""
    family, found = family_of(config), {}
    stored = {stored_name(family, name): value for name, value in tensors.items()}
    for key, place in places(config, in_trunk=True).items():
        whole = stored[key].T if place.transposed else stored[key]
        found |= {name: whole[rows] for name, rows in place.parts.items()}
    return found


@pytest.mark.proves("T1", "T3", "T4", "T5", "T6", "T7", "T9", "T10", "T11", "T13", "T14", "T17", "T18", "T19", "T20")
@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_logits_and_the_gradient_of_every_weight(pair, padding):
    batch = make_batch(pair.model.config, padding)
    pair.module.zero_grad()
    their_loss = compare(pair, batch)
    their_loss.backward()
    loss, grads = ln.loss_and_grads(pair.model, None, batch.tokens, batch.targets, **batch.inputs, trainable="all")
    assert loss == pytest.approx(their_loss.item(), rel=peers.TOLERANCE)
    theirs = {name: p.grad.numpy() for name, p in pair.module.named_parameters() if p.grad is not None}
    assert_close(grads, under_our_names(pair.model.config, theirs))


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        ("t5", "encoder.embed_tokens.weight", "says that it is tied to the token table, but it differs"),
        ("t5", "lm_head.weight", "says that it is tied to the token table, but it differs"),
        ("bart", "model.decoder.embed_tokens.weight", "says that it is tied to the token table, but it differs"),
        ("bart", "final_logits_bias", "expected zeros, got others: it has no place in this model"),
    ],
)
def test_copies_of_the_table_and_what_must_be_zero(tmp_path, name, key, said):
    """Older files have them; other values are refused by name."""
    pair = make(name, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    table = next(value for at, value in tensors.items() if at.endswith("shared.weight"))
    neutral = np.zeros((1, V)) if key == "final_logits_bias" else table
    save_file({**tensors, key: neutral}, tmp_path / "model.safetensors", {"format": "pt"})
    again = ln.load_model(tmp_path)
    assert again.config == pair.model.config
    assert_close(dict(again.weights), {k: ln.asnumpy(v) for k, v in pair.model.weights.items()}, 0)
    save_file({**tensors, key: neutral + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{key}: .*{said}"):
        ln.load_model(tmp_path)


# --- Adapters --------------------------------------------------------------------------------------------------------


def our_gradients(config, grads):
    """Gradients by A and B as PEFT has them: of a fused module, whose parts share A here, the sum, and B in one."""
    family, result = family_of(config), {}
    for ours, theirs in module_names(config).items():
        parts = [ours] if f"{ours}.A" in grads else list(module_parts(config, ours))
        if all(f"{part}.A" in grads and module_of(part, family) == ours for part in parts):
            result[f"{theirs}.A"] = sum(ln.asnumpy(grads[f"{part}.A"]) for part in parts)
            result[f"{theirs}.B"] = np.concatenate([ln.asnumpy(grads[f"{part}.B"]) for part in parts])
    return result


def their_gradients(module):
    result = {}
    for name, p in module.named_parameters():
        found = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\.default\.weight", name)
        if found:
            result[f"{found[1]}.{found[2]}"] = p.grad.numpy()
    return result


def opened(pair, folder):
    """transformers' model of a folder, and what it says of its keys."""
    with exact.in_float64():
        module, info = type(pair.module).from_pretrained(
            str(folder), dtype=torch.float64, attn_implementation="eager", output_loading_info=True
        )
    return module.eval(), info


@pytest.fixture(scope="module")
def by_peft(pair, tmp_path_factory):
    """PEFT's own adapter, in a folder, and the model that has it."""
    targets = pair.case.targets if isinstance(pair.case.targets, str) else list(pair.case.targets)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets)
    module = peft.get_peft_model(opened(pair, pair.folder)[0], config).eval()
    shake(module, seed=3)
    folder = tmp_path_factory.mktemp("by_peft")
    module.save_pretrained(str(folder))
    return module, folder


@pytest.mark.proves("L1", "L2", "L4")
@pytest.mark.parametrize("padding", ["right", "left"])
def test_an_adapter_of_pefts(pair, by_peft, padding):
    """load_adapter: logits, and the gradients by A and B."""
    module, folder = by_peft
    adapter = ln.load_adapter(folder, pair.model)
    batch = make_batch(pair.model.config, padding, seed=1)
    module.zero_grad()
    compare(pair, batch, adapter, module).backward()
    _, grads = ln.loss_and_grads(pair.model, adapter, batch.tokens, batch.targets, **batch.inputs)
    assert_close(our_gradients(pair.model.config, grads), their_gradients(module))


def our_adapter(pair, seed=7, **more):
    """One of ours, of all matrices of the layers, A and B random: what is fused in their files is apart here."""
    targets = {target_of(name) for name in pair.model.config.matrix_shapes() if "layers." in name}
    settings = {"r": 2, "alpha": 3, "targets": sorted(targets), **more}
    adapter = ln.init_adapter(pair.model, ln.LoRAConfig(**settings), seed=seed)
    rng = np.random.default_rng(seed)
    params = {name: xp.asarray(0.3 * rng.standard_normal(value.shape)) for name, value in adapter.params.items()}
    return ln.Adapter(adapter.config, params)


# Of a fused module all parts have one scale.
OURS = {
    "all": {},
    "layers": {"layers": (1,), "targets": ("q", "o", "up")},
    "ranks": {"rslora": True, "targets": ("o", "down"), "rank_pattern": {"o": 3, "layers.1.mlp.down": 1}},
}


@pytest.mark.parametrize("settings", OURS)
def test_an_adapter_of_ours(pair, tmp_path, settings):
    """save_adapter: PEFT's model with it computes what ours does, and load_adapter gives the same bits."""
    more = OURS[settings]
    if not pair.case.decodes and settings == "all":
        more = {"train_head": True}
    adapter = our_adapter(pair, **more)
    ln.save_adapter(tmp_path / "ad", adapter, pair.model)
    again = ln.load_adapter(tmp_path / "ad", pair.model)
    assert again.config == adapter.config
    assert again.params.keys() == adapter.params.keys()
    assert all(np.array_equal(ln.asnumpy(again.params[k]), ln.asnumpy(v)) for k, v in adapter.params.items())
    module = peft.PeftModel.from_pretrained(opened(pair, pair.folder)[0], str(tmp_path / "ad")).eval()
    compare(pair, make_batch(pair.model.config, "right", seed=2), adapter, module)


@pytest.mark.proves("L5")
@pytest.mark.parametrize("writer", ["theirs", "ours"])
def test_a_merge(pair, by_peft, tmp_path, writer):
    """Of folders: transformers opens it, and computes what base and adapter do; load_model's weights are merge's."""
    folder = by_peft[1] if writer == "theirs" else tmp_path / "ours"
    if writer == "ours":
        ln.save_adapter(folder, our_adapter(pair), pair.model)
    merge_folder(pair.folder, [folder], [1.0], tmp_path / "merged")
    adapter = ln.load_adapter(folder, pair.model)
    due, model = ln.merge(pair.model, adapter), ln.load_model(tmp_path / "merged")
    assert model.config == due.config
    assert_close(dict(model.weights), {k: ln.asnumpy(v) for k, v in due.weights.items()}, 1e-15)
    module, info = opened(pair, tmp_path / "merged")
    assert not any(info.values()), info
    compare(pair, make_batch(pair.model.config, "right", seed=3), adapter, module)


@pytest.mark.parametrize("name", ["t5", "t5-v1.1", "llama3", "gemma3_text"])
def test_a_merge_of_the_head_alone(tmp_path, name):
    """It unties what was tied; T5's head goes on reading states times a constant, of which older files say nothing."""
    pair = make(name, tmp_path / "base")
    raw = json.loads((tmp_path / "base" / "config.json").read_text())
    raw.pop("scale_decoder_outputs", None)
    if name == "t5-v1.1":
        raw["tie_word_embeddings"] = False
    (tmp_path / "base" / "config.json").write_text(json.dumps(raw))
    adapter = our_adapter(pair, targets=("head",))
    ln.save_adapter(tmp_path / "ad", adapter, pair.model)
    merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "merged")
    assert ln.load_model(tmp_path / "merged").config == ln.merge(pair.model, adapter).config
    compare(pair, make_batch(pair.model.config, "right", seed=3), adapter, opened(pair, tmp_path / "merged")[0])


def run(capsys, *argv):
    """A command's exit status, and what it prints as JSON."""
    capsys.readouterr()
    return cli.main([*map(str, argv), "--json"]), json.loads(capsys.readouterr().out)


def test_verify(pair, by_peft, tmp_path, capsys):
    """The command says that the merge is the merge of the two, and how far the adapter moves the outputs."""
    folders = ("--base", pair.folder, "--adapter", by_peft[1])
    merge_folder(pair.folder, [by_peft[1]], [1.0], tmp_path / "merged")
    status, said = run(capsys, "verify", *folders, "--merged", tmp_path / "merged")
    assert status == 0
    assert all(one["differing"] == 0 for one in said["merged"]["changed"])
    assert said["effect"]["effect of the adapter"]["change"] > 0
    status, said = run(capsys, "verify", *folders, "--merged", pair.folder)
    assert status == 1


LINES = {
    None: ("lm", ["the cat sat on the mat. "] * 60),
    TWO: ("translate", [f"{word}||{word[::-1]}" for word in ("cat", "sat", "mat", "the", "on", "a")] * 4),
    CLASSIFY: ("classify", [f"{label * n} it is\t{label}" for label in "abc" for n in range(2, 12)]),
    TAG: ("tag", [line for _ in range(12) for line in ("the a", "cat b", "sat c", "")]),
}


SIZES = (
    "--steps", 12, "--warmup", 2, "--batch", 4, "--window", 16, "--lr", 0.01, "--targets", "all",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_finetune(name, tmp_path, capsys):
    """The command, on a model of bytes of this family: its loss falls, and PEFT loads what it writes."""
    base = make(name, tmp_path / "base", vocabulary=256)
    task, lines = LINES[base.case.end if base.model.config.n_encoder or base.model.config.head != "lm" else None]
    (tmp_path / "data").write_text("\n".join(lines) + "\n")
    places = ("--base", base.folder, "--data", tmp_path / "data", "--out", tmp_path / "ad")
    status, said = run(capsys, "finetune", *places, *SIZES, "--task", task)
    assert status == 0
    assert said["loss"]["adapter"] < said["loss"]["base"]
    adapter = ln.load_adapter(tmp_path / "ad", base.model)
    module = peft.PeftModel.from_pretrained(opened(base, base.folder)[0], str(tmp_path / "ad")).eval()
    compare(base, make_batch(base.model.config, "right", seed=8), adapter, module)


@pytest.mark.parametrize("pair", ["llama3", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"], indirect=True)
def test_an_adapter_in_llama_cpps_file(pair, tmp_path):
    """Out and back, in float32: the configuration, and A and B, which is rounded once where three have one alpha."""
    single = {name: ln.asnumpy(value).astype("float32") for name, value in pair.model.weights.items()}
    model, adapter = ln.Model(pair.model.config, single), our_adapter(pair)
    params = {name: xp.asarray(ln.asnumpy(value).astype("float32")) for name, value in adapter.params.items()}
    ln.save_adapter(tmp_path / "a.gguf", ln.Adapter(adapter.config, params), model)
    again = ln.load_adapter(tmp_path / "a.gguf", model)
    assert again.config == adapter.config
    assert_close(dict(again.params), {name: ln.asnumpy(value) for name, value in params.items()}, 2.0**-23)


# --- Decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.proves("T16")
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("pair", DECODING, indirect=True)
def test_cached_decoding(pair, by_peft, padding):
    """Greedy tokens are theirs, and their cached logits are our cached ones: past the window, and the first length."""
    module, folder = by_peft
    config, adapter, n = pair.model.config, ln.load_adapter(folder, pair.model), 15
    batch = make_batch(config, padding, seed=5)
    mask, tokens = batch.mask, batch.tokens
    if config.n_encoder:
        mask, tokens = None, np.full((len(batch.tokens), 1), FIRST)
    inputs = their_inputs(pair, batch)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    if not config.n_encoder:
        inputs = {"input_ids": torch.tensor(tokens)}
        inputs |= {} if mask is None else {"attention_mask": torch.tensor(mask.astype(np.int64))}
    steps = []  # their logits at each step, as the model gives them: generate itself would make them float32
    hook = module.get_base_model().register_forward_hook(lambda *call: steps.append(call[-1].logits[:, -1]))
    with exact.in_float64():
        theirs = module.generate(**inputs, do_sample=False, max_new_tokens=n, eos_token_id=None)
    hook.remove()
    ours = ln.generate(pair.model, tokens, adapter, n=n, mask=mask, **batch.more)
    np.testing.assert_array_equal(ours, theirs.numpy())
    (N, first), every = tokens.shape, None
    if mask is not None:
        every = np.hstack([mask, np.ones((N, n), dtype=bool)])
    run = keep_source(bind(pair.model, adapter, rows=N), check_inputs(config, tokens, mask, None, **batch.more))
    cache = new_cache(config, N=N, longest=first + n, dtype="f8")
    cached = [
        next_logits(run, cache, ours[:, start:stop], None if every is None else every[:, :stop])
        for start, stop in [(0, first), *((t, t + 1) for t in range(first, first + n - 1))]
    ]
    assert_close({"logits": xp.stack(cached, axis=1)}, {"logits": torch.stack(steps, dim=1).detach().numpy()})
