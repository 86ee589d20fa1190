"""Services as real child processes: every test looks at pids and signals, nothing is patched."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.serving import eventually

from atropos_verl.errors import ServiceError
from atropos_verl.launch.process import ManagedProcess, ServiceSpec, blot_out, describe_exit, stop_all

PATIENCE = 20.0


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def shell(directory: Path, script: str, **changes: Any) -> ServiceSpec:
    log = directory / "logs" / "svc.log"
    return replace(ServiceSpec(name="svc", command=("sh", "-c", script), cwd=directory, log_path=log), **changes)


def started(directory: Path, script: str) -> ManagedProcess:
    process = ManagedProcess(shell(directory, script))
    process.start()
    return process


def ended(directory: Path, script: str) -> ManagedProcess:
    process = started(directory, script)
    eventually(lambda: not process.is_running(), "the end")
    return process


def read_pid(path: Path) -> int:
    eventually(lambda: path.is_file() and path.read_text().endswith("\n"), f"pid in {path}")
    return int(path.read_text())


def test_output_environment_directory_and_stdin_of_a_service(tmp_path: Path) -> None:
    """The log is appended to, and the tail is of this start only."""
    for colour in ("red", "blue"):
        script = 'echo "to stdout $COLOUR"; echo "to stderr" >&2; pwd; wc -c'
        process = ManagedProcess(shell(tmp_path, script, env={"COLOUR": colour}))
        assert process.pid is None and not process.is_running()
        process.start()
        eventually(lambda process=process: not process.is_running(), "the end")  # type: ignore[misc]
        assert process.returncode == 0
    first, second = (f"to stdout {colour}\nto stderr\n{tmp_path}\n0\n" for colour in ("red", "blue"))
    assert (tmp_path / "logs" / "svc.log").read_text() == first + second
    assert process.log_tail(9) == second.rstrip() and process.log_tail(2) == f"{tmp_path}\n0"


def test_a_child_is_no_rank_and_has_no_key_but_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's variables, or those that another launcher left: they would make a library of the child wait."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    for name in (*hidden, "ATROPOS_API_TOKEN", "ATROPOS_GATEWAY_KEY"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("COLOUR", "blue")
    assert ended(tmp_path, "env | grep -E '=(7|blue)$'").log_tail() == "COLOUR=blue"
    script, given = "echo $RANK $ATROPOS_API_TOKEN", {"RANK": "3", "ATROPOS_API_TOKEN": "own"}
    chosen = ManagedProcess(shell(tmp_path, script, env=given))
    chosen.start()
    eventually(lambda: not chosen.is_running(), "the end")
    assert chosen.log_tail() == "3 own"


def test_the_tail_has_no_terminal_escapes_and_no_endless_line(tmp_path: Path) -> None:
    script = "printf '\\033[31mred\\033[0m\\007\\n'; head -c 700 /dev/zero | tr '\\0' x; echo; printf '\\377\\n'"
    assert ended(tmp_path, script).log_tail() == "red\n" + "x" * 500 + "…\n\ufffd"


def test_secrets_are_blotted_out_of_the_log_while_it_runs(tmp_path: Path) -> None:
    """Also where a line was folded within one, and in the tail; what is written meanwhile stays."""
    secret = "0123456789abcdef"
    script = "printf 'key=0123456789abcdef\\nurl=http://run:01234567\\n89abcdef@host\\n'; "
    script += "while [ ! -e go ]; do sleep 0.02; done; printf '0123456789abcdef end\\n'; exec sleep 1000"
    process = ManagedProcess(shell(tmp_path, script, secrets=(secret, "other")))
    process.start()
    log, blotted = tmp_path / "logs" / "svc.log", "key=****************\nurl=http://run:********\n********@host\n"
    eventually(lambda: process.is_running() and log.read_text() == blotted, "the first lines")
    (tmp_path / "go").touch()
    eventually(lambda: "end\n" in log.read_text(), "the last line")
    assert process.log_tail(1) == "**************** end"
    process.stop()
    assert log.read_text() == f"{blotted}**************** end\n"


def test_a_log_that_grows_too_long_moves_away_while_the_service_goes_on(tmp_path: Path) -> None:
    spec = shell(tmp_path, "while read line; do echo $line; done", secrets=("s3cret-key",))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    process = ManagedProcess(replace(spec, command=("sh", "-c", f"while read l; do echo $l; done <> {fifo}")))
    process.start()
    log, old = tmp_path / "logs" / "svc.log", tmp_path / "logs" / "svc.log.old"
    try:
        with fifo.open("w", buffering=1) as say:
            for number in range(3):
                say.write(f"line {number} s3cret-key\n")
                eventually(lambda number=number: f"line {number}" in log.read_text(), "the line")  # type: ignore[misc]
                process.bound_log(1000)
                assert not old.exists()
            process.bound_log(10)
            assert log.read_text() == ""
            assert old.read_text().count("line") == 3 and "s3cret" not in old.read_text()
            assert old.stat().st_mode & 0o777 == 0o600
            say.write("s3cret-key after\n")
            eventually(lambda: "after" in log.read_text(), "the line after")
            assert process.is_running()
            assert "s3cret" not in log.read_text() and process.log_tail().endswith(" after")
    finally:
        process.stop()


def test_the_last_lines_of_what_was_killed(tmp_path: Path) -> None:
    process = started(tmp_path, "for i in $(seq 1 30); do echo line $i; done; exec sleep 1000")
    log = tmp_path / "logs" / "svc.log"
    eventually(lambda: "line 30\n" in log.read_text(), "the log")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    eventually(lambda: not process.is_running(), "the end")
    assert (process.returncode, process.log_tail()) == (-9, "\n".join(f"line {i}" for i in range(11, 31)))
    words = ["exited with code 0", "exited with code 3", "was killed by SIGTERM", "was killed by signal 200"]
    assert [describe_exit(code) for code in (0, 3, -15, -200)] == words
    assert describe_exit(-9) == "was killed by SIGKILL (by hand, or by the kernel for want of memory: see dmesg)"


@pytest.mark.parametrize("prefix", ["", "setsid "], ids=["in the group", "out of it"])
def test_stop_ends_descendants(tmp_path: Path, prefix: str) -> None:
    process = started(tmp_path, f"{prefix}sh -c 'echo $$ >descendant; exec sleep 1000' & wait")
    descendant = read_pid(tmp_path / "descendant")
    assert (os.getpgid(descendant) == process.pid) == (prefix == "")
    process.stop()
    assert not alive(descendant)
    assert process.returncode == -signal.SIGTERM
    process.stop()  # again: nothing to do
    assert process.returncode == -signal.SIGTERM


def test_a_service_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    script = "trap '' TERM; sleep 1000 & echo $! >grandchild; while true; do wait; done"
    process = started(tmp_path, script)
    grandchild = read_pid(tmp_path / "grandchild")  # inherits the ignored SIGTERM
    process.stop(grace=0.3)
    assert process.returncode == -signal.SIGKILL
    assert not alive(grandchild)


def test_sigterm_leaves_time_to_clean_up_also_to_a_descendant_with_variables_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "own.sh").write_text(
        "trap 'sleep 0.3; echo saved >state; exit 0' TERM; echo $$ >descendant; while true; do sleep 0.05; done"
    )
    process = started(tmp_path, 'trap "wait; exit 0" TERM; env -i PATH="$PATH" sh own.sh & wait')
    descendant = read_pid(tmp_path / "descendant")
    assert os.getpgid(descendant) == process.pid != descendant
    process.stop(grace=PATIENCE)
    assert (tmp_path / "state").read_text() == "saved\n"
    assert process.returncode == 0
    assert not alive(descendant)


def test_when_the_leader_dies_what_it_started_is_killed_at_once(tmp_path: Path) -> None:
    process = ended(tmp_path, "sleep 1000 & echo $! >grandchild; exit 5")
    grandchild = read_pid(tmp_path / "grandchild")
    eventually(lambda: not alive(grandchild), "the grandchild's end")
    assert process.returncode == 5


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"command": ("/no/such/python", "x")}, "/no/such/python"), ({"cwd": Path("/gone")}, "/gone")],
)
def test_what_cannot_be_started_is_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ServiceError, match=rf"cannot start svc: No such file or directory: {named} \(command"):
        ManagedProcess(shell(tmp_path, "true", **changes)).start()


OWNER = """
    import sys, threading, time
    from pathlib import Path
    from atropos_verl.launch.process import ManagedProcess, ServiceSpec, stop_all

    directory = Path(sys.argv[1])
    script = "sleep 1000 & echo $! >{name}.grandchild; setsid sh -c 'echo $$ >{name}.stray; exec sleep 1000' & wait"
    services = []

    def start(name, script):
        log, command = directory / f"{name}.log", ("sh", "-c", script)
        services.append(ManagedProcess(ServiceSpec(name=name, command=command, cwd=directory, log_path=log)))
        services[-1].start()

    for name in ("api", "env"):
        start(name, script.format(name=name))
    (directory / "pids").write_text(" ".join(str(service.pid) for service in services))
    (directory / "ready").write_text("1\\n")
    while not (directory / "go").exists():
        time.sleep(0.01)
    BODY
