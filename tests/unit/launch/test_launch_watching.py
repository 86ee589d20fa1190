"""What a launch sees and does: probes, restarts, evaluations, steps, the diagnosis and the view."""

import io
import itertools
import json
import socket
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from rich.console import Console
from support import http_faults
from support.fake_engine import FakeEngine
from support.http_faults import FaultServer, refused_url
from support.serving import eventually
from support.tiny_model import build_tiny_tokenizer
from support.trajectory_server import Clock

from atropos_verl.config.launch_schema import LaunchConfig
from atropos_verl.config.schema import RunConfig, SuperviseConfig
from atropos_verl.engine.protocol import RequestGate
from atropos_verl.gateway.service import GatewayService
from atropos_verl.gateway.text import TextCodec
from atropos_verl.launch import evaluation, probes
from atropos_verl.launch.plan import LaunchPlan
from atropos_verl.launch.probes import LogFacts, Poller, StepWatch
from atropos_verl.launch.process import ServiceSpec
from atropos_verl.launch.supervisor import Supervisor, WatchedService
from atropos_verl.report.console import LaunchView

Patch = pytest.MonkeyPatch


def shell(directory: Path, script: str, name: str = "words", **changes: Any) -> ServiceSpec:
    log = directory / f"{name}.1.log"
    return replace(ServiceSpec(name=name, command=("sh", "-c", script), cwd=directory, log_path=log), **changes)


def test_a_free_port_is_kept_for_who_is_told_of_it() -> None:
    for host in ("127.0.0.1", "localhost"):
        port = probes.free_port(host)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((host, port))  # as one to whom the system gave it
        with socket.create_server((host, port)):
            pass
    with pytest.raises(OSError, match="assign requested address"):
        probes.free_port("192.0.2.1")


def test_only_2xx_is_an_answer_and_no_proxy_asked(fault_server: FaultServer, monkeypatch: Patch) -> None:
    answers = [http_faults.answer({"a": 1}), http_faults.answer(b"plain")]
    failures = [http_faults.error(404), http_faults.error(503), http_faults.garbage(), http_faults.silent()]
    fault_server.script("/x", *answers, *failures)
    with refused_url() as nobody:
        monkeypatch.setenv("http_proxy", nobody)
        monkeypatch.delenv("no_proxy", raising=False)
        assert [probes.request_json(f"{fault_server.url}/x", timeout=30.0) for _ in answers] == [{"a": 1}, "plain"]
        assert [probes.request_json(f"{fault_server.url}/x", timeout=0.5) for _ in failures] == [None] * 4
        assert probes.request_json(nobody) is probes.request_json("http://no-such-host.invalid/", timeout=0.5) is None


def answering(monkeypatch: Patch, *answers: Any) -> None:
    endless = itertools.chain(answers, itertools.repeat(answers[-1]))
    monkeypatch.setattr(probes, "request_json", lambda *_, **__: next(endless))


def test_a_batch_that_was_handed_out_is_seen_before_its_step(monkeypatch: Patch) -> None:
    poller = Poller(RunConfig(), None)
    answering(monkeypatch, *(step and {"current_step": step} for step in (3, 3, None, 4, 5)))
    seen = [(poller.ask_api(), poller.batch_at > 0)[1] for _ in range(5)]
    assert seen == [False, False, False, False, True], "what happened while it did not answer is not known"


def test_a_gateway_that_pauses_has_got_a_batch(monkeypatch: Patch) -> None:
    """Symptom: a first step of 48 s was called a stall, since the API had not answered when its batch was taken."""
    poller, seen = Poller(RunConfig(), "http://g", generates=False), []
    for paused in (True, False, True, True):
        answering(monkeypatch, {"paused": paused, "policy_version": 0})
        poller._ask_gateway()
        seen.append(poller.batch_at)
    assert seen[:2] == [0.0, 0.0] and seen[2] == seen[3] > 0.0


def test_a_strange_answer_does_not_end_the_watching(monkeypatch: Patch) -> None:
    monkeypatch.setattr(probes, "_INTERVAL", 0.01)
    poller = Poller(RunConfig(), None)
    answering(monkeypatch, {"current_step": 1}, {"current_step": "many"}, {"current_step": 2})
    poller.start()
    eventually(lambda: poller.api == {"current_step": 2}, "the answer after a strange one")
    poller.stop()


