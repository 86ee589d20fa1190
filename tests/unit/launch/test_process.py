"""Services as real child processes: every test looks at pids and signals."""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from support.serving import eventually

from atropos_verl.errors import ServiceError
from atropos_verl.launch import process as process_module
from atropos_verl.launch.process import ManagedProcess, ServiceSpec, blot_out, describe_exit, stop_all

Patch = pytest.MonkeyPatch
PATIENCE = 20.0


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def shell(directory: Path, script: str, **changes: Any) -> ServiceSpec:
    log = directory / "logs" / "svc.log"
    return replace(ServiceSpec(name="svc", command=("sh", "-c", script), cwd=directory, log_path=log), **changes)


def started(directory: Path, script: str, **changes: Any) -> ManagedProcess:
    process = ManagedProcess(shell(directory, script, **changes))
    process.start()
    return process


def ended(directory: Path, script: str, **changes: Any) -> ManagedProcess:
    process = started(directory, script, **changes)
    eventually(lambda: not process.is_running(), "the end")
    return process


def read_pid(path: Path) -> int:
    eventually(lambda: path.is_file() and path.read_text().endswith("\n"), f"pid in {path}")
    return int(path.read_text())


def test_output_environment_directory_and_stdin_of_a_service(tmp_path: Path) -> None:
    """The log is appended to, and the tail is of this start only."""
    new = ManagedProcess(shell(tmp_path, "true"))
    assert new.pid is None and not new.is_running()
    for colour in ("red", "blue"):
        script = 'echo "to stdout $COLOUR"; echo "to stderr" >&2; pwd; wc -c'
        process = ended(tmp_path, script, env={"COLOUR": colour})
        assert process.returncode == 0
    first, second = (f"to stdout {colour}\nto stderr\n{tmp_path}\n0\n" for colour in ("red", "blue"))
    assert (tmp_path / "logs" / "svc.log").read_text() == first + second
    assert process.log_tail(9) == second.rstrip() and process.log_tail(2) == f"{tmp_path}\n0"


def test_a_child_is_no_rank_and_has_no_key_but_its_own(tmp_path: Path, monkeypatch: Patch) -> None:
    """torchrun's variables, or those that another launcher left: they would make a library of the child wait."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    for name in (*hidden, "ATROPOS_API_TOKEN", "ATROPOS_GATEWAY_KEY"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("COLOUR", "blue")
    assert ended(tmp_path, "env | grep -E '=(7|blue)$'").log_tail() == "COLOUR=blue"
    own = {"RANK": "3", "ATROPOS_API_TOKEN": "own"}
    assert ended(tmp_path, "echo $RANK $ATROPOS_API_TOKEN", env=own).log_tail() == "3 own"


def test_secrets_are_blotted_out_of_the_log_while_it_runs(tmp_path: Path) -> None:
    """Also where a line was folded within one, and in the tail; what is written meanwhile stays."""
    script = "printf 'key=0123456789abcdef\\nurl=http://run:01234567\\n89abcdef@host\\n'; "
    script += "while [ ! -e go ]; do sleep 0.02; done; printf '0123456789abcdef end\\n'; exec sleep 1000"
    process = started(tmp_path, script, secrets=("0123456789abcdef", "other"))
    log, blotted = tmp_path / "logs" / "svc.log", "key=****************\nurl=http://run:********\n********@host\n"
    eventually(lambda: process.is_running() and log.read_text() == blotted, "the first lines")
    (tmp_path / "go").touch()
    eventually(lambda: "end\n" in log.read_text(), "the last line")
    assert process.log_tail(1) == "**************** end"
    process.stop()
    assert log.read_text() == f"{blotted}**************** end\n"


def test_a_log_that_grows_too_long_moves_away(tmp_path: Path) -> None:
    fifo, log, old = tmp_path / "fifo", tmp_path / "logs" / "svc.log", tmp_path / "logs" / "svc.log.old"
    os.mkfifo(fifo)
    process = started(tmp_path, f"while read l; do echo $l; done <> {fifo}", secrets=("s3cret-key",))
    with fifo.open("w", buffering=1) as say:
        say.write("line 1 s3cret-key\nline 2 s3cret-key\n")
        eventually(lambda: "line 2" in log.read_text(), "the lines")
        process.bound_log(1000)
        assert not old.exists()
        process.bound_log(10)
        assert log.read_text() == ""
        assert old.read_text() == "line 1 **********\nline 2 **********\n"
        assert old.stat().st_mode & 0o777 == 0o600
        say.write("s3cret-key after\n")
        eventually(lambda: "after" in log.read_text(), "the line after")
        assert process.is_running()
        assert "s3cret" not in log.read_text() and process.log_tail().endswith(" after")
    process.stop()


def test_the_last_lines_have_no_escapes_and_an_end(tmp_path: Path) -> None:
    script = "for i in $(seq 1 30); do echo line $i; done; printf '\\033[31mred\\033[0m\\007\\n\\377\\n'; "
    process = ended(tmp_path, script + "head -c 700 /dev/zero | tr '\\0' x; echo; kill -9 $$")
    tail = [*(f"line {i}" for i in range(14, 31)), "red", "\ufffd", "x" * 500 + "…"]
    assert (process.returncode, process.log_tail().splitlines()) == (-9, tail)
    words = ["exited with code 0", "exited with code 3", "was killed by SIGTERM", "was killed by signal 200"]
    assert [describe_exit(code) for code in (0, 3, -15, -200)] == words
    assert describe_exit(-9) == "was killed by SIGKILL (by hand, or by the kernel for want of memory: see dmesg)"


CLEANS = "trap 'sleep 0.3; echo saved >state; exit 0' TERM; echo $$ >descendant; while true; do sleep 0.05; done"


@pytest.mark.parametrize(
    ("script", "grace", "code"),
    [
        ("sh -c 'echo $$ >descendant; exec sleep 1000' & wait", PATIENCE, -signal.SIGTERM),
        ("setsid sh -c 'echo $$ >descendant; exec sleep 1000' & wait", PATIENCE, -signal.SIGTERM),
        ("trap '' TERM; sleep 1000 & echo $! >descendant; while true; do wait; done", 0.3, -signal.SIGKILL),
        ('trap "wait; exit 0" TERM; env -i PATH="$PATH" sh cleans.sh & wait', PATIENCE, 0),
    ],
    ids=["in the group", "out of it", "deaf", "cleans up, with variables of its own"],
)
def test_stop_ends_descendants_which_may_clean_up(tmp_path: Path, script: str, grace: float, code: int) -> None:
    (tmp_path / "cleans.sh").write_text(CLEANS)
    process = started(tmp_path, script)
    descendant = read_pid(tmp_path / "descendant")
    assert (os.getpgid(descendant) == process.pid) == ("setsid" not in script)
    for _ in range(2):  # the second time there is nothing to do
        process.stop(grace)
        assert not alive(descendant)
        assert process.returncode == code
    assert (tmp_path / "state").exists() == ("cleans" in script)


def test_what_a_dead_leader_started_is_killed_at_once(tmp_path: Path) -> None:
    process = ended(tmp_path, "sleep 1000 & echo $! >grandchild; exit 5")
    grandchild = read_pid(tmp_path / "grandchild")
    eventually(lambda: not alive(grandchild), "the grandchild's end")
    assert process.returncode == 5


def test_what_cannot_be_started_is_named(tmp_path: Path) -> None:
    for changes in ({"command": ("/no/such/python", "x")}, {"cwd": Path("/gone")}):
        with pytest.raises(ServiceError, match=r"svc: No such file or directory: (/no/such/python|/gone) \(command"):
            started(tmp_path, "true", **changes)


OWNER = """
import os, sys, time
from pathlib import Path
from atropos_verl.launch.process import ManagedProcess, ServiceSpec

