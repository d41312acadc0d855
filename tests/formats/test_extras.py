"""What is told where a package is missing."""

import ast
import re
from configparser import ConfigParser
from pathlib import Path

import pytest

import lora_np
from lora_np.formats.files.extras import install, missing

PACKAGE = Path(lora_np.__file__).parent


def test_the_hint_installs_the_package_and_names_the_extra():
    assert str(missing("--plot", "matplotlib", "plot")) == "--plot needs matplotlib: " + install("matplotlib", "plot")
    assert install("matplotlib", "plot") == "pip install matplotlib (the extra plot)"


def hints():
    """The packages and the extra of each hint in the package."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("missing", "install"):
                *_, packages, extra = node.args
                if isinstance(packages, ast.Constant):
                    yield packages.value, extra.value


def test_each_hint_names_packages_of_its_extra():
    path = PACKAGE.parent / "setup.cfg"
    if not path.exists():
        pytest.skip("an installed package, without its sources")
    setup = ConfigParser()
    setup.read(path)
    found = set(hints())
    assert len(found) >= 7
    for packages, extra in found:
        required = re.findall(r"^[\w-]+", setup["options.extras_require"][extra], flags=re.MULTILINE)
        assert set(packages.split()) <= set(required), extra


def test_no_hint_asks_an_index_for_this_package():
    """It is on none: what is not in a checkout has another's name."""
    asked = [p.name for p in PACKAGE.rglob("*.py") if re.search(r"pip install\W+lora-np", p.read_text("utf-8"))]
    assert asked == []