"""


def run_owner(tmp_path: Path, body: str) -> tuple[subprocess.Popen[bytes], list[int]]:
    code = textwrap.dedent(OWNER).replace("BODY", body)
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], start_new_session=True)
    read_pid(tmp_path / "ready")
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    for name in ("api", "env"):
        pids += [read_pid(tmp_path / f"{name}.grandchild"), read_pid(tmp_path / f"{name}.stray")]
    assert len(pids) == 6
    assert all(alive(pid) for pid in pids)
    (tmp_path / "go").touch()
    return owner, pids


def test_an_owner_that_forgets_to_stop_leaves_nothing(tmp_path: Path) -> None:
    owner, pids = run_owner(tmp_path, "sys.exit(0)")
    assert owner.wait(timeout=PATIENCE) == 0
    eventually(lambda: not any(alive(pid) for pid in pids), "the end of every process")


@pytest.mark.parametrize("forks", [False, True], ids=["alone", "forked"])
def test_kill_9_of_the_owner_takes_everything_along(tmp_path: Path, forks: bool) -> None:
    # A forked copy of the owner holds the reapers' pipes open: they must look at the owner, not only at the pipe.
    body = "import os; fork = os.fork(); fork and (directory / 'fork').write_text(f'{fork}\\n'); time.sleep(1000)"
    owner, pids = run_owner(tmp_path, body if forks else "threading.Event().wait()")
    fork = [read_pid(tmp_path / "fork")] if forks else []
    try:
        reapers = [child.pid for child in psutil.Process(owner.pid).children() if child.pid not in [*pids, *fork]]
        assert len(reapers) == 2
        owner.kill()
        owner.wait(timeout=PATIENCE)
        eventually(lambda: not any(alive(pid) for pid in [*pids, *reapers]), "the end of every process")
        assert all(alive(pid) for pid in fork)
    finally:
        for pid in fork:
            os.kill(pid, signal.SIGKILL)


def test_stop_all_asks_all_of_them_and_waits_for_all_together(tmp_path: Path) -> None:
    # On SIGTERM each waits for the others' SIGTERM: waiting for one before asking the next would end in SIGKILL.
    script = (
        "all() { [ -e a.term ] && [ -e b.term ] && [ -e c.term ]; }; "
        "trap 'echo once >>$0.term; until all; do sleep 0.02; done; exit 0' TERM; "
        "echo 1 >$0.up; while true; do sleep 0.02; done"
    )
    specs = (shell(tmp_path, script, name=name, command=("sh", "-c", script, name)) for name in ("a", "b", "c"))
    processes = list(map(ManagedProcess, specs))
    for process in processes:
        process.start()
        read_pid(tmp_path / f"{process.spec.name}.up")
    stop_all(processes[::-1], grace=PATIENCE)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert [(tmp_path / f"{name}.term").read_text() for name in "abc"] == ["once\n"] * 3
    stop_all(processes)


DEAF = """
import os, signal, threading
script = "trap '' TERM; echo $$ >deaf; while true; do sleep 0.1; done"
start("deaf", script)
while not (directory / "deaf").is_file():
    time.sleep(0.01)


def interrupt():
    while not all(service._leader_has_ended() for service in services[:2]):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


threading.Thread(target=interrupt).start()
try:
    stop_all(services, grace=900)
except KeyboardInterrupt:
    (directory / "result").write_text(f"interrupted {[service.returncode for service in services]}")
"""


def test_ctrl_c_while_stopping_kills_the_rest_at_once(tmp_path: Path) -> None:
    owner, pids = run_owner(tmp_path, DEAF)
    deaf = read_pid(tmp_path / "deaf")
    assert owner.wait(timeout=PATIENCE) == 0
    assert (tmp_path / "result").read_text() == "interrupted [-15, -15, -9]"
    assert not any(alive(pid) for pid in [*pids, deaf])


def test_a_log_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "it.log"
    log.write_text("key k3y")

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        assert [blot_out(log, ("k3y",), 2) for _ in range(2)] == [2, 2]
    assert [record.getMessage().startswith("keys of the run may be left in") for record in caplog.records] == [True]
    blot_out(log, ("k3y",))
    assert log.read_text() == "key ***"
