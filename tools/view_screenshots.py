"""Makes the pictures of docs/view.md: ``python tools/view_screenshots.py RUN_DIR`` (needs playwright, and chromium).

``RUN_DIR``: a run whose curves are shown. The rollout is that of the tests, which is always the same.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
SEQUENCE = 1 << 32


def main() -> None:
    from support.traced_run import write_run

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    run_dir = parser.parse_args().run_dir.absolute()
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        known = write_run(Path(directory) / "example")
        words = ["view", str(run_dir), str(known), "--port", "0"]
        command = [sys.executable, "-m", "atropos_verl.cli", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            url = process.stdout.readline().split()[1]
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for name, place, scheme in (
                ("live", f"live?run={run_dir.name}", "light"),
                ("rollout", f"sequence?run=example&id={SEQUENCE}&token=2", "dark"),
            ):
                page = browser.new_page(viewport={"width": 1000, "height": 640}, color_scheme=scheme)
                page.goto(f"{url}#{place}")
                page.wait_for_timeout(3000)
                page.screenshot(path=ROOT / "docs" / f"view-{name}.png")
            process.terminate()


if __name__ == "__main__":
    main()
