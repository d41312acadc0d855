"""How many examples a property is tried on, which tests were skipped, and what several files share.

`pytest --hypothesis-profile=thorough` tries many more examples.
"""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import lora_np
from lora_np.threads import _blas

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and what it starts too

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

# The stand-in wraps every operation in Python: fewer examples keep its run about as long.
few = 15 if lora_np.backend_name == "cupy" else 30
settings.register_profile("quick", deadline=None, max_examples=few, suppress_health_check=SLOW)
settings.register_profile("ci", settings.get_profile("quick"), derandomize=True, print_blob=True)
settings.register_profile("brief", settings.get_profile("ci"), max_examples=8)
settings.register_profile("glance", settings.get_profile("ci"), max_examples=3)  # where all has been tried before
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=500)
settings.load_profile("ci" if os.environ.get("CI") else "quick")  # the same examples in every run of CI


def pytest_terminal_summary(terminalreporter):
    """Writes the tests and the files that were skipped into $SKIPPED_TESTS, if it is set: a line each."""
    if "SKIPPED_TESTS" in os.environ:
        names = dict.fromkeys(report.nodeid for report in terminalreporter.stats.get("skipped", []))
        Path(os.environ["SKIPPED_TESTS"]).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


@pytest.fixture
def two_blas_threads():
    """BLAS with two threads, whatever the environment says; gives a function that says how many it has.

    It is NumPy's; another library's, which a test loaded since, is not the package's affair.
    """
    pytest.importorskip("threadpoolctl", reason="limits of BLAS: the extra cli")
    blas = _blas()
    with blas.limit(limits=2):
        yield lambda: [library["num_threads"] for library in blas.info()]
