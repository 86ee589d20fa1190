"""Restarts, evaluations, steps, the diagnosis and the view, by hand-written states and real processes."""

import io
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.serving import eventually
from support.trajectory_server import Clock

from atropos_verl.config.launch_schema import LaunchConfig
from atropos_verl.config.schema import RunConfig, SuperviseConfig
from atropos_verl.launch import evaluation
from atropos_verl.launch.plan import LaunchPlan
from atropos_verl.launch.probes import LogFacts, Poller, StepWatch, common_errors, diagnose, last_refusals
from atropos_verl.launch.process import ServiceSpec
from atropos_verl.launch.supervisor import Supervisor, WatchedService
from atropos_verl.report.console import LaunchView


def watched(tmp_path: Path, clock: Clock, *, code: str, restarts: int = 3) -> WatchedService:
    spec = ServiceSpec(
        name="words",
        command=(sys.executable, "-S", "-c", code),
        cwd=tmp_path,
        log_path=tmp_path / "words.1.log",
        restarts=restarts,
    )
    return WatchedService(spec, SuperviseConfig(backoff=1.0, max_backoff=3.0, healthy_after=50.0), clock)


def die(service: WatchedService, *, ready: bool = True) -> None:
    service.start()
    if ready:
        service.set_ready()
    eventually(service.has_died, "the process has died")


def test_backoff_doubles_up_to_its_bound_then_the_service_is_given_up(tmp_path: Path) -> None:
    clock = Clock()
    service = watched(tmp_path, clock, code="print('x'); raise SystemExit(7)")
    for delay in (1.0, 2.0, 3.0):
        assert service.is_due
        die(service)
        assert (service.returncode, service.plan_restart()) == (7, delay)
        assert (service.state, service.is_due) == ("restarting", False)
        clock.pass_(delay)
    die(service)
    assert service.plan_restart() is None
    assert (service.state, service.starts, service.deaths) == ("failed", 4, 4)
    assert not service.has_future
    assert sorted(path.name for path in tmp_path.glob("*.log")) == [f"words.{n}.log" for n in (1, 2, 3, 4)]


def test_a_long_life_forgives_and_excused_deaths_do_not_count(tmp_path: Path) -> None:
    clock = Clock()
    service = watched(tmp_path, clock, code="raise SystemExit(1)", restarts=1)
    die(service)
    assert service.plan_restart() == 1.0
    die(service)
    clock.pass_(60.0)  # it lived for longer than healthy_after
    assert service.plan_restart() == 1.0
    die(service)
    assert service.plan_restart(excused=True) == 1.0
    die(service)
    assert service.plan_restart() is None
    never = watched(tmp_path, clock, code="raise SystemExit(1)", restarts=0)
    die(never)
    assert never.plan_restart(excused=True) is None


@pytest.mark.parametrize(
    ("codes", "delays"),
    [([3, 3], [1.0, None]), ([3, 4, 4], [1.0, 2.0, None]), ([0, 0, 0, 0], [1.0, 2.0, 3.0, None])],
)
def test_a_script_that_cannot_start_is_given_up_at_once(
    tmp_path: Path, codes: list[int], delays: list[float | None]
) -> None:
    clock = Clock()
    service = watched(tmp_path, clock, code="raise SystemExit(int(open('code').read()))")
    found = []
    for code in codes:
        (tmp_path / "code").write_text(str(code))
        die(service, ready=False)
        found.append(service.plan_restart())
    assert found == delays
    assert service.cannot_start == (codes[-1] != 0)


def test_logs_of_an_earlier_launch_are_kept(tmp_path: Path) -> None:
    (tmp_path / "words.1.log").write_text("the launch before")
    service = watched(tmp_path, Clock(), code="print('now')")
    die(service)
    assert (tmp_path / "words.1.log").read_text() == "the launch before"
    assert (tmp_path / "words.2.log").read_text() == "now\n"


def test_a_script_that_starts_nothing_is_told_from_one_that_ended(tmp_path: Path) -> None:
    clock = Clock()
    spec = replace(watched(tmp_path, clock, code="").spec, kind="environment")
    service = WatchedService(spec, SuperviseConfig(), clock)
    die(service, ready=False)
    assert service.death() == "ended with code 0 without having registered (does it end with MyEnv.cli()?)"
    die(service)
    assert service.death() == "exited with code 0"


