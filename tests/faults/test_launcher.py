"""The fault drill: what a launch survives, and how it ends when it cannot go on.

One run takes most faults, one after the other; ``ATROPOS_VERL_FREEZE_SECONDS`` sets how long the gateway is frozen
(20 is what is promised; less to try a change).
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.runs import LAUNCH, MAIN, SMALL, LaunchRun, checkpointed_step, refused
from support.serving import eventually

from atropos_verl.launch.probes import request_json

pytestmark = pytest.mark.slow

FREEZE_SECONDS = float(os.environ.get("ATROPOS_VERL_FREEZE_SECONDS", "20"))
DRILL_STEPS = 45
SCRIPTS = {
    "broken": "import sys\nprint('no such dataset: gsm9k')\nsys.exit(3)\n",
    "sleeper": "import time\nprint('loading a very large dataset', flush=True)\ntime.sleep(1000)\n",
    "parent": """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
subprocess.Popen([sys.executable, "-c", stubborn])                          # in the group
subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=True)  # out of it
print("has children", flush=True)
time.sleep(1000)
""",
}
ONLY = ("only=[api,environments]", "gateway.advertise_url=http://127.0.0.1:9")


def launched(directory: Path, *words: str, **options: Any) -> LaunchRun:
    return LaunchRun(words, run_dir=directory / "run", **options)


def environment(directory: Path, name: str, more: str = "") -> str:
    path = directory / f"{name}.py"
    path.write_text(SCRIPTS[name])
    return f"environments.{name}={{script: {path}{more}}}"


def test_a_run_survives_every_fault_and_says_what_happened(tmp_path: Path) -> None:
    words = [*SMALL, f"steps={DRILL_STEPS}", "save_freq=5", "supervise.stall_after=3"]
    words.append(environment(tmp_path, "broken", ", max_restarts: 1"))
    words.append(environment(tmp_path, "sleeper", ", startup_timeout: 2"))
    with launched(tmp_path, *words) as run:
        run.wait_for_trained(4)
        run.kill_and_wait_for_restart("demo")
        run.wait_for_more(3)
        said = len(run.stdout)
        run.send("demo", signal.SIGSTOP)
        run.wait_for_output("nobody asks the gateway for completions: is environment demo stuck", said)
        for script in (LAUNCH, MAIN):
            text = refused(script, f"run_dir={run.run_dir}")
            assert f"is in use by a launch, pid {run.popen.pid} on " in text
        run.send("demo", signal.SIGCONT)
        for part in (
            "what is known; the run goes on waiting:",
            "  demo: running, pid",
            "  inference gateway: in flight 0, tokens per second 0",
            "  environment demo_0: state alive, heard",  # it was killed before, and has its name again
            "  broken: failed, 1 restarts: exited with code 3",
        ):
            assert part in run.stdout[said:]
        run.wait_for_more(3)
        run.send("trainer", signal.SIGSTOP)  # and with it the gateway
        time.sleep(FREEZE_SECONDS)  # the fault itself
        run.send("trainer", signal.SIGCONT)
        run.wait_for_more(3)
        assert run.service("trainer")["restarts"] == 0, "a frozen gateway is waited for"
        before = run.state()["api"]
        run.kill_and_wait_for_restart("trajectory_api")
        after = run.state()["api"]
        run.wait_for_more(3)
        run.kill_and_wait_for_restart("trainer")
        run.must_end(0)

    numbers = [(line["step"], line["policy_version"]) for line in run.metrics()]
    assert numbers == [(n, n) for n in range(1, DRILL_STEPS + 1)]
    assert "resumed from" in run.log("trainer.2")
    for part in (
        "demo was killed by SIGKILL",
        "trainer was killed by SIGKILL",
        "broken exited with code 3 (2 deaths) and is given up; the run goes on",
        "no such dataset: gsm9k",
        "sleeper was not ready 2 s after its start: it has not registered at the API",
        "loading a very large dataset",
    ):
        assert part in run.stdout
    assert [run.service(name)["state"] for name in ("broken", "sleeper")] == ["failed", "failed"]

    assert 0 < before["totals"]["groups"] <= after["totals"]["groups"]
    assert 0 < before["current_step"] <= after["current_step"]
    api = run.state()["api"]
    handed_out = api["totals"]["groups"] - api["queue_size"]
    trained = sum(line["data/groups"] + line["data/quarantined"] for line in run.metrics())
    # A batch that the killed trainer had leased and not yet journalled stays the API's, which hands it out again.
    leased = api["open_leases"] * 16 // 4
    assert trained <= handed_out, "an accepted group was trained twice"
    assert handed_out <= trained + leased, "an accepted group was neither trained nor is it queued or leased"


def test_an_upstream_api_that_dies_and_forgets_is_survived(tmp_path: Path) -> None:
    """It comes back knowing neither trainer nor environments. An environment that did not notice and sends before the
    trainer registers would brick it for good, so all start anew, in order."""
    words = [*SMALL, "atropos.server=upstream", "steps=8", "save_freq=100", "supervise.stall_after=30"]
    with launched(tmp_path, *words) as run:
        run.wait_for_trained(3)
        run.send("trajectory_api", signal.SIGKILL)
        run.must_end(0)
        assert [line["policy_version"] for line in run.metrics()] == list(range(1, 9))
        assert "forgets everything when it dies: trainer and environments start anew" in run.stdout
        assert [run.service(name)["restarts"] for name in ("trajectory_api", "demo", "trainer")] == [1, 1, 1]
        assert "resumed from" in run.log("trainer.2"), "nothing that was trained is trained again"


def test_a_run_whose_only_environment_never_starts_ends_and_leaves_its_plan(tmp_path: Path) -> None:
    """``plan.json`` has every command with its directory and its variables; the API's, run from it, answers."""
    sleeper = environment(tmp_path, "sleeper", ", startup_timeout: 1")
    with launched(tmp_path, *ONLY, "envs=[sleeper]", sleeper) as run:
        run.must_end(1)
        assert "sleeper was not ready 1 s after its start: it has not registered at the API, and no other" in run.stderr
        assert "loading a very large dataset" in run.stderr
    plan = json.loads((run.run_dir / "plan.json").read_text())
    entry = plan["services"]["trajectory_api"]
    variables = {**os.environ, **entry["env"], "PYTHONPATH": str(LAUNCH.parents[2] / "src")}
    with subprocess.Popen(entry["command"], cwd=entry["cwd"], env=variables, stderr=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: request_json(f"{plan['api_url']}/status") is not None, "the API by hand", 60.0)
        finally:
            process.terminate()


