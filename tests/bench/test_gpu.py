"""The benches as a GPU runs them, on the stand-in: what a step asks of the device, and what the table says of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import figures, readme
from bench.__main__ import README
from bench.device import HOST, meter
from bench.models import work
from bench.step import in_each_precision

ROOT = Path(__file__).resolve().parents[2]
STANDIN = ROOT / "tests" / "standin"


def on_the_standin(*command):
    """What Python prints, with the stand-in in the place of CuPy."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (STANDIN, ROOT))), "LORA_NP_BACKEND": "cupy"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The figures of a quick run there."""
    path = tmp_path_factory.mktemp("gpu") / "quick.json"
    command = ["step", "memory", "decode", "ops", "--quick", "--alone", "--rounds", "1", "--json", str(path)]
    on_the_standin("-m", "bench", *command)
    return figures.read(path)


def counts(run, bench, case, what):
    """Launches, copies to the device and copies to the host; 0 where none is reported."""
    found = [
        run.find(bench, case, f"{what}, {name}") for name in ("launches", "copies to the device", "copies to the host")
    ]
    return [0 if figure is None else figure.median for figure in found]


# What a step sends: tokens, targets and the places of those that count. A classifier of BERT's kind needs the token
# types too, and which token it reads.
@pytest.mark.parametrize(("name", "sent"), [("gpt2", 3), ("smollm2", 3), ("minilm", 5)])
def test_a_step_sends_its_batch_and_fetches_its_loss(quick, name, sent):
    assert counts(quick, "step", work(name, quick=True).case, "lora_np: LoRA")[1:] == [sent, 1]


@pytest.mark.parametrize("kind", ["every weight", "LoRA, with AdamW", "LoRA, blocks computed again"])
def test_whatever_is_trained_the_copies_are_the_same(quick, kind):
    assert counts(quick, "step", work("gpt2", quick=True).case, f"lora_np: {kind}")[1:] == [3, 1]


@pytest.mark.parametrize("name", ["gpt2", "smollm2"])
def test_decoding_sends_the_new_token_and_its_place_and_fetches_logits(quick, name):
    title, tokens = work(name, quick=True).title, 8
    assert counts(quick, "decode", f"{title}, greedy, batch 1", "lora_np")[1:] == [2 * tokens, tokens]


def test_more_sequences_take_no_more_launches(quick):
    """While the head reads all their rows in one chunk, and there are more than a product laid out for few rows has."""
    (case,) = {f.case for f in quick.of("memory") if f.what == "N=2"}
    small, large = (counts(quick, "memory", case, f"N={N}") for N in (2, 4))
    assert small[0] > 100
    assert large == small


def test_more_work_takes_more_launches(quick):
    case = work("gpt2", quick=True).case
    plain, again, whole = (
        counts(quick, "step", case, f"lora_np: {kind}")[0]
        for kind in ("LoRA", "LoRA, blocks computed again", "LoRA, with AdamW")
    )
    assert plain < min(again, whole)


def test_each_primitive_has_its_launches(quick):
    cases = {f.case for f in quick.of("ops") if f.what == "time"}
    launches = {f.case: f.median for f in quick.of("ops") if f.unit == "launches"}
    assert launches.keys() == cases
    assert launches["activations, backward"] == 1  # dy * dydx
    assert launches["linear, dx"] == 1  # dy W
    assert launches["linear, dW"] == 1  # dy^T x


