"""Heads of tasks that the base lacks: the merged folder, opened by transformers, has the logits of PEFT's own merge."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_np import cli
from lora_np.formats.merged.folder import merge_folder

families = pytest.importorskip("families", reason="the extra peers")
torch, transformers = families.torch, families.T
pytestmark = families.QUIET
TEXTS, WORDS, SPANS = "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"
TASKS = {TEXTS: "SEQ_CLS", WORDS: "TOKEN_CLS", SPANS: "QUESTION_ANS"}
# A base's family and class, and the class that the adapter is trained on, with what it trains whole beside the output.
CASES = {
    "qwen2": ("qwen2", "ForCausalLM", TEXTS, []),
    "qwen2-words": ("qwen2", "ForCausalLM", WORDS, []),
    "phi-words": ("phi", "ForCausalLM", WORDS, []),
    "electra-spans": ("electra", "ForPreTraining", SPANS, []),
    "t5": ("t5", "ForConditionalGeneration", TEXTS, ["classification_head"]),  # which has a trunk of its own
    "bloom-words": ("bloom", "Model", WORDS, []),
    "mistral": ("mistral", "ForCausalLM", TEXTS, []),
    "deberta_v2": ("deberta_v2", "ForMaskedLM", TEXTS, ["pooler"]),
    "deberta_v2-words": ("deberta_v2", "ForMaskedLM", WORDS, []),
    "electra": ("electra", "ForPreTraining", TEXTS, []),
    "distilbert": ("distilbert", "ForMaskedLM", TEXTS, ["pre_classifier"]),
    "modernbert": ("modernbert", "ForMaskedLM", TEXTS, []),
    "bart": ("bart", "ForConditionalGeneration", TEXTS, ["classification_head"]),
    "bert-spans": ("bert", "ForMaskedLM", SPANS, []),
    "deberta_v2-trunk": ("deberta_v2", "Model", TEXTS, ["pooler"]),
    "qwen2-trunk": ("qwen2", "Model", WORDS, []),
    "gemma3": ("gemma3", "ForCausalLM", TEXTS, []),
}
N = {TEXTS: 3, WORDS: 5, SPANS: 2}  # labels


def make(case, home, dtype=torch.float32, **more):
    """A base, PEFT's adapter on the same trunk under a new head, and PEFT's merge of it."""
    family, start, end, whole = CASES[case]
    stem = "Gemma3Text" if family == "gemma3" and end != start else families.FAMILIES[family][0]
    torch.manual_seed(1)
    config = families.config_of(family, pad_token_id=1, eos_token_id=0, **more)
    base = getattr(transformers, families.FAMILIES[family][0] + start)(config).to(dtype)
    base.save_pretrained(str(home / "base"))
    config.num_labels = N[end]
    model = getattr(transformers, stem + end).from_pretrained(str(home / "base"), config=config, dtype=dtype).eval()
    targets = families.FAMILIES[family][3]["target_modules"]
    targets = ["query_key_value"] if family == "bloom" else targets  # its own would be the head too
    settings = {"target_modules": targets, "task_type": TASKS[end], "modules_to_save": whole or None}
    module = families.adapted(model, settings, dtype, seed=2)
    module.save_pretrained(str(home / "ad"))
    return module


def logits(model, end):
    tokens = torch.tensor([[*range(2, 12), 0]])  # an end token, which BART's classifier looks for
    with torch.no_grad():
        found = model(input_ids=tokens)
    return torch.stack([found.start_logits, found.end_logits]) if end == SPANS else found.logits


def run(capsys, *argv):
    capsys.readouterr()
    code = cli.main([str(part) for part in argv])
    return code, capsys.readouterr()


@pytest.mark.proves("L5")
@pytest.mark.parametrize("case", CASES)
def test_transformers_opens_the_merged_model_of_the_task(tmp_path, capsys, case):
    """Every key is used, none is missing, the logits are those of PEFT's merge, and verify holds of both folders."""
    end = CASES[case][2]
    merged = make(case, tmp_path).merge_and_unload()
    merged.save_pretrained(str(tmp_path / "theirs"))
    merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "out")
    module, info = getattr(transformers, f"AutoModel{end}").from_pretrained(
        str(tmp_path / "out"), output_loading_info=True
    )
    assert not any(info.values()), info
    ours, theirs = (logits(one, end) for one in (module.eval(), merged))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "out")]
    assert files[0].keys() <= files[1].keys()
    said, due = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "theirs"))
    assert said["architectures"] == due["architectures"]
    assert len(said["id2label"]) == len(said["label2id"]) == module.config.num_labels == N[end]
    for folder in ("out", "theirs"):
        about = ["--base", tmp_path / "base", "--adapter", tmp_path / "ad", "--merged", tmp_path / folder]
        code, found = run(capsys, "verify", *about)
        assert code == 0, found
    code, found = run(capsys, "inspect", tmp_path / "ad", "--base", tmp_path / "base")
    assert code == 0, found


def refusal(home):
    with pytest.raises(ValueError, match=r"\A.+\Z") as caught:  # one line
        merge_folder(home / "base", [home / "ad"], [1.0], home / "refused")
    assert not (home / "refused").exists()
    return str(caught.value)


def edit(folder, **said):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))


def tensors(home):
    return load_file(home / "ad" / "adapter_model.safetensors")


