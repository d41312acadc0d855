"""What is told where a package is missing: one wording for all, which asks no index for this package itself."""


def install(packages: str, extra: str) -> str:
    """How packages are had, and the extra of this one that has them."""
    return f"pip install {packages} (the extra {extra})"


def missing(what: str, package: str, extra: str) -> ImportError:
    """The error to raise where `what` needs a package that is not installed."""
    return ImportError(f"{what} needs {package}: {install(package, extra)}")
