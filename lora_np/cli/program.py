"""The commands and the exit status.

Exit status: 0, done; 1, it ran and the answer is no (a check failed, training diverged); 2, the input or the command
line is wrong, or there is too little memory or room; 130, interrupted.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from ..backend import backend_name
from . import (
    conformance,
    convert,
    demonstrate,
    derive,
    early,
    files,
    learn,
    predict,
    reproduce,
    sample,
    spec,
    streams,
    use,
    verify,
)
from .base import Run
from .output import FAILURES, failure

EXAMPLES = """\
examples:
  lora-np demo --plot losses.png                       LoRA and full fine-tuning side by side, nothing to download
  lora-np sample data                                  small files to try the others on, for each task
  lora-np finetune --data notes.txt --out adapter      adapt the embedded base to your text
  mpirun -n 4 lora-np finetune ...                     the same adapter from four processes, or machines (extra mpi)
  lora-np eval --data notes.txt --adapter adapter      its loss, with the adapter and without
  lora-np generate --adapter adapter --prompt "The "   text from it
  lora-np predict --adapter labels < texts.txt         a label for each line, with its probability
  lora-np inspect adapter                              what is in it
  lora-np merge --adapter adapter --out merged         base and adapter as one model
  lora-np verify --base DIR --adapter adapter          does it fit, is it trained, what does it change
  lora-np extract --base A --tuned B --rank 16 --out C the nearest LoRA to a fine-tuned model
  lora-np combine --adapter A --adapter B --out C      the sum of two adapters as one
  lora-np convert --adapter adapter --out adapter.npz  as loralib's .safetensors, .npz, or a folder of PEFT's
  lora-np gradcheck                                    every derivative, against complex steps
  lora-np spec --out spec                              the specification, as one page of HTML
  lora-np vectors --out vectors                        cases for any implementation, in any language
  lora-np conform results                              what it computed, beside them
  lora-np reproduce --out report                       the paper's claims: figures, verdicts, a page of HTML
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-np", description="LoRA in NumPy: fine-tune, look inside, check every derivative.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"lora-np {__version__} ({backend_name})")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="the result as JSON")
        return sub

    learning, using = (demonstrate, sample, learn), (use, predict)
    for part in (*learning, *using, files, derive, convert, verify, spec, conformance, reproduce):
        part.add_commands(command)
    return parser


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """A warning in one line, without the place in the source that Python adds."""
    print(f"lora-np: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. -> the exit status."""
    streams.prepare()
    try:
        early.hand_over()
        args = _parser().parse_args(argv)
        with warnings.catch_warnings():
            # Numbers that overflow end in a TrainingError, which says more than NumPy's warnings on the way there.
            warnings.simplefilter("ignore", RuntimeWarning)
            warnings.showwarning = _warn
            return int(args.run(args))
    except FAILURES as error:
        status, text = failure(error)
        print(f"lora-np: {text}", file=sys.stderr)
        return status