def test_nothing_survives_a_killed_launcher(tmp_path: Path) -> None:
    """Nor do grandchildren that ignore SIGTERM or have left the process group."""
    with launched(tmp_path, *SMALL, environment(tmp_path, "parent")) as run:
        run.wait_for_trained(1)
        run.wait_until(lambda: "has children" in run.log("parent.1"), "grandchildren")
        children = psutil.Process(run.popen.pid).children(recursive=True)
        assert len(children) >= 10, "four services, four orphan reapers, two grandchildren"
        run.popen.kill()
        run.must_end(-signal.SIGKILL)


def test_one_interrupt_saves_and_the_run_can_go_on(tmp_path: Path) -> None:
    words = [*SMALL, "save_freq=1000"]
    with launched(tmp_path, *words, "steps=1000") as run:
        run.wait_for_trained(3)
        run.popen.send_signal(signal.SIGINT)
        run.must_end(130)
        saved = checkpointed_step(run.run_dir)
        assert saved == run.trained() >= 3
    with launched(tmp_path, *words, f"steps={saved + 2}") as again:
        again.must_end(0)
        assert [line["policy_version"] for line in again.metrics()] == list(range(1, saved + 3))
        assert again.log("trainer.2") and run.log("trainer.1"), "the logs of the first launch are kept"


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    with launched(tmp_path, *ONLY, "envs=[parent]", environment(tmp_path, "parent")) as run:
        run.wait_until(lambda: "has children" in run.log("parent.1"), "grandchildren")
        run.popen.send_signal(signal.SIGINT)
        run.wait_for_output("interrupt again to end at once")
        run.popen.send_signal(signal.SIGINT)
        run.must_end(130)
        assert "ended at once" in run.stdout


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """On a file system of 4 MB, in a mount namespace of its own; a checkpoint takes 13."""
    (mount := tmp_path / "small").mkdir()
    inside = f'mount -t tmpfs -o size=4m none {mount} && exec "$@"'
    prefix = ["unshare", "--mount", "--map-root-user", "sh", "-c", inside, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no private mounts")
    words = [*SMALL, "save_freq=2", "trainer_process.max_restarts=0"]
    with launched(mount, *words, prefix=prefix, cwd=tmp_path) as run:
        run.must_end(1)
        said = run.stdout + run.stderr
        assert any(words in said for words in ("No space left on device", "is full", "is the disk full?")), said


def test_two_environments_hold_their_shares(tmp_path: Path) -> None:
    """Weights 3:1 and a least share: of 30 steps of 16 sequences, 360 and 120, within a tenth."""
    with launched(tmp_path, "--config-name", "two_environments", *SMALL, "steps=30", "save_freq=-1") as run:
        run.must_end(0)
        rows = {entry["name"]: entry["env_id"] for entry in run.state()["api"]["environments"]}
        lines = run.metrics()
    trained = {name: sum(line.get(f"env/{env_id}/sequences", 0) for line in lines) for name, env_id in rows.items()}
    assert sum(trained.values()) == 30 * 16
    assert trained == pytest.approx({"words_0": 360, "short_words_0": 120}, rel=0.1)
