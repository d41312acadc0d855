"""The specification as a page: its statements, each with docstrings, source, errors raised, tests, and errors measured."""
