"""Makes the pictures of docs/view.md: ``python tools/view_screenshots.py RUN_DIR`` (needs playwright, and chromium)."""

import argparse
import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("run_dir", type=Path)
    run_dir = parser.parse_args().run_dir.absolute()
    command = [sys.executable, "-m", "atropos_verl.cli", "view", str(run_dir), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, sync_playwright() as playwright:
        assert process.stdout is not None
        url, run = process.stdout.readline().split()[1], run_dir.name
        with urllib.request.urlopen(f"{url}api/runs/{run}/rollouts?state=trained&reward_min=1&limit=1000") as answer:
            one = json.load(answer)["rollouts"][-1]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, place, scheme in (
            ("live", f"live?run={run}", "light"),
            ("rollout", f"sequence?run={run}&id={one['id']}&token={one['prompt_tokens'] + 1}", "dark"),
            ("group", f"group?run={run}&id={one['group']}", "light"),
        ):
            page = browser.new_page(viewport={"width": 1000, "height": 640}, color_scheme=scheme)
            page.goto(f"{url}#{place}")
            page.wait_for_timeout(3000)
            page.screenshot(path=DOCS / f"view-{name}.png")
        process.terminate()


if __name__ == "__main__":
    main()