def test_entries_of_a_process_are_found_by_its_name_alone() -> None:
    names = {"words_0": "disconnected", "words_1": "alive", "words-2_0": "alive", "words_short_0": "alive"}
    status = {"environments": [{"name": name, "state": state} for name, state in names.items()]}
    assert [row["name"] for row in probes.connected_entries(status, "words")] == ["words_1"]
    assert [row["name"] for row in probes.connected_entries(status, "words-2")] == ["words-2_0"]
    assert probes.connected_entries({"current_step": 1}, "words") == []


def test_the_gateways_counters_are_read() -> None:
    text = TextCodec(build_tiny_tokenizer(), frozenset())
    service = GatewayService(FakeEngine(), text, "tiny", RequestGate(), None, None)
    service.answered.update({("/generate", 200): 5, ("/generate", 400): 2, ("/v1/completions", 401): 1, ("/x", 499): 9})
    found = probes._counters(generate_latest(service).decode())
    names = ("requests_total", "served_total", "refused_total", "generated_tokens_total")
    assert [found[name] for name in names] == [17.0, 5.0, 3.0, 0.0]


def test_tokens_count_when_sampled_and_our_own_request_does_not(monkeypatch: Patch) -> None:
    poller = Poller(RunConfig(), None)
    clock = iter(range(5, 14))
    monkeypatch.setattr("atropos_verl.launch.probes.time.monotonic", lambda: float(next(clock)))
    seen = []
    for sampled in (10.0, 50.0, 50.0):  # two looks within one step of the engine: it goes on
        poller._count({"sampled_tokens_total": sampled, "generated_tokens_total": 0.0, "served_total": sampled})
        seen.append((poller.tokens_per_second, poller.served))
        poller.generated_at = 1.0
    assert seen == [(None, 10), (40.0, 49), (20.0, 49)]
    poller.expect_new_gateway()
    for _ in range(2):
        poller._count({"generated_tokens_total": 0.0})
    assert poller.tokens_per_second is None, "an engine that counts when answers end is not known to stand still"


DIES, CANNOT_START = (7, True, 0.0, False), (3, False, 0.0, False)
"""Exit code, was it ready, how long it had lived, is another service to blame."""


@pytest.mark.parametrize(
    ("restarts", "deaths", "delays"),
    [
        (3, [DIES] * 4, [1.0, 2.0, 3.0, None]),  # it doubles up to its bound
        (1, [DIES, (7, True, 60.0, False), (7, True, 0.0, True), DIES], [1.0, 1.0, 1.0, None]),  # a long life forgives
        (0, [(0, True, 0.0, True)], [None]),
        (3, [CANNOT_START] * 2, [1.0, None]),
        (3, [CANNOT_START, (4, False, 0.0, False), (4, False, 0.0, False)], [1.0, 2.0, None]),
        (3, [(0, False, 0.0, False)] * 4, [1.0, 2.0, 3.0, None]),
    ],
)
def test_a_service_is_restarted_ever_later_and_then_given_up(
    tmp_path: Path, restarts: int, deaths: list[tuple[int, bool, float, bool]], delays: list[float | None]
) -> None:
    clock, policy = Clock(), SuperviseConfig(backoff=1.0, max_backoff=3.0, healthy_after=50.0)
    (tmp_path / "words.1.log").write_text("of the launch before")
    spec = shell(tmp_path, "echo now; exit $(cat code)", restarts=restarts, kind="environment")
    service = WatchedService(spec, policy, clock)
    for (code, is_ready, lived, excused), delay in zip(deaths, delays, strict=True):
        (tmp_path / "code").write_text(str(code))
        assert service.is_due
        service.start()
        if is_ready:
            service.set_ready()
        eventually(service.has_died, "its death")
        nothing = "ended with code 0 without having registered (does it end with MyEnv.cli()?)"
        assert service.death() == (nothing if not code and not is_ready else f"exited with code {code}")
        clock.pass_(lived)
        assert (service.returncode, service.plan_restart(excused=excused)) == (code, delay)
        assert (service.state, service.is_due) == ("failed" if delay is None else "restarting", False)
        clock.pass_(delay or 0.0)
    assert (service.starts, service.deaths, service.has_future) == (len(deaths), len(deaths), False)
    assert service.cannot_start == (not is_ready and code > 0)
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.log")}
    assert logs.pop("words.1.log") == "of the launch before"
    assert logs == {f"words.{number}.log": "now\n" for number in range(2, len(deaths) + 2)}


