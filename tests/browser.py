"""A browser without a window: what a page is like in the end, and what it says on its console."""

import shutil
import subprocess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NONE = "there is no Chromium on this machine"


def browse(folder, path):
    """The page's elements as a browser has them in the end, and the lines on its console; `folder` is the browser's."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=10000 --dump-dom"
    )
    done = subprocess.run(
        [CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
