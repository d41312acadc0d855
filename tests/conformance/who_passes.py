"""Which implementation gets what right: installs each in an environment of its own, runs it, and judges its results.

python tests/conformance/who_passes.py FOLDER [--only NAME ...] [--keep] [--write]

FOLDER keeps the environments and the results; with --keep what has run is judged as it stands. The table is printed;
--write puts it into tests/README.md. Every finding has been looked into by hand, and stands in FINDINGS: what is wrong
and is not there stops the table.
"""

import argparse
import datetime
import os
import shutil
import subprocess
import venv
from pathlib import Path
from typing import NamedTuple

from lora_np.vectors.conform import compare
from lora_np.vectors.files import read_vectors
from lora_np.vectors.statements import STATEMENTS

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- written by python tests/conformance/who_passes.py -->", "<!-- end of what it wrote -->"
VECTORS = max((HERE / "vectors").glob("v*"))
TORCH = "torch==2.13.0"


class Implementation(NamedTuple):
    """requires: for pip; runner: its file; packages: whose versions are given."""

    runner: str
    requires: tuple[str, ...]
    packages: tuple[str, ...]


IMPLEMENTATIONS = {
    "plain JavaScript": Implementation("plain/run.mjs", (), ()),
    "PyTorch + PEFT": Implementation("with_peft.py", (TORCH, "peft==0.21.2"), ("peft", "torch")),
    "loralib": Implementation("with_loralib.py", (TORCH, "loralib==0.1.2", "numpy"), ("loralib", "torch")),
    "transformers": Implementation(
        "with_transformers.py", (TORCH, "transformers==5.24.0", "peft==0.21.2"), ("transformers", "peft", "torch")
    ),
    "litgpt": Implementation("with_litgpt.py", (TORCH, "litgpt==0.5.13"), ("litgpt", "torch")),
    "torchtune": Implementation(
        "with_torchtune.py", (TORCH, "torchtune==0.6.1", "torchao==0.13.0"), ("torchtune", "torchao", "torch")
    ),
    "adapters": Implementation("with_adapters.py", (TORCH, "adapters==1.3.0"), ("adapters", "transformers", "torch")),
    "mlx-lm": Implementation("with_mlx.py", ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"), ("mlx-lm", "mlx")),
    "Keras": Implementation("with_keras.py", ("keras==3.15.1", "jax==0.10.2"), ("keras", "jax")),
    "qwix": Implementation("with_qwix.py", ("qwix==0.1.8", "jax==0.10.2"), ("qwix", "flax", "optax", "jax")),
    "bitsandbytes": Implementation(
        "with_bitsandbytes.py", (TORCH, "bitsandbytes==0.50.2", "numpy"), ("bitsandbytes", "torch")
    ),
    "llama.cpp": Implementation(
        "with_llama_cpp.py", ("xllamacpp==2026.10.11549", "gguf==0.17.1", "pytest"), ("xllamacpp",)
    ),
}

WRONG, OTHER = "wrong", "otherwise"  # a mistake; a definition of its own, or a difference that its documentation names
SUBTRACTED = (WRONG, "the update is subtracted from the merged weight, whose bits are lost")
ADDED = (OTHER, "1e-6 is added to the norm that divides")
AVERAGE = (OTHER, "a query that sees no key gives the mean of all values, not zeros")
IN_FLOAT32 = "1 - beta^t is computed in float32, and keeps 14 of its 24 bits at 0.999"
FROM_ZERO = "warm-up is k / w: the first step has the rate 0"
RISES = f"{FROM_ZERO}; after the last step the cosine rises again"
TABLE = (OTHER, "GELU comes from a table of float16")
FINDINGS = {
    ("PyTorch + PEFT", "L6"): SUBTRACTED,
    ("PyTorch + PEFT", "O3"): ADDED,
    ("loralib", "L6"): SUBTRACTED,
    ("transformers", "T9"): (OTHER, "where all is masked by the least float32, the mean of all values, not zeros"),
    ("transformers", "T14"): (OTHER, "the pooler reads the first place, be it padding"),
    ("transformers", "O2"): (OTHER, RISES),
    ("litgpt", "O2"): (OTHER, f"{RISES}; without warm-up it divides by 0"),
    ("torchtune", "L10"): (
        WRONG,
        "the bias is multiplied by m / c too; with dropout W0 x is of the x that is not dropped",
    ),
    ("torchtune", "T11"): (OTHER, "neighbours x_2i and x_(2i+1) are turned; it turns the rows of W_q and W_k to suit"),
    ("torchtune", "O2"): (OTHER, RISES),
    ("adapters", "L5"): (WRONG, "the merged weight is float32 whatever W0 was, and is not rounded"),
    ("adapters", "L6"): SUBTRACTED,
    ("adapters", "L10"): (
        WRONG,
        "c is the norm of W0 + B A without s, and the merge leaves s out; the bias is multiplied by m / c too; "
        "the gradient goes through c",
    ),
    ("mlx-lm", "L5"): (WRONG, "s B A is rounded to W0's dtype before it is added: two roundings"),
    ("mlx-lm", "T8"): (WRONG, "the gradient of `where` is the cotangent times the mask, so NaN passes what is masked"),
    ("mlx-lm", "T9"): AVERAGE,
    ("mlx-lm", "O1"): (WRONG, IN_FLOAT32),
    ("mlx-lm", "O2"): (OTHER, f"{FROM_ZERO}; the cosine begins one step later, and the highest rate comes twice"),
    ("mlx-lm", "O3"): ADDED,
    ("Keras", "T9"): AVERAGE,
    ("Keras", "O1"): (
        WRONG,
        f"{IN_FLOAT32}; epsilon is Kingma and Ba's epsilon hat, as documented: bias correction multiplies it too",
    ),
    ("Keras", "O2"): (OTHER, FROM_ZERO),
    ("qwix", "T3"): (
        OTHER,
        "Flax takes the variance as E(x^2) - mean^2, which cancels; use_fast_variance=False does not",
    ),
    ("qwix", "T9"): AVERAGE,
    ("qwix", "O1"): (WRONG, f"Optax: {IN_FLOAT32}"),
    ("qwix", "O2"): (OTHER, FROM_ZERO),
    ("bitsandbytes", "L11"): (
        WRONG,
        "where a block goes on in the next row, its AVX-512 kernel takes for row i the scales from i (in div block) on",
    ),
    ("llama.cpp", "T13"): TABLE,
    ("llama.cpp", "T14"): TABLE,
}


def command(name: str, folder: Path) -> list[str]:
    """What runs an implementation, in an environment that is made if it is not there."""
    about = IMPLEMENTATIONS[name]
    if about.runner.endswith(".mjs"):
        node = shutil.which("node")
        if node is None:
            raise SystemExit("Node.js is not installed here")
        return [node, str(HERE / about.runner)]
    home = folder / name
    python = home / "bin" / "python"
    if not (home / "made").exists():
        venv.create(home, clear=True, with_pip=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "safetensors", *about.requires]
        subprocess.run(pip, check=True)
        (home / "made").touch()
    return [str(python), "-W", "ignore", str(HERE / about.runner)]


def versions(name: str, program: list[str]) -> str:
    """Of its packages, and of Node.js for JavaScript."""
    if not IMPLEMENTATIONS[name].packages:
        return f"Node.js {subprocess.check_output([program[0], '--version'], text=True).strip().removeprefix('v')}"
    ask = "import importlib.metadata as m, sys; print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ')"
    return subprocess.check_output([program[0], "-c", ask, *IMPLEMENTATIONS[name].packages], text=True).strip()


def judged(name: str, folder: Path, *, keep: bool):
    """Its versions, and the verdict on each id of which it computes something. keep: what has run is not run again."""
    program, results = command(name, folder), folder / f"{name} results"
    if not (keep and any(results.glob("*.safetensors"))):
        shutil.rmtree(results, ignore_errors=True)
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        subprocess.run([*program, VECTORS, results], check=True, env=one_thread)
    verdicts = compare(results, read_vectors(VECTORS), name_mistakes=False)
    return versions(name, program), {one.id: one for one in verdicts if not all(found.absent for found in one.found)}


def cell(name: str, verdict, notes: list[str]) -> str:
    """How many cases are right, or how many are not, with the number of the note that says what there is instead."""
    if verdict is None:
        return ""
    computed, failed = [found for found in verdict.found if not found.absent], verdict.failed
    if not failed:
        return f"{len(computed)}" if len(computed) == len(verdict.found) else f"{len(computed)} of {len(verdict.found)}"
    kind, text = FINDINGS[name, verdict.id]
    notes.append(f"{name}, {verdict.id}, {', '.join(found.case.name for found in failed)}: {text}")
    return f"{'**wrong**' if kind == WRONG else kind} {len(failed)} of {len(computed)} [{len(notes)}]"


def unexplained(found) -> list[str]:
    """What is wrong and stands in no finding; and the findings that nothing shows any more."""
    failed = {(name, id): one for name, (_, ids) in found.items() for id, one in ids.items() if one.failed}
    lost = [
        f"{name}, {id}: {', '.join(one.case.name for one in verdict.failed)}: {verdict.worst.worst} is "
        f"{verdict.worst.ratio:.3g} times its bound off"
        for (name, id), verdict in failed.items()
        if (name, id) not in FINDINGS
    ]
    gone = [f"{name}, {id}: right now" for name, id in FINDINGS if name in found and (name, id) not in failed]
    return lost + gone


def table(found) -> str:
    """The table and its notes. found: by implementation, its versions and verdicts."""
    notes: list[str] = []
    ids = [id for id in STATEMENTS if any(id in by_id for _, by_id in found.values())]
    rows = [["id", "statement", *found], ["---"] * (2 + len(found))]
    for id in ids:
        cells = [cell(name, by_id.get(id), notes) for name, (_, by_id) in found.items()]
        rows.append([id, STATEMENTS[id].title, *cells])
    about = "; ".join(f"{name} ({version})" for name, (version, _) in found.items())
    lines = [f"{datetime.date.today()}, vectors {VECTORS.name}, float32, a CPU: {about}.", ""]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


def write(text: str) -> None:
    before, begin, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{README}: expected {BEGIN} and {END}")
    README.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=[*IMPLEMENTATIONS], metavar="NAME")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True, parents=True)
    found = {name: judged(name, args.folder, keep=args.keep) for name in args.only}
    if strange := unexplained(found):
        raise SystemExit("\n".join(["not looked into:", *strange]))
    text = table(found)
    print(text)
    if args.write:
        write(text)


if __name__ == "__main__":
    main()