def test_an_evaluation_that_takes_too_long_is_ended_and_told_of(tmp_path: Path) -> None:
    command = (sys.executable, "-S", "-c", "import time; print('task 7', flush=True); time.sleep(1000)")
    spec = ServiceSpec(name="evaluate_before", command=command, cwd=tmp_path, log_path=tmp_path / "e.log")
    planned = evaluation.PlannedEvaluation("words", 1.0, spec, tmp_path / "metrics.json")
    notes: list[str] = []
    (tmp_path / "eval").touch()  # nor does a disk that takes no progress.json end it
    processes = evaluation.EvaluationProcesses(
        {"before": [planned]}, tmp_path, timeout=0.0, note=notes.append, check=lambda: None
    )
    processes.start_evaluation("before")
    eventually(lambda: (tmp_path / "e.log").read_text() == "task 7\n", "its first line")
    eventually(lambda: not processes.is_evaluating("before"), "the timeout")
    assert processes.finish_evaluation("before") == {}
    assert notes == [f"evaluate_before took longer than eval.timeout=0 s; its log {tmp_path}/e.log ends: task 7"]


def test_evaluations_between_steps_keep_their_results_apart(tmp_path: Path) -> None:
    """One plan serves them all; what it wrote moves to a directory of the step."""
    code = "import json, os, sys; p = sys.argv[1]; os.makedirs(p, exist_ok=True); "
    code += "json.dump({'results': {'all': {'mean_reward': float(sys.argv[2])}}}, open(p + '/metrics.json', 'w'))"
    plan = []
    for name, score in (("words", "0.5"), ("sums", "1.0")):
        place = tmp_path / "eval" / "during" / name
        command = (sys.executable, "-S", "-c", code, str(place), score)
        spec = ServiceSpec(name=f"evaluate_{name}", command=command, cwd=tmp_path, log_path=tmp_path / f"{name}.log")
        plan.append(evaluation.PlannedEvaluation(name, 3.0 if name == "words" else 1.0, spec, place / "metrics.json"))
    processes = evaluation.EvaluationProcesses(
        {"during": plan}, tmp_path, timeout=30.0, note=lambda text: None, check=lambda: None
    )
    watch, told = evaluation.EvaluationWatch(tmp_path), list[str]()
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