place = Path(sys.argv[1])
script = "sleep 1000 & echo $! >grandchild; setsid sh -c 'echo $$ >stray; exec sleep 1000' & echo $$ >service; wait"
service = ManagedProcess(ServiceSpec(name="it", command=("sh", "-c", script), cwd=place, log_path=place / "log"))
service.start()
if fork := os.fork():
    (place / "fork").write_text(f"{fork}\\n")
time.sleep(1000)
"""


def test_kill_9_of_the_owner_takes_all_but_its_fork_along(tmp_path: Path) -> None:
    """The fork holds the reaper's pipe open: it must look at the owner, not only at the pipe."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], start_new_session=True)
    pids = [read_pid(tmp_path / name) for name in ("service", "grandchild", "stray")]
    fork = read_pid(tmp_path / "fork")
    try:
        pids += [child.pid for child in psutil.Process(owner.pid).children() if child.pid not in [*pids, fork]]
        assert len(pids) == 4 and all(map(alive, pids)), "with the reaper"
        owner.kill()
        owner.wait()
        eventually(lambda: not any(map(alive, pids)), "the end of every process")
        assert alive(fork)
    finally:
        os.kill(fork, signal.SIGKILL)


def test_stop_all_asks_all_of_them_and_waits_for_all_together(tmp_path: Path) -> None:
    # On SIGTERM each waits for the others' SIGTERM: waiting for one before asking the next would end in SIGKILL.
    script = (
        "all() { [ -e a.term ] && [ -e b.term ] && [ -e c.term ]; }; "
        "trap 'echo once >>$0.term; until all; do sleep 0.02; done; exit 0' TERM; "
        "echo 1 >$0.up; while true; do sleep 0.02; done"
    )
    processes = [started(tmp_path, "", name=name, command=("sh", "-c", script, name)) for name in "abc"]
    for name in "abc":
        read_pid(tmp_path / f"{name}.up")
    stop_all(processes[::-1], grace=PATIENCE)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert [(tmp_path / f"{name}.term").read_text() for name in "abc"] == ["once\n"] * 3


def test_ctrl_c_while_stopping_kills_the_rest_at_once(tmp_path: Path, monkeypatch: Patch) -> None:
    scripts = ("exec sleep 1000", "trap '' TERM; echo $$ >deaf; while true; do sleep 0.1; done")
    processes = [started(tmp_path, script) for script in scripts]
    read_pid(tmp_path / "deaf")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(process_module, "time", Mock(wraps=time, sleep=Mock(side_effect=KeyboardInterrupt)))
        stop_all(processes, grace=900)
    assert processes[1].returncode == -9 and not any(process.is_running() for process in processes)


def test_a_log_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "it.log"
    log.write_text("key k3y")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
        assert [blot_out(log, ("k3y",), 2) for _ in range(2)] == [2, 2]
    assert [record.getMessage().startswith("keys of the run may be left in") for record in caplog.records] == [True]
    blot_out(log, ("k3y",))
    assert log.read_text() == "key ***"
