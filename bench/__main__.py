"""python -m bench: lists the benchmarks and runs them; compares two runs; writes README.md's table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from . import figures, readme
from .environment import environment
from .options import Options

README = Path(__file__).with_name("README.md")
BENCHES = ("ops", "step", "memory", "decode", "held", "merge", "switch", "load", "scaling", "large", "peers")


def run(names: Sequence[str], o: Options) -> Iterator[figures.Run]:
    """After each of these benchmarks, in their order, the figures so far."""
    found: list[figures.Figure] = []
    on = {**environment(), **({"sizes": "tiny"} if o.quick else {})}
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found += import_module(f"bench.{name}").figures(o)
        yield figures.Run(on, found)


def listed() -> str:
    """A line for each benchmark: the first of its docstring."""
    lines = {name: str(import_module(f"bench.{name}").__doc__).splitlines()[0] for name in BENCHES}
    return "\n".join(f"{name:8} {line}" for name, line in lines.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="list: what there is. NAMES, or all: runs them. compare A B: what changed from one run to another. "
        "table A: writes the table of figures in bench/README.md.",
    )
    parser.add_argument("what", nargs="*", default=["list"], metavar="list | NAMES | all | compare A B | table A")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is measured, in turn (default: 5)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs, not how fast")
    parser.add_argument("--alone", action="store_true", help="without the peers")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile among the peers, on GPT-2: some minutes more"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the figures there as JSON")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draws them into PNG files there")
    parser.add_argument("--readme", type=Path, default=README, help="where `table` writes (default: bench/README.md)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line asks for."""
    parser = _parser()
    args = parser.parse_args(argv)
    command, *files = args.what
    if command == "list":
        print(listed())
    elif command in ("compare", "table"):
        if len(files) != (2 if command == "compare" else 1):
            parser.error(f"{command}: expected {'two files' if command == 'compare' else 'a file'} that --json wrote")
        try:
            runs = [figures.read(Path(file)) for file in files]
            if command == "compare":
                print(figures.comparison(*runs))
            else:
                readme.write(args.readme, runs[0])
        except (ValueError, OSError) as error:
            parser.error(str(error))
    else:
        _measure(parser, args)


def _measure(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    names = BENCHES if args.what == ["all"] else tuple(args.what)
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        parser.error(f"expected all or some of {' '.join(BENCHES)}, got {' '.join(unknown)}")
    if args.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, got {args.rounds}")
    if args.plot is not None:
        from . import plots  # before anything is measured: it says what is missing
    for found in run(names, Options(args.rounds, args.quick, args.alone, args.compile)):
        if args.json is not None:  # after each: what was measured is kept if a later one fails
            args.json.write_text(figures.to_json(found) + "\n")
    print(figures.text(found))
    if args.plot is not None:
        plots.draw(args.plot, found)


if __name__ == "__main__":
    main()
