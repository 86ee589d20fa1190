"""``atropos-verl view`` as a process, and its page in a real browser.

The browser is Debian's chromium, driven by playwright (``apt-get install chromium``, ``pip install playwright``);
without them these tests are skipped. ``ATROPOS_VERL_AXE`` names axe.min.js of the npm package axe-core;
``ATROPOS_VERL_LIVE_VIEW=1`` follows a run of 30 steps.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.runs import SMALL, TrainingRun
from support.serving import post
from support.sessions import OracleEngine, open_session, session_gateway
from support.tiny_model import build_tiny_tokenizer
from support.traced_run import SCRIPT, write_run

SEQUENCE = 1 << 32
"""The first answer of step 1 of ``write_run``."""
OF_SEQUENCE = (f"sequence?id={SEQUENCE}", f"sequence?id={SEQUENCE}&token=3")
PLACES = ("live", "live?with=other", "rollouts", "rollouts?step=1", "group?id=65536", "survivors", *OF_SEQUENCE)


@contextlib.contextmanager
def serving(place: Path, *words: str, port: str = "0") -> Iterator[str]:
    """The command's address, as it printed it. It must end with 0 at Ctrl-C."""
    command = [sys.executable, "-m", "atropos_verl.cli", "view", str(place), "--port", port, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert line.startswith("view: http"), process.stderr.read()
            yield line.split()[1]
            process.send_signal(signal.SIGINT)
            assert (process.wait(30), process.stderr.read()) == (0, "")
        finally:
            process.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    write_run(place / "other", steps=3)
    write_run(place / "known", long_text=1 << 20)
    return place


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium") or pytest.skip("there is no chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@contextlib.contextmanager
def opened(browser: Any, **options: Any) -> Iterator[Any]:
    """A page whose console must stay without errors, but for those of a server that is gone."""
    with contextlib.closing(browser.new_context(**options)) as context:
        page, errors = context.new_page(), []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.set_default_timeout(60_000)
        yield page
        assert [text for text in errors if "ERR_CONNECTION_REFUSED" not in text] == []
        assert page.evaluate("window.hacked") is None


def test_the_command_prints_its_address_and_ends_at_ctrl_c(runs: Path) -> None:
    with serving(runs, "--host", "0.0.0.0") as url, httpx.Client() as client:
        address, _, token = url.partition("#token=")
        assert len(token) > 20
        assert client.get(f"{address}api/runs").status_code == 401
        request = client.build_request("GET", f"{address}api/runs/known/events")
        request.headers["authorization"] = f"Bearer {token}"
        assert next(client.send(request, stream=True).iter_lines()).startswith("id: ")


def test_a_rollout_is_found_and_read_token_by_token_by_keyboard(browser: Any, runs: Path) -> None:
    with serving(runs, "--token", "secret") as url, opened(browser) as page:

        def enter(element: Any, text: str = "") -> None:
            element.focus()
            page.keyboard.type(text)
            page.keyboard.press("Enter")

        page.goto(f"{url}&rollouts?run=known")
        enter(page.get_by_label("step", exact=True), "1")
        page.locator("tbody tr").nth(2).wait_for(state="detached")
        assert "step=1" in page.url and "secret" not in page.url
        enter(page.get_by_role("link", name="1.0.0", exact=True))
        enter(page.get_by_role("link", name="Show its tokens"))
        tokens, options = page.get_by_role("listbox"), page.locator("[role=option]")
        tokens.wait_for()
        assert options.all_inner_texts() == ["a", "b", "c", "<|im_end|>"]
        kinds = [option.get_attribute("class").replace(" at", "") for option in options.all()]
        assert kinds == ["masked", "masked", "trained", "trained unmatched"]
        tokens.focus()
        told = []
        for _ in range(3):
            page.keyboard.press("ArrowRight")
            told.append(page.locator(".details").inner_text().split("\n"))
        assert "masked" in told[0]
        about = ("advantage", "logprob", "mismatch with the trainer", "policy version")
        shown = [[text[text.index(name) + 1] for name in about] for text in told[1:]]
        assert shown == [["1", "-0.5", "-0.25", "1"], ["1", "-0.25", "0", "-"]]
        assert "unmatched: nobody is known to have generated it" in told[2]
        assert page.url.endswith("token=3")  # this place
        page.reload()
        page.locator(".at").wait_for()
        assert page.locator(".at").inner_text() == "<|im_end|>"
        page.get_by_role("link", name="Compare with its group").click()
        page.locator(".answer").nth(1).wait_for()
        assert page.locator(".answer .said").all_inner_texts() == ["ab", "c<|im_end|>", "ab", "a<|im_end|>"]


def test_hostile_content_is_text_at_every_size_and_in_every_scheme(browser: Any, runs: Path) -> None:
    axe = os.environ.get("ATROPOS_VERL_AXE")
    with serving(runs) as url:
        for scheme, width in (("light", 1280), ("dark", 400), ("light", 400), ("dark", 1280))[: 4 if axe else 2]:
            size = {"width": width, "height": 800}
            with opened(browser, color_scheme=scheme, viewport=size, bypass_csp=bool(axe)) as page:
                for place in PLACES:
                    view, _, rest = place.partition("?")
                    page.goto("about:blank")
                    page.goto(f"{url}#{view}?run=known&{rest}")
                    page.locator("main h2").first.wait_for()
                    if view == "live":
                        page.locator(".stall").wait_for()
                        said = page.locator("main").inner_text()
                        assert SCRIPT in said and "<U+202E>" in said and "<U+0000>" in said
                    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (place, width)
                    if axe:
                        page.evaluate(Path(axe).read_text())
                        found = page.evaluate("axe.run().then(r => r.violations.map(v => [v.id, v.nodes[0].html]))")
                        assert found == [], (place, scheme, width)


NESTED = """function nested(list) {
  return [...list.children].map(item => [item.firstChild.textContent.split(",")[0],
    ...[...item.querySelectorAll(":scope > ul")].flatMap(nested)]);
}"""


def test_a_sessions_turns_are_a_tree(browser: Any, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=2)
    with session_gateway(run_dir / "gateway", OracleEngine(), build_tiny_tokenizer()) as client:
        session = open_session(client, task=SCRIPT)

        def ask(*messages: dict[str, str]) -> list[dict[str, str]]:
            asked = [*messages, {"role": "user", "content": "more"}]
            body = {"messages": asked, "max_tokens": 5}
            answer = client.post(f"/s/{session['id']}/v1/chat/completions", json=body)
            return [*asked, answer.json()["choices"][0]["message"]]

        first = ask()
        for hint in ("a", "b"):
            branch = ask(*first, {"role": "user", "content": hint})
        ask(*branch)
        ask({"role": "system", "content": "another"})
        post(client, f"/sessions/{session['id']}/reward", reward=0.25)
    with serving(tmp_path) as url, opened(browser) as page:
        page.goto(f"{url}#session?run=run&id={session['id']}")
        tree = page.locator("ul.tree").first
        tree.wait_for()
        branches = [["turn 1"], ["turn 2"], ["turn 3"]]  # what continues the last of them stands below it
        assert tree.evaluate(NESTED) == [["turn 0", *branches], ["turn 4"]]
        assert "turn 3, row 1" in tree.inner_text() and "5 sampled, version 0, length" in tree.inner_text()
        said = page.locator("main").inner_text()
        assert SCRIPT in said and "finished" in said and "0.25" in said


def test_the_page_goes_on_after_the_view_was_restarted(browser: Any, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=2)
    with opened(browser) as page:
        lost = page.get_by_text("does not answer. Trying again")
        with serving(tmp_path) as url:
            page.goto(f"{url}#live?run=run")
            page.get_by_label("step 2").first.wait_for()
        lost.wait_for()
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 3, "loss": 0.25, "reward/mean": 1.0}) + "\n")
        with serving(tmp_path, port=url.rstrip("/").rpartition(":")[2]):
            page.get_by_label("step 3").first.wait_for()
            lost.wait_for(state="detached")


@pytest.mark.skipif("ATROPOS_VERL_LIVE_VIEW" not in os.environ, reason="set ATROPOS_VERL_LIVE_VIEW=1")
def test_a_run_of_30_steps_is_followed_live(browser: Any, tmp_path: Path) -> None:
    seen: set[str] = set()
    with TrainingRun(["steps=30", *SMALL], run_dir=tmp_path / "demo") as run, opened(browser) as page:
        run.wait_for_step(1)
        with serving(tmp_path) as url:
            page.goto(url)
            while not page.get_by_label("at step 30").count():
                seen.add(page.locator("#state").get_attribute("data-step") or "")
                page.wait_for_timeout(50)
            run.must_end(0)
            page.goto(f"{url}#rollouts?run=demo&state=trained&step=30")
            page.locator("tbody tr").nth(15).wait_for()  # batch_size=16
            page.get_by_role("link", name="compare", exact=False).first.click()
            page.locator(".answer").nth(3).wait_for()  # group_size=4
    assert len(seen) > 3, seen
