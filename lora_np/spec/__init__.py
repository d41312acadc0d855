"""The specification as a page: each statement with its docstrings, source, errors, tests and measurements."""
