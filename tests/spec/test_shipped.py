"""What the package reads from beside its modules is shipped with it."""

import configparser
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_file_beside_the_modules_is_package_data_but_readmes_and_pages():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    shipped = {
        (package, name.strip())
        for package, names in config["options.package_data"].items()
        for name in names.replace("\n", ",").split(",")
        if name.strip()
    }
    there = {
        (".".join(path.parent.relative_to(ROOT).parts), path.name)
        for path in (ROOT / "lora_np").rglob("*")
        if path.is_file()
        and path.suffix not in (".py", ".pyc")
        and path.name != "README.md"
        and path.parent.name != "html"
    }
    assert shipped == there
