"""The command line: the only place that prints. Results go to standard output, progress to standard error."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command. -> the exit status."""
    from . import program  # imported here: what it imports takes a while

    return program.main(argv)
