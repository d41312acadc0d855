"""A command as its user runs it: the exit status, and what it says."""

from lora_np import cli


def run(capsys, *argv):
    """-> the exit status, the output, the errors."""
    capsys.readouterr()
    status = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err


def one_line(capsys, *argv):
    """What is said of bad input: a line, and nothing else."""
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    return err
