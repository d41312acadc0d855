"""The specification as a document: `statements` and docstrings, with their source, tests and measured errors, as a page."""