def evaluations(run_dir: Path, label: str, timeout: float, *planned: Any, note: Any = print) -> Any:
    options: dict[str, Any] = {"timeout": timeout, "note": note, "check": lambda: None}
    return evaluation.EvaluationProcesses({label: [*planned]}, run_dir, **options)


def test_an_evaluation_that_takes_too_long_is_ended_and_told_of(tmp_path: Path) -> None:
    spec = shell(tmp_path, "echo task 7; exec sleep 1000", "evaluate_before")
    notes: list[str] = []
    (tmp_path / "eval").touch()  # nor does a disk that takes no progress.json end it
    planned = evaluation.PlannedEvaluation("words", 1.0, spec, tmp_path / "metrics.json")
    processes = evaluations(tmp_path, "before", 0.0, planned, note=notes.append)
    processes.start_evaluation("before")
    eventually(lambda: spec.log_path.read_text() == "task 7\n", "its first line")
    eventually(lambda: not processes.is_evaluating("before"), "the timeout")
    assert processes.finish_evaluation("before") == {}
    assert notes == [f"evaluate_before took longer than eval.timeout=0 s; its log {spec.log_path} ends: task 7"]


def test_evaluations_between_steps_keep_their_results_apart(tmp_path: Path) -> None:
    """One plan serves them all; what it wrote moves to a directory of the step."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "progress.json").write_text('{"running": "before", "scores": {"step_5": {"words": 0.5}}}')
    watch, told, planned = evaluation.EvaluationWatch(tmp_path), list[str](), []
    assert (watch.poll(), watch.running) == ([], None), "an earlier run was killed in it"
    for name, weight, score in (("words", 3.0, 0.5), ("sums", 1.0, 1.0)):
        place, result = tmp_path / "eval" / "during" / name, {"results": {"all": {"mean_reward": score}}}
        spec = shell(tmp_path, f"mkdir -p {place}; echo '{json.dumps(result)}' > {place}/metrics.json", name)
        planned.append(evaluation.PlannedEvaluation(name, weight, spec, place / "metrics.json"))
    processes = evaluations(tmp_path, "during", 30.0, *planned)
    for _ in range(2):  # after a resume a step is evaluated again
        processes.start_evaluation("step_5")
        eventually(lambda: not processes.is_evaluating("step_5"), "the evaluation to end")
        assert "evaluating on held-out tasks at step 5" in watch.poll()
        found = processes.finish_evaluation("step_5")
        assert found == {"mean_reward": 0.625, "words/score": 0.5, "sums/score": 1.0}
        told += watch.poll()
    assert told == ["held-out mean reward at step 5: words 0.500, sums 1.000"]
    assert sorted(path.name for path in (tmp_path / "eval" / "step_5").iterdir()) == ["sums", "words"]
    assert not (tmp_path / "eval" / "during").exists()


def line(step: int) -> str:
    return json.dumps({"step": step, "policy_version": step, "loss": 0.5, "reward/mean": step / 10}) + "\n"


def test_each_step_is_news_once_also_in_a_resumed_run(tmp_path: Path) -> None:
    def news() -> list[int]:
        return [entry["step"] for entry in watch.poll()]

    path, clock = tmp_path / "metrics.jsonl", Clock()
    watch = StepWatch(path, clock)
    assert news() == []
    path.write_text(line(1) + line(2) + line(3)[:12])
    assert (news(), watch.step, watch.last_at) == ([1, 2], 2, clock())
    clock.pass_(5.0)
    with path.open("a") as file:
        file.write(line(3)[12:])
    assert (news(), news(), watch.last_at) == ([3], [], clock())
    watch = StepWatch(path, clock)
    assert news() == [], "steps of the launch before are no news"
    assert (watch.step, list(watch.rewards)) == (3, [0.1, 0.2, 0.3])
    (tmp_path / "new").write_text(line(1) + line(2))  # what a trainer that resumes at 2 does
    (tmp_path / "new").replace(path)
    assert (news(), watch.step) == ([], 2)
    with path.open("a") as file:
        file.write(line(3))
    assert (news(), list(watch.rewards)) == ([3], [0.1, 0.2, 0.3])


WORDS = {"name": "words", "kind": "environment", "state": "running", "pid": 12, "restarts": 1, "detail": "",
         "seconds": 5.0, "log": "/run/logs/words.2.log"}  # fmt: skip
TRAINER = {**WORDS, "name": "trainer", "kind": "trainer", "pid": 13, "restarts": 0, "seconds": 50.0}
ROW = {"env_id": 1, "name": "words_1", "state": "alive", "heard_seconds_ago": 0.3, "groups": 9,
       "waiting_sequences": 8, "refused": 2, "min_batch_allocation": 0.75}  # fmt: skip
API = {"current_step": 3, "queue_size": 2, "queue_sequences": 8, "open_leases": 1, "refused": {"invalid": 2},
       "environments": [{**ROW, "name": "words_0", "state": "disconnected"}, ROW]}  # fmt: skip


def state(**changes: Any) -> dict[str, Any]:
    base = {
        "run_dir": "/run",
        "seconds": 60.0,
        "steps": 40,
        "batch_size": 16,
        "api_url": "http://a",
        "gateway_url": "http://g",
        "services": [WORDS, TRAINER],
        "api": API,
        "gateway": {"in_flight": 0, "policy_version": 3, "paused": False},
        "rates": {"tokens_per_second": 0.0, "requests_per_second": 0.0},
        "recent": [json.loads(line(3))],
        "rewards": [0.1, 0.2, 0.3],
        "seconds_since_step": 31.0,
    }
    return {**base, **changes}


def test_the_diagnosis_says_what_is_known() -> None:
    errors = {"words": Counter({"Error in collect_trajectories: 'x'": 7, "other": 2})}
    since = {"served": 5, "refused": 0, "refused_groups": 0, "groups": 0}
    facts = LogFacts(errors, ["a: refused: b"], ["c refused: d"], endings={"words": "the last line"})
    found = probes.diagnose(state(since=since), 30.0, facts)
    assert found.splitlines() == [
        "no batch for 30 s: environment words fails in its own code: Error in collect_trajectories: 'x' (7 times)",
        "  what to change: correct the environment, or ask less of the model; its log has more",
        "  what is known; the run goes on waiting:",
        "  words: running, pid 12, 1 restarts",
        "    7 x Error in collect_trajectories: 'x'",
        "    2 x other",
        "    its log: /run/logs/words.2.log, which ends: the last line",
        "  trainer: running, pid 13, 0 restarts",
        "  trajectory API: current step 3, queue size 2, open leases 1, refused {'invalid': 2}",
        "  environment words_1: state alive, heard seconds ago 0.3, groups 9, waiting sequences 8, refused 2, "
        "min batch allocation 0.75",
        "    c refused: d",
        "  inference gateway: in flight 0, tokens per second 0, requests per second 0, served 5, refused 0, "
        "policy version 3, paused False",
        "    a: refused: b",
        "  all logs: /run/logs",
    ]
    upstream = probes.diagnose(state(api={"current_step": 3, "queue_size": 1}), 30.0, LogFacts())
    assert "  environments: this API does not say who sent what" in upstream


LONG = "/generate: a client was refused: This model's maximum context length is 64 tokens"
NO_KEY = "refused at /x: missing or wrong API key"
BAD, SENT = "/scored_data refused: masks[0]: 22 entries", "Client error: 422, not retrying"
A, B = ({**WORDS, "name": name, "restarts": 0} for name in "ab")
FAILED = {**A, "state": "failed", "detail": "x"}
SAMPLED = {"tokens_per_second": 8.0}


@pytest.mark.parametrize(
    ("changes", "log", "cause"),
    [
        ({"api": None}, {}, "the trajectory API at http://a does not answer"),
        ({"gateway": None}, {}, "the trainer's gateway does not answer"),
        ({}, {}, "nobody asks the gateway for completions: is environment words stuck; none of its requests has come?"),
        ({"gateway": {"paused": True}}, {}, "the gateway is paused"),
        ({"gateway": {"in_flight": 4}}, {}, "requests are in flight but no token"),
        ({"gateway": {"in_flight": 4}, "rates": {}}, {}, "requests are in flight but no answer ends: they are long, "),
        ({"rates": SAMPLED}, {}, "the policy is being sampled, but environment words sends no"),
        ({"rates": SAMPLED}, {"Error loading": 1}, "words sends no group after 40 answers"),  # an accident at its start
        ({"api": {"queue_size": 4, "queue_sequences": 16}}, {}, "16 sequences wait at the API but make no batch of 16"),
        ({"services": [FAILED]}, {}, "environment a was given up: x"),
        ({"services": [B, A]}, {"boom": 5}, "environment b sends no group; its log says: boom (5 times)"),
        ({"since": {"groups": 3, "refused_groups": 1}}, {}, "nobody asks the gateway"),  # more groups came
        ({}, {"No valid items": 36}, "environment words sends no group; its log says: No valid items (36 times)"),
        ({"since": {}}, {"APIConnectionError": 5}, "words cannot reach what it asks: APIConnectionError (5 times)"),
        ({"since": {}, "of_gateway": NO_KEY}, {"ClientResponseError": 9}, "9 refused, missing or wrong API key"),
        ({"since": {"refused": 9}, "of_gateway": LONG}, {}, "too long: the gateway refuses every request: 9 refused"),
        ({"since": {"refused_groups": 6}, "of_api": BAD}, {SENT: 6}, "words: 6 refused, masks[0]: 22 entries"),
        ({}, {SENT: 26}, "words: 26 refused, (it does not say why)"),  # upstream's API counts nothing
        # Two refusals at its start do not hide 304 drops.
        ({"since": {"served": 40, "refused": 2}}, {"Scores are the same": 304}, "scores of a group are equal (304"),
        ({}, {"Token length is too long": 9}, "drops every group, since a sequence of it has --env.max_token_length"),
        # The environment's own judge refuses it; the gateway once refused somebody else.
        ({"of_gateway": LONG}, {"openai.AuthenticationError: 401": 9}, "fails in its own code: openai.Authentication"),
    ],
)
def test_the_first_line_names_the_cause(changes: dict[str, Any], log: dict[str, int], cause: str) -> None:
    """``log``: of the first service. With one, the environment had 40 answers where nothing else is said."""
    made = state(**{"since": {"served": 40 if log else 0}, **changes})
    gateway, api = ([changes[of]] if of in changes else [] for of in ("of_gateway", "of_api"))
    text = probes.diagnose(made, 30.0, LogFacts({made["services"][0]["name"]: Counter(log)}, gateway, api))
    first, remedy = text.splitlines()[:2]
    assert first.startswith("no batch for 30 s: ") and cause in first and remedy.startswith("  what to change: ")


def test_error_lines_are_counted_without_what_varies() -> None:
    log = """\