# Each line: launches, sent, fetched.
ASKED = {
    "a + a": (1, 0, 0),
    "2.0 * a": (1, 0, 0),
    "a.__iadd__(a)": (1, 0, 0),
    "a @ a.T": (1, 0, 0),
    "a.T, a[1:], a.reshape(2, 6), a.swapaxes(0, 1), xp.broadcast_to(a, (2, 3, 4))": (0, 0, 0),
    "a.T.reshape(12)": (1, 0, 0),  # its rows must be copied
    "a[i], xp.take(a, i)": (2, 0, 0),
    "a.__setitem__(0, 1.0)": (1, 0, 0),
    "xp.empty((2, 2)), xp.empty_like(a), a.shape, len(a), xp.result_type(a, a)": (0, 0, 0),
    "xp.zeros(3), xp.ones_like(a)": (2, 0, 0),
    "xp.exp(a, out=a), xp.multiply(a, a, a)": (2, 0, 0),
    "xp.add.at(a, i, 1.0)": (1, 0, 0),
    "a.sum(axis=0), xp.mean(a), a.max()": (3, 0, 0),
    "xp.asarray(a), a.astype('float64', copy=False), xp.ascontiguousarray(a)": (0, 0, 0),
    "a.astype('float32')": (1, 0, 0),
    "xp.asarray(host), xp.array([1.0, 2.0]), a.set(host)": (0, 3, 0),
    "xp.asnumpy(a), a.get(), a.tolist(), float(a[0, 0]), a[0, 0].item(), bool(a[0, 0])": (0, 0, 6),
    "xp.asnumpy(host)": (0, 0, 0),
}
ASK = """
import json, sys
import numpy as np
from lora_np.backend import xp
from bench.counting import counting
before = {name: getattr(owner, name) for owner in (xp, xp.ndarray) for name in dir(owner)}
for line in json.loads(sys.argv[1]):
    host = np.ones((3, 4))
    a, i = xp.asarray(host), xp.asarray(np.array([0, 1]))
    xp.copies.reset()
    with counting() as counts:
        eval(line)
    launches, *copies = counts.values()
    assert copies == [xp.copies.to_device, xp.copies.to_host], line
    print(launches, *copies)
after = {name: getattr(owner, name) for owner in (xp, xp.ndarray) for name in dir(owner)}
assert after == before
"""


def test_what_is_counted():
    """Each expression's launches and copies, the copies also as the stand-in counts them; then CuPy is as it was."""
    found = on_the_standin("-c", ASK, json.dumps(list(ASKED))).splitlines()
    assert dict(zip(ASKED, (tuple(map(int, line.split())) for line in found), strict=True)) == ASKED


def test_the_host_counts_nothing():
    asked = []
    assert meter("bench.step") is HOST
    assert HOST.begin(lambda: asked.append(1)) == {}
    assert asked == []
    stop = HOST.clock()
    assert 0 <= stop() <= stop()


def test_on_a_gpu_the_other_side_runs_in_both_precisions():
    ways = {"theirs": {"compiled": False}}
    assert in_each_precision(ways, "numpy") == ways
    assert in_each_precision(ways, "cupy") == {
        "theirs, TF32 off": {"compiled": False, "tf32": False},
        "theirs, TF32 on": {"compiled": False, "tf32": True},
    }


def test_the_table_of_a_gpu_is_written_between_its_own_marks(quick, tmp_path):
    """Of the tiny sizes of a run on the stand-in, as if they were the real ones."""
    real = {work("gpt2", quick=True).case: work("gpt2").case}
    found = [f._replace(case=real.get(f.case, f.case)) for f in quick.figures]
    environment = {name: value for name, value in quick.environment.items() if name != "sizes"}
    path = tmp_path / "README.md"
    path.write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    readme.write(path, figures.Run(environment, found))
    before, _, rest = README.read_text(encoding="utf-8").partition(readme.GPU_BEGIN)
    text = path.read_text(encoding="utf-8")
    assert text.startswith(before)
    assert text.endswith(rest.partition(readme.GPU_END)[2])
    table = text[len(before) :].partition(readme.GPU_END)[0]
    assert "unmeasured" not in table
    assert "LoRA beside full fine-tuning, GPT-2 small" in table
    assert "launches" in table
    assert "copies to the device 3, copies to the host 1" in table
    assert "| layer_norm, backward | " in table
    assert "stand-in, CUDA 13.0, cupy" in table


def test_pytorch_is_beside_it_in_the_table_with_tf32_off_and_on():
    case = work("gpt2").case
    ours, off, on = (
        figures.Figure("step", case, what, "s", [value])
        for what, value in (("lora_np: LoRA", 2.0), ("PyTorch + PEFT, TF32 off", 3.0), ("PyTorch + PEFT, TF32 on", 1.0))
    )
    table = readme.table(figures.Run({"backend": "cupy"}, [ours, off, on, off.over(ours), on.over(ours)]))
    assert "| lora_np: LoRA, 2.00 s | PyTorch + PEFT, TF32 off, 3.00 s | 1.50x |" in table
    assert "| lora_np: LoRA, 2.00 s | PyTorch + PEFT, TF32 on, 1.00 s | 0.50x |" in table