def put(home, found):
    save_file(found, home / "ad" / "adapter_model.safetensors")


PART = "base_model.model.classifier"


def test_a_part_that_peft_left_at_random_is_named(tmp_path):
    """PEFT saves a classifier of itself, and not what stands before it in DistilBERT."""
    make("distilbert", tmp_path)
    put(tmp_path, {key: value for key, value in tensors(tmp_path).items() if "pre_classifier" not in key})
    assert "expected pre_classifier.weight too" in refusal(tmp_path)


def test_a_head_without_its_output_is_refused(tmp_path):
    make("electra", tmp_path)
    put(tmp_path, {key: value for key, value in tensors(tmp_path).items() if "out_proj" not in key})
    assert "expected the weight of score or classifier or classifier.out_proj" in refusal(tmp_path)


def test_a_name_of_no_head_stays_a_mistake(tmp_path):
    make("electra", tmp_path)
    found = tensors(tmp_path)
    put(tmp_path, found | {"base_model.model.clasifier.weight": found[f"{PART}.dense.weight"]})
    assert "clasifier.weight: expected a tensor of" in refusal(tmp_path)


def test_the_task_must_be_said_by_type_or_class(tmp_path):
    make("mistral", tmp_path)
    edit(tmp_path / "ad", task_type="CAUSAL_LM")
    assert "task_type: the adapter has a head that the base lacks: expected one of SEQ_CLS" in refusal(tmp_path)
    edit(tmp_path / "ad", task_type=None)
    assert "got None" in refusal(tmp_path)
    edit(tmp_path / "ad", task_type=None, auto_mapping={"base_model_class": "MistralForSequenceClassification"})
    merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["architectures"] == ["MistralForSequenceClassification"]


def test_a_trunk_that_transformers_does_not_load_is_refused(tmp_path):
    """Qwen2ForQuestionAnswering names its trunk transformer, and leaves a language model's at random."""
    make("qwen2", tmp_path)
    found = tensors(tmp_path)
    found["base_model.model.qa_outputs.weight"] = found.pop("base_model.model.score.weight")
    put(tmp_path, {key.replace(".model.model.", ".model.transformer."): value for key, value in found.items()})
    edit(tmp_path / "ad", task_type="QUESTION_ANS")
    assert "modules that begin with transformer, where" in refusal(tmp_path)


def test_labels_are_named_by_task_json_or_by_the_base(tmp_path):
    make("electra", tmp_path)
    base, out = tmp_path / "base" / "config.json", tmp_path / "out"
    names = {"0": "a", "1": "b", "2": "c"}
    about = {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    base.write_text(json.dumps({**json.loads(base.read_text()), **about}))
    merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], out)
    assert json.loads((out / "config.json").read_text())["id2label"] == names
    task = tmp_path / "ad" / "task.json"
    task.write_text(json.dumps({"name": "classify", "labels": ["x", "y"]}))
    assert "expected task classify with 3 labels" in refusal(tmp_path)
    task.write_text(json.dumps({"name": "classify", "labels": ["x", "y", "z"]}))
    merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "named")
    said = json.loads((tmp_path / "named" / "config.json").read_text())
    assert said["id2label"] == {"0": "x", "1": "y", "2": "z"}
    assert said["label2id"] == {"x": 0, "y": 1, "z": 2}


def test_a_head_for_another_number_of_labels_replaces_the_bases(tmp_path):
    make("electra", tmp_path)
    merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "first")
    found = tensors(tmp_path)
    rng = np.random.default_rng(3)
    found |= {f"{PART}.out_proj.weight": rng.standard_normal((4, 16)).astype("f")}
    put(tmp_path, found | {f"{PART}.out_proj.bias": rng.standard_normal(4).astype("f")})
    merge_folder(tmp_path / "first", [tmp_path / "ad"], [1.0], tmp_path / "second")
    module, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(tmp_path / "second"), output_loading_info=True
    )
    assert not any(info.values())
    assert module.config.num_labels == 4
    assert np.array_equal(module.classifier.out_proj.weight.detach(), found[f"{PART}.out_proj.weight"])


def test_what_is_tied_in_the_base_is_no_head_of_the_merged_model(tmp_path):
    """A trained table unties nothing where the head is gone."""
    make("qwen2", tmp_path, tie_word_embeddings=True)
    found = tensors(tmp_path)
    table = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"] + 1
    put(tmp_path, found | {"base_model.model.model.embed_tokens.weight": table})
    edit(tmp_path / "ad", modules_to_save=["score", "embed_tokens"])
    merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in merged
    assert np.array_equal(merged["model.embed_tokens.weight"], table)


def test_convert_mends_the_names_beside_a_new_head(tmp_path, capsys):
    """A folder of which PEFT would find nothing becomes what it was made from."""
    make("mistral", tmp_path)
    found = tensors(tmp_path)
    put(tmp_path, {key.replace("base_model.model.", "module."): value for key, value in found.items()})
    about = ["--base", tmp_path / "base", "--adapter", tmp_path / "ad", "--out", tmp_path / "new"]
    code, said = run(capsys, "convert", *about)
    assert code == 0, said
    mended = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert mended.keys() == found.keys()
    assert all(np.array_equal(mended[key], found[key]) for key in found)