2026-11-28 22:00:01,123 DEBUG error: not this one
ERROR:root:Error in collect_trajectories: RetryError[<Future at 0x7f2a57 raised BadRequestError>]
ERROR:root:Error in collect_trajectories: RetryError[<Future at 0x7f2b00 raised BadRequestError>]
2026-11-28 22:00:01,123 ERROR Error in scoring: {'question': 'a'}
ERROR:root:Error in scoring: {'question': 'b'}
2026-11-29 00:14:49,124 - LetterEnv - WARNING - No valid items scored for 'a'
Scores are the same in a group, skipping...
ValueError: no such dataset
INFO:atroposlib.envs.base:all is well
INFO - mean squared error: 0.12
2026-11-29 00:14:49,124 - LetterEnv - INFO - error rate: 0.12
"""
    assert probes.common_errors(log) == {
        "Error in collect_trajectories: RetryError[<Future at 0x7f2a57 raised BadRequestError>]": 2,
        "Error in scoring: {'question': 'a'}": 2,
        "No valid items scored for 'a'": 1,
        "Scores are the same in a group, skipping...": 1,
        "ValueError: no such dataset": 1,
    }
    api = 3 * "2026-11-28 22:39:25,594 WARNING atropos_verl.server.app: /y refused: scores: empty\n"
    gateway = "2026-11-28 22:39:25,594 WARNING a.b: /x: a client was refused: n: 0\n"
    assert probes.last_refusals(api + gateway) == ["/x: a client was refused: n: 0", "/y refused: scores: empty"]


def supervisor(run_dir: Path, *services: ServiceSpec, **changes: Any) -> Supervisor:
    (run_dir / "config.json").touch()  # the model's
    settings = {"config": RunConfig(model={"path": str(run_dir)}), "launch": LaunchConfig(), "evaluations": {}}
    plan = LaunchPlan(run_dir=run_dir, probe_url=None, services=services, **{**settings, **changes})
    return Supervisor(plan, print)


def test_an_earlier_run_in_the_same_directory_is_not_blamed(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    for name in ("environment", "api", "trainer"):
        (logs / f"{name}.log").write_text("2026-11-28 22:39:25,594 WARNING a.b: /x refused: old\n" * 700)
    script = "echo '2026-11-29 22:39:25,594 ERROR a.b: /x refused: new\n]'"
    kinds = ("api", "environment")
    services = [shell(tmp_path, script, kind, kind=kind, log_path=logs / f"{kind}.log") for kind in kinds]
    watching = supervisor(tmp_path, *services)
    for service in watching.services:
        watching._start(service)
        eventually(service.has_died, "the process has died")
    facts = watching._facts()
    assert facts.errors == {"environment": {"/x refused: new": 1}}
    assert (facts.api, facts.gateway) == (["/x refused: new"], [])
    assert facts.endings["environment"].endswith("/x refused: new"), "not the lone bracket after it"


def test_no_batch_is_missed_while_an_evaluation_is_waited_for(tmp_path: Path, monkeypatch: Patch) -> None:
    """Symptom: the demo of SmolLM2 was told of a stall as soon as the evaluation before training was over."""
    clock, silent = Clock(), []
    monkeypatch.setattr("atropos_verl.launch.supervisor.time.monotonic", clock)
    watching = supervisor(tmp_path, trains_here=True)
    watching._poller.generated_at = clock()
    for evaluation_running in (None, "before", None):
        watching._evaluations.running = evaluation_running
        clock.pass_(100.0)
        silent.append(watching._silent_seconds())
    assert silent == [100.0, 0.0, 100.0]


def test_counters_that_begin_at_0_again_are_believed(tmp_path: Path) -> None:
    """API or trainer was restarted since the last batch."""
    watching = supervisor(tmp_path)
    watching._counted = {"served": 40, "refused": 4}
    watching._poller.served, watching._poller.refused = 30, 9
    assert watching.state()["since"] == {"groups": 0, "refused_groups": 0, "served": 30, "refused": 5}


def test_a_live_table_on_a_terminal_and_plain_lines_elsewhere() -> None:
    long, texts = {**WORDS, "state": "failed", "detail": "words was not ready " + 200 * "x"}, []
    for is_terminal in (False, True):
        console = Console(force_terminal=is_terminal, width=80, record=True, file=io.StringIO(), _environ={})
        with LaunchView(console) as view:
            view.note("starting words [not markup]")
            view.step(json.loads(line(3)), state())
            view.update(state(services=[long, TRAINER]))
        texts.append(console.export_text())
    step = "step 3/40  reward 0.300  loss 0.5000  - tok/s  rollout -s  train -s  sync -s  weights v3"
    assert texts[0].splitlines() == ["starting words [not markup]", step]
    assert "service" in texts[1]
    console.print(view._frame())
    rows = console.export_text().splitlines()
    assert rows[0].split() == ["service", "state", "pid", "up", "restarts"]
    assert rows[1].split()[:5] == ["words", "failed", "12", "5.0s", "1"]
    assert rows[2].split() == ["trainer", "running", "13", "50s", "0"]
    assert rows[3].startswith("queue 2 groups  |  gateway open, 0 in flight, 0 tok/s, policy v3")
    assert rows[4].startswith("step 3/40  reward 0.300  loss 0.5000")
    assert all(len(row) <= 80 for row in rows)