def test_an_evaluation_that_an_earlier_run_was_killed_in_is_no_news(tmp_path: Path) -> None:
    """Symptom: a run without evaluations was never told of a stall, since one seemed to go on."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "progress.json").write_text('{"running": "before", "scores": {"step_5": {"words": 0.5}}}')
    watch = evaluation.EvaluationWatch(tmp_path)
    assert (watch.poll(), watch.running) == ([], None)


def line(step: int) -> str:
    return json.dumps({"step": step, "policy_version": step, "loss": 0.5, "reward/mean": step / 10}) + "\n"


def test_the_tail_gives_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    clock = Clock()
    tail = StepWatch(path, clock)
    assert tail.poll() == []
    path.write_text(line(1) + line(2) + '{"step": 3, "poli')
    assert [entry["step"] for entry in tail.poll()] == [1, 2]
    assert (tail.step, tail.last_at) == (2, clock())
    clock.pass_(5.0)
    with path.open("a") as file:
        file.write('cy_version": 3}\n')
    assert [entry["step"] for entry in tail.poll()] == [3]
    assert tail.poll() == []
    assert tail.last_at == clock()


def test_a_resumed_run_is_followed_from_where_it_resumed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(step) for step in (1, 2, 3)))
    tail = StepWatch(path, Clock())
    assert tail.poll() == [], "steps of the launch before are no news"
    assert (tail.step, list(tail.rewards)) == (3, [0.1, 0.2, 0.3])
    replacement = tmp_path / "new"
    replacement.write_text(line(1) + line(2))  # what a trainer that resumes at 2 does
    replacement.replace(path)
    assert tail.poll() == []
    assert tail.step == 2
    with path.open("a") as file:
        file.write(line(3))
    assert [entry["step"] for entry in tail.poll()] == [3]
    assert list(tail.rewards) == [0.1, 0.2, 0.3]


def state(**changes: Any) -> dict[str, Any]:
    services = [
        {"name": "words", "kind": "environment", "state": "running", "pid": 12, "restarts": 1, "detail": "",
         "seconds": 5.0, "log": "/run/logs/words.2.log"},
        {"name": "trainer", "kind": "trainer", "state": "running", "pid": 13, "restarts": 0, "detail": "",
         "seconds": 50.0, "log": "/run/logs/trainer.1.log"},
    ]  # fmt: skip
    row = {"env_id": 1, "name": "words_1", "state": "alive", "heard_seconds_ago": 0.3, "groups": 9,
           "waiting_sequences": 8, "refused": 2, "min_batch_allocation": 0.75}  # fmt: skip
    base = {
        "time": time.time(),
        "pid": 11,
        "run_dir": "/run",
        "seconds": 60.0,
        "steps": 40,
        "batch_size": 16,
        "api_url": "http://a",
        "gateway_url": "http://g",
        "services": services,
        "api": {"current_step": 3, "queue_size": 2, "queue_sequences": 8, "open_leases": 1,
                "environments": [{**row, "env_id": 0, "name": "words_0", "state": "disconnected"}, row],
                "refused": {"invalid": 2}},
        "gateway": {"in_flight": 0, "policy_version": 3, "paused": False},
        "rates": {"tokens_per_second": 0.0, "requests_per_second": 0.0},
        "recent": [json.loads(line(3))],
        "rewards": [0.1, 0.2, 0.3],
        "seconds_since_step": 31.0,
        "notes": ["starting words"],
        "ending": "",
    }  # fmt: skip
    return {**base, **changes}


def test_the_diagnosis_says_what_is_known() -> None:
    errors = {"words": Counter({"Error in collect_trajectories: 'x'": 7, "other": 2})}
    since = {"served": 5, "refused": 0, "refused_groups": 0, "groups": 0}
    facts = LogFacts(errors, ["a: refused: b"], ["c refused: d"], endings={"words": "the last line"})
    found = diagnose(state(since=since), 30.0, facts)
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
    upstream = diagnose(state(api={"current_step": 3, "queue_size": 1}), 30.0, LogFacts())
    assert "  environments: this API does not say who sent what" in upstream


BAD = "masks[0]: 22 entries, but tokens[0] has 23"
LONG = "This model's maximum context length is 64 tokens, but the prompt has 1811 tokens"
REFUSED = "/generate: a client was refused: "
DROPPED = "environment words drops every group, since"
SERVED = {"served": 40}
ENVIRONMENT = {"kind": "environment", "state": "running", "restarts": 0}


def in_log(count: int, line: str) -> dict[str, Any]:
    return {"errors": {"words": Counter({line: count})}}


@pytest.mark.parametrize(
    ("changes", "facts", "first"),
    [
        ({"api": None}, {}, "the trajectory API at http://a does not answer"),
        ({"gateway": None}, {}, "the trainer's gateway does not answer"),
        ({}, {}, "nobody asks the gateway for completions: is environment words stuck; none of its requests has come?"),
        ({"gateway": {"paused": True}}, {}, "the gateway is paused"),
        ({"gateway": {"in_flight": 4}}, {}, "requests are in flight but no token"),
        (
            {"gateway": {"in_flight": 4}, "rates": {}},
            {},
            "requests are in flight but no answer ends: they are long, or",
        ),
        ({"rates": {"tokens_per_second": 8.0}}, {}, "the policy is being sampled, but environment words sends no"),
        ({"api": {"queue_size": 4, "queue_sequences": 16}}, {}, "16 sequences wait at the API but make no batch of 16"),
        (
            {"services": [{"name": "w", "kind": "environment", "state": "failed", "detail": "x", "restarts": 5}]},
            {},
            "environment w was given up: x",
        ),
        ({"since": {"groups": 3, "refused_groups": 1}}, {}, "nobody asks the gateway"),  # more groups came
        (
            {"since": SERVED},
            in_log(52, "Error in collect_trajectories: 'answer_key'"),
            "environment words fails in its own code: Error in collect_trajectories: 'answer_key' (52 times)",
        ),
        (
            {"since": SERVED},
            in_log(36, "No valid items scored for 'x'"),
            "environment words sends no group; its log says: No valid items scored for 'x' (36 times)",
        ),
        (  # an accident at its start
            {"since": SERVED, "rates": {"tokens_per_second": 8.0}},
            in_log(1, "Error loading the eval dataset"),
            f"the policy is being sampled, but environment words sends no group after {SERVED['served']} answers: ",
        ),
        (
            {"since": {"served": 0}},
            in_log(5, "Error in collect_trajectories: APIConnectionError"),
            "environment words cannot reach what it asks: Error in collect_trajectories: APIConnectionError (5 times)",
        ),
        (
            {"since": {"refused": 9}},
            {**in_log(3, "RetryError[BadRequestError]"), "gateway": [f"{REFUSED}best_of: x"]},
            "the gateway refuses every request of environment words: 9 refused, best_of: x",
        ),
        (
            {},
            {**in_log(10, "RetryError[ClientResponseError]"), "gateway": ["refused at /x: missing or wrong API key"]},
            "the gateway refuses every request of environment words: 10 refused, missing or wrong API key",
        ),
        (
            {"since": {"refused": 9}},
            {"gateway": [f"{REFUSED}{LONG}"]},
            f"the prompts of environment words are too long: the gateway refuses every request: 9 refused, {LONG}",
        ),
        (
            {"since": {"served": 40, "refused_groups": 26}},
            {**in_log(26, "Client error: 422, not retrying"), "api": [f"/scored_data refused: {BAD}"]},
            f"the trajectory API refuses every group of environment words: 26 refused, {BAD}",
        ),
        (  # upstream's API counts nothing and gives no reason
            {"since": SERVED},
            in_log(26, "Client error: 422, not retrying"),
            "the trajectory API refuses every group of environment words: 26 refused, (it does not say why)",
        ),
        (  # two refusals at its start do not hide 304 drops
            {"since": {"served": 40, "refused": 2}},
            in_log(304, "Scores are the same in a group, skipping..."),
            f"{DROPPED} all scores of a group are equal (304 groups)",
        ),
        (
            {"since": SERVED},
            in_log(9, "Token length is too long in a group, skipping..."),
            f"{DROPPED} a sequence of it has --env.max_token_length tokens or more",
        ),
        (  # the environment's own judge refuses it; the gateway once refused somebody else
            {"since": {"served": 500}},
            {**in_log(9, "openai.AuthenticationError: 401"), "gateway": [f"{REFUSED}{LONG}"]},
            "environment words fails in its own code: openai.AuthenticationError: 401 (9 times)",
        ),
        (
            {"services": [{**ENVIRONMENT, "name": "a"}, {**ENVIRONMENT, "name": "b"}], "since": SERVED},
            {"errors": {"a": Counter(), "b": Counter({"boom": 5})}},
            "environment b sends no group; its log says: boom (5 times)",
        ),
    ],
)
def test_the_first_line_names_the_cause(changes: dict[str, Any], facts: dict[str, Any], first: str) -> None:
    text = diagnose(state(**changes), 30.0, LogFacts(**facts))
    assert text.startswith(f"no batch for 30 s: {first}"), text
    assert text.splitlines()[1].startswith("  what to change: ")


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
    assert common_errors(log) == {
        "Error in collect_trajectories: RetryError[<Future at 0x7f2a57 raised BadRequestError>]": 2,
        "Error in scoring: {'question': 'a'}": 2,
        "No valid items scored for 'a'": 1,
        "Scores are the same in a group, skipping...": 1,
        "ValueError: no such dataset": 1,
    }
    api = 3 * "2026-11-28 22:39:25,594 WARNING atropos_verl.server.app: /scored_data refused: scores: empty\n"
    gateway = "2026-11-28 22:39:25,594 WARNING a.b: /generate: a client was refused: n: 0\n"
    assert last_refusals(api + gateway) == [f"{REFUSED}n: 0", "/scored_data refused: scores: empty"]


def plan(run_dir: Path, *services: ServiceSpec) -> LaunchPlan:
    (run_dir / "config.json").touch()  # the model's
    config = RunConfig(model={"path": str(run_dir)})
    return LaunchPlan(
        run_dir=run_dir, config=config, launch=LaunchConfig(), probe_url=None, services=services, evaluations={}
    )


def test_an_earlier_run_in_the_same_directory_is_not_blamed(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    for name in ("environment", "api", "trainer"):
        (logs / f"{name}.log").write_text("2026-11-28 22:39:25,594 WARNING a.b: /x refused: old\n" * 700)
    code = "print('2026-11-29 22:39:25,594 ERROR a.b: /x refused: new\\n]', flush=True)"
    services = [
        ServiceSpec(
            name=kind,
            kind=kind,
            command=(sys.executable, "-S", "-c", code),
            cwd=tmp_path,
            log_path=logs / f"{kind}.log",
        )
        for kind in ("api", "environment")
    ]
    supervisor = Supervisor(plan(tmp_path, *services), print)
    for service in supervisor.services:
        supervisor._start(service)
        eventually(service.has_died, "the process has died")
    facts = supervisor._facts()
    assert facts.errors == {"environment": {"/x refused: new": 1}}
    assert (facts.api, facts.gateway) == (["/x refused: new"], [])
    assert facts.endings["environment"].endswith("/x refused: new"), "not the lone bracket after it"


def test_no_batch_is_missed_while_the_trainer_waits_for_an_evaluation(tmp_path: Path) -> None:
    """Symptom: the demo of SmolLM2 was told of a stall as soon as the evaluation before training was over."""
    supervisor = Supervisor(replace(plan(tmp_path), trains_here=True), print)
    supervisor._poller.generated_at = time.monotonic() - 1000.0
    supervisor._started = 0.0
    assert (supervisor._silent_seconds() or 0.0) > 999.0
    supervisor._evaluations.running = "before"
    assert supervisor._silent_seconds() == 0.0
    supervisor._evaluations.running = None
    assert (supervisor._silent_seconds() or 0.0) < 900.0


def test_counters_that_begin_at_0_again_are_believed(tmp_path: Path) -> None:
    """API or trainer was restarted since the last batch."""
    supervisor = Supervisor(plan(tmp_path), print)
    supervisor._counted = {"served": 40, "refused": 4}
    supervisor._poller.served, supervisor._poller.refused = 30, 9
    assert supervisor.state()["since"] == {"groups": 0, "refused_groups": 0, "served": 30, "refused": 5}


def test_the_gateways_counters_are_read() -> None:
    from prometheus_client import generate_latest
    from support.fake_engine import FakeEngine
    from support.tiny_model import build_tiny_tokenizer

    from atropos_verl.engine.protocol import RequestGate
    from atropos_verl.gateway.service import GatewayService
    from atropos_verl.gateway.text import TextCodec
    from atropos_verl.launch.probes import _counters

    service = GatewayService(
        FakeEngine(), TextCodec(build_tiny_tokenizer(), frozenset()), "tiny", RequestGate(), None, None
    )
    service.answered.update({("/generate", 200): 5, ("/generate", 400): 2, ("/v1/completions", 401): 1, ("/x", 499): 9})
    found = _counters(generate_latest(service).decode())
    names = ("requests_total", "served_total", "refused_total", "generated_tokens_total")
    assert [found[name] for name in names] == [17.0, 5.0, 3.0, 0.0]


def test_a_launchs_own_generation_is_no_request_that_was_served(tmp_path: Path) -> None:
    poller = Poller(plan(tmp_path).config, None)
    poller._count({"served_total": 0.0})
    assert poller.served == 0
    poller.generated_at = 1.0
    poller._count({"served_total": 3.0})
    assert poller.served == 2


STEP_LINE = "step 3/40  reward 0.300  loss 0.5000  - tok/s  rollout -s  train -s  sync -s  weights v3"


def test_a_live_table_on_a_terminal_and_plain_lines_elsewhere() -> None:
    texts = []
    for is_terminal in (False, True):
        console = Console(force_terminal=is_terminal, width=100, record=True, file=io.StringIO(), _environ={})
        with LaunchView(console) as view:
            view.note("starting words [not markup]")
            view.step(json.loads(line(3)), state())
            view.update(state())
        texts.append(console.export_text())
    assert texts[0].splitlines() == ["starting words [not markup]", STEP_LINE]
    assert "service" in texts[1]


def test_the_table_fits_a_narrow_terminal() -> None:
    long = {**state()["services"][0], "state": "failed", "detail": "words was not ready " + 200 * "x"}
    console = Console(width=80, record=True, file=io.StringIO())
    view = LaunchView(console)
    view.update(state(services=[long, state()["services"][1]]))
    console.print(view._frame())
    rows = console.export_text().splitlines()
    assert rows[0].split() == ["service", "state", "pid", "up", "restarts"]
    assert rows[1].split()[:5] == ["words", "failed", "12", "5.0s", "1"]
    assert rows[2].split() == ["trainer", "running", "13", "50s", "0"]
    assert rows[3].startswith("queue 2 groups  |  gateway open, 0 in flight, 0 tok/s, policy v3")
    assert rows[4].startswith("step 3/40  reward 0.300  loss 0.5000")
    assert all(len(row) <= 80 for row in rows)


def test_tokens_are_counted_when_they_are_sampled_not_when_an_answer_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poller = Poller(plan(tmp_path).config, None)
    clock = iter(range(9))
    monkeypatch.setattr("atropos_verl.launch.probes.time.monotonic", lambda: float(next(clock)))
    seen = []
    for sampled in (0.0, 40.0, 40.0):  # two looks within one step of the engine: it goes on
        poller._count({"sampled_tokens_total": sampled, "generated_tokens_total": 0.0})
        seen.append(poller.tokens_per_second)
    assert seen == [None, 40.0, 20.0]
    poller.expect_new_gateway()
    for _ in range(2):
        poller._count({"generated_tokens_total": 0.0})
    assert poller.tokens_per_second is None, "an engine that counts when answers end is not known to stand still"
