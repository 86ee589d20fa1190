"""``atropos-verl agents``: an agent that exists already as an Atropos environment.

For each task G sessions are opened at the gateway, and the agent works in each: a function ``solve(task, session)``, or
a command that finds the session by ``OPENAI_BASE_URL``. The rollouts of a task are posted as one group, once. The
launcher starts it with the words that an Atropos environment takes, hence the second names of options."""

import argparse
import asyncio
import contextlib
import inspect
import itertools
import json
import logging
import math
import os
import random
import shlex
import shutil
import signal
import sys
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml

from atropos_verl.agents.client import AgentSession, Client, Reward, SessionError, may_pass
from atropos_verl.config.launch_schema import LAUNCH_DIRECTORY
from atropos_verl.errors import AtroposAPIError, AtroposHTTPStatusError, AtroposVerlError, ConfigError
from atropos_verl.http_thread import EVALUATION_GROUP, EVALUATION_PATH, SameLines, check_url
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.messages import EnvRegistration
from atropos_verl.protocol.wire import encode_group
from atropos_verl.storage import write_atomic
from atropos_verl.training.advantages import group_advantages, turn_advantages
from atropos_verl.training.extensions import load_function

logger = logging.getLogger("atropos_verl.agents.runner")  # it is started as a program, too

Solve = Callable[[Any, AgentSession], Awaitable[None]]
"""Works on a task and gives the session its reward."""

_STATUS_SECONDS = 0.5
_REPLACEMENTS = 2
"""Sessions that take the place of one rollout in which the agent failed."""
_RETRIES = 8
"""Sessions that take the place of one rollout that the network or a server ended."""
_LONGEST_PAUSE = 10.0
_FAILED_GROUPS = 8
"""Groups in a row without a rollout after which the agent is taken to be broken."""
_SDK_ERRORS = {"APIConnectionError", "APITimeoutError", "InternalServerError", "ServiceUnavailableError"}
"""Names that the SDKs of OpenAI and Anthropic, and LiteLLM, give to failures of network and server."""
_IGNORED = ("--env.tokenizer_name", "--env.use_wandb", "--env.total_steps", "--slurm")
"""Settings of Atropos environments that mean nothing here."""
_NO_TRAINER = "no trainer has registered at %s yet: waiting for one"
_UPSTREAM = (
    "this API drops rollout_ids: rows of one rollout count as sequences in its batches and groups. They carry the GRPO "
    "advantages of their rollouts, so algorithm.adv_estimator has no effect on them"
)


class AgentError(AtroposVerlError):
    """The agent ended without a reward."""


@dataclass
class Group:
    """One task, on its way to being posted."""

    id: str
    task: int
    sessions: list[str] = field(default_factory=list)


class Notes:
    """``NAME.jsonl``: which groups were begun, their sessions, and which are over. It survives a ``kill -9``.

    ::

        {"group": "5f…", "task": 12}
        {"group": "5f…", "session": "a3…"}
        {"group": "5f…", "over": "posted"}
    """

    def __init__(self, path: Path) -> None:
        self.begun = 0
        """Groups of all processes so far."""
        self.unfinished: dict[str, Group] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        notes = list[dict[str, Any]]()
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # the last line may be cut short
                notes.append(json.loads(line))
                self._apply(notes[-1])
        rest = [{"begun": self.begun - len(self.unfinished)}]
        rest += [note for note in notes if note.get("group") in self.unfinished]
        write_atomic(path, "".join(f"{json.dumps(note)}\n" for note in rest))
        self._file = path.open("a")

    def _apply(self, note: Mapping[str, Any]) -> None:
        group = note.get("group", "")
        if "task" in note:
            self.begun += 1
            self.unfinished[group] = Group(group, note["task"])
        elif "session" in note:
            self.unfinished[group].sessions.append(note["session"])
        elif "over" in note:
            self.unfinished.pop(group, None)
        self.begun += note.get("begun", 0)

    def add(self, **note: Any) -> None:
        self._file.write(json.dumps(note) + "\n")
        self._file.flush()
        self._apply(note)


def read_tasks(path: Path) -> list[Any]:
    """The JSON value of each line. Raises ``ConfigError`` naming file and line."""
    tasks = []
    try:
        for number, line in enumerate(path.expanduser().read_text().splitlines(), 1):
            where = f"{path}, line {number}"
            tasks += [json.loads(line)] if line.strip() else []
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", "--tasks") from error
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error}): {line[:80]!r}", "--tasks") from error
    if not tasks:
        raise ConfigError(f"{path} holds no task: one JSON value a line", "--tasks")
    return tasks


def task_order(count: int, begun: int) -> Iterator[int]:
    """Task numbers without end: each epoch in another order, from the ``begun``-th on."""
    orders = (random.Random(epoch).sample(range(count), count) for epoch in itertools.count(begun // count))
    return itertools.islice(itertools.chain.from_iterable(orders), begun % count, None)


def of_function(path: str) -> Solve:
    """``package.module:function``, which returns a number, a ``Reward``, or nothing when it has called
    ``session.reward``. One that is not async runs in a thread. Raises ``ConfigError``."""
    function = load_function("agent", path)
    call = function if inspect.iscoroutinefunction(function) else partial(asyncio.to_thread, function)

    async def solve(task: Any, session: AgentSession) -> None:
        await give(session, await call(task, session))

    return solve


def of_command(command: str, scorer: str | None) -> Solve:
    """A command line. The task is its input (JSON); the reward is what ``scorer(task, output)`` says, else 1 for exit
    code 0 and 0 for another."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{command!r}: {error}", "--command") from error
    here = Path(os.environ.get(LAUNCH_DIRECTORY, "."))
    if not words or shutil.which(here / words[0] if "/" in words[0] else words[0]) is None:
        raise ConfigError(f"{command!r} names no program that is there and executable", "--command")
    score = None if scorer is None else load_function("scorer", scorer)

    async def solve(task: Any, session: AgentSession) -> None:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=pipe,
            stdout=pipe,
            cwd=os.environ.get(LAUNCH_DIRECTORY),
            env={**os.environ, **session.variables},
            start_new_session=True,
        )
        try:
            output, _ = await process.communicate(json.dumps(task).encode())
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it started, too
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        code = process.returncode or 0
        if code < 0:
            raise AgentError(f"{words[0]} was killed by signal {-code}")
        await give(session, float(code == 0) if score is None else score(task, output.decode("utf-8", "replace")))

    return solve


async def give(session: AgentSession, result: Any) -> None:
    """Give the session its reward: a number or a ``Reward``; None where it has it. Raises ``AgentError`` for others."""
    if inspect.isawaitable(result):
        result = await result
    if result is None and session.is_rewarded:
        return
    reward = result if isinstance(result, Reward) else Reward(result)
    if not isinstance(reward.value, int | float) or not math.isfinite(reward.value):
        raise AgentError(f"the agent returned {result!r}; return a finite number, a Reward, or call session.reward")
    await session.reward(float(reward.value), per_turn=reward.per_turn, info=reward.info)


def is_infrastructure(error: BaseException | None) -> bool:
    """The failure says nothing about the agent: network or server. Causes of the error are looked at, too."""
    for _ in range(20):  # causes may be a circle
        status = getattr(error, "status", None) or getattr(getattr(error, "response", error), "status_code", None)
        server = isinstance(status, int) and (status == 429 or status >= 500)
        if server or type(error).__name__ in _SDK_ERRORS or isinstance(error, httpx.TransportError | ConnectionError):
            return True
        error = error and (error.__cause__ or error.__context__)
    return False


def encode_rollouts(rollouts: Sequence[Mapping[str, Any]], env_id: int, *, holds_rollouts: bool) -> bytes:
    """The group of these rollouts, as ``GET /sessions/ID/rollout`` answers them, for ``POST /scored_data``.

    Where every rollout has rewards per turn, its tokens get the GRPO advantage of its reward plus those of
    ``turn_advantages``. ``holds_rollouts`` False: an API that drops ``rollout_ids``; rows then carry the GRPO advantage
    of their rollout."""
    rows = [(number, row) for number, rollout in enumerate(rollouts) for row in rollout["rows"]]
    numbers = [number for number, _ in rows]
    scores = np.array([rollout["reward"] for rollout in rollouts], np.float64)
    by_turn = all(rollout.get("per_turn") for rollout in rollouts)
    advantages: list[Any] | None = None
    if by_turn or (not holds_rollouts and len(rows) > len(rollouts)):
        of_rollout = group_advantages(scores)
        of_turns = turn_advantages([np.array(one["per_turn"], np.float64) for one in rollouts]) if by_turn else []
        advantages = [np.full(len(row["token_ids"]), of_rollout[number]) for number, row in rows]
        for values, (number, row) in zip(advantages, rows, strict=True):
            for turn, (start, stop) in zip(row["turns"], row["spans"], strict=True) if by_turn else ():
                values[start:stop] += of_turns[number][turn]
    return encode_group(
        tokens=[row["token_ids"] for _, row in rows],
        masks=[row["masks"] for _, row in rows],
        scores=scores[numbers],
        inference_logprobs=[row["logprobs"] for _, row in rows],
        rollout_ids=numbers if holds_rollouts else None,
        advantages=advantages,
        env_id=env_id,
    )


class Runner:
    """Runs the agent on tasks: at most ``options.concurrency`` sessions at once, of ``options.timeout`` seconds."""

    def __init__(self, gateway: Client, solve: Solve, tasks: Sequence[Any], options: argparse.Namespace) -> None:
        self.gateway, self.solve, self.tasks, self.options = gateway, solve, tasks, options
        self.failures: Counter[str] = Counter()
        """``infrastructure`` and ``agent``: sessions that ended without a reward."""
        self._last_failure = ""
        self._slots = asyncio.Semaphore(options.concurrency)
        self._failed_groups = 0
        """In a row."""
        self._lines = SameLines()

    async def rollout(self, group: str, task: int, noted: Callable[[str], None] | None = None) -> dict[str, Any] | None:
        """A rollout of the task, with its reward; None after ``_REPLACEMENTS`` failures of the agent, or ``_RETRIES``
        of network and servers. ``noted`` gets each session's id before the agent does; None: an evaluation."""
        left, timeout = {"agent": _REPLACEMENTS, "infrastructure": _RETRIES}, self.options.timeout
        about: dict[str, Any] = {"task": str(task), "ttl": 2 * timeout + 600, "size": self.options.group_size}
        about |= {"metadata": {"eval": True}} if noted is None else {}
        while min(left.values()) >= 0:
            session: AgentSession | None = None
            try:
                async with self._slots, self.gateway.session(group, **about) as session:
                    if noted is not None:
                        noted(session.id)
                    await asyncio.wait_for(self.solve(self.tasks[task], session), timeout)
                    found = await session.rollout()
                    if not found["rows"]:
                        raise AgentError("the agent asked the model nothing at its session's address")
                    return found
            except Exception as error:  # whatever an agent raises
                status = error.status if isinstance(error, SessionError) else 429
                if isinstance(error, ConfigError) or status == 0 or (session is None and not may_pass(status)):
                    raise  # the gateway is gone for good, or opens no sessions to this key
                kind = "infrastructure" if is_infrastructure(error) else "agent"
                self.failures[kind] += 1
                left[kind] -= 1
                self._last_failure = f"{type(error).__name__}: {error}".removesuffix(": ")
                told = kind == "agent" and not isinstance(error, AgentError) and self._lines.is_new(self._last_failure)
                logger.warning("task %d: a rollout failed (%s): %s", task, kind, self._last_failure, exc_info=told)
                if kind == "infrastructure":
                    await asyncio.sleep(min(0.25 * 2 ** (_RETRIES - left[kind]), _LONGEST_PAUSE))
        if noted is None and left["infrastructure"] < 0:
            raise AgentError(f"task {task} could not be evaluated: {self._last_failure}")  # a 0 would blame the policy
        return None

    async def serve(self, api: AtroposClient, notes: Notes) -> None:
        """Keeps the trainer's queue filled. Raises ``AtroposAPIError`` when the API is gone, and ``AgentError`` when
        ``_FAILED_GROUPS`` groups in a row came to nothing."""
        size, options = self.options.group_size, self.options
        about = EnvRegistration(max_token_length=options.max_token_length, group_size=size, desired_name=options.name)
        about.weight, about.min_batch_allocation = options.weight, options.share
        while (env_id := await asyncio.to_thread(api.register_env, about)) is None:
            if self._lines.is_new(_NO_TRAINER):
                logger.info(_NO_TRAINER, options.api_url)
            await asyncio.sleep(_STATUS_SECONDS)
        batch_size = (await asyncio.to_thread(api.info)).batch_size
        most = max(1, options.batches_ahead * batch_size // size)
        share = math.ceil((options.share or 0.0) * batch_size / size)  # no batch is made without it
        logger.info("environment %d: at most %d groups of %d wait or are under way", env_id, most, size)
        fresh = (Group(uuid.uuid4().hex, task) for task in task_order(len(self.tasks), notes.begun))
        running = {asyncio.create_task(self._group(api, notes, group, env_id)) for group in notes.unfinished.values()}
        try:
            while True:
                status = await asyncio.to_thread(api.env_status, env_id)
                room = max(most - status.queue_size, share - status.self_queue_size) - len(running)
                for group in itertools.islice(fresh, max(0, room)):
                    notes.add(group=group.id, task=group.task)
                    running.add(asyncio.create_task(self._group(api, notes, notes.unfinished[group.id], env_id)))
                pause = asyncio.create_task(asyncio.sleep(_STATUS_SECONDS))
                done, _ = await asyncio.wait({*running, pause}, return_when=asyncio.FIRST_COMPLETED)
                running -= done
                for task in done:
                    task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _group(self, api: AtroposClient, notes: Notes, group: Group, env_id: int) -> None:
        size = self.options.group_size
        recalled = [await self._recall(session) for session in list(group.sessions)]
        # A rollout that had its reward when it was replaced (it was not read in time) would be one too many.
        earlier = [found for found in recalled if found is not None][:size]

        def noted(session: str) -> None:
            notes.add(group=group.id, session=session)

        missing = (self.rollout(group.id, group.task, noted) for _ in range(size - len(earlier)))
        rollouts = [found for found in [*earlier, *await asyncio.gather(*missing)] if found is not None]
        if len(rollouts) < min(2, size):
            self._failed_groups += 1
            notes.add(group=group.id, over="failed")
            logger.error("task %d gave %d of %d rollouts: it is left out", group.task, len(rollouts), size)
            if self._failed_groups >= _FAILED_GROUPS:
                text = f"the agent failed in {self._failed_groups} groups in a row, at last with {self._last_failure}"
                raise AgentError(text)
            return
        self._failed_groups = 0
        holds = "rollouts" in api.features
        if not holds and any(len(found["rows"]) > 1 for found in rollouts) and self._lines.is_new(_UPSTREAM):
            logger.warning(_UPSTREAM)
        has_keys = "idempotency" in api.features
        if not has_keys:  # what was sent before this process died may have arrived: better lost than trained twice
            notes.add(group=group.id, over="posted")
        body = encode_rollouts(rollouts, env_id, holds_rollouts=holds)
        await self._post(api, body, group.id if has_keys else None)
        if has_keys:
            notes.add(group=group.id, over="posted")

    async def _recall(self, session: str) -> dict[str, Any] | None:
        """The rollout of a session of an earlier process; one that was open is aborted."""
        try:
            found = await self.gateway.ask("GET", f"/sessions/{session}/rollout")
            return found if found["rows"] else None
        except SessionError as error:
            if error.status not in (404, 409):
                raise
        with contextlib.suppress(SessionError):
            await self.gateway.ask("POST", f"/sessions/{session}/abort", {"reason": "the runner was started again"})
        return None

    async def _post(self, api: AtroposClient, body: bytes, key: str | None) -> None:
        while True:
            try:
                await asyncio.to_thread(api.post_scored_data_list, [body], key)
                return
            except AtroposHTTPStatusError as error:
                if error.status_code == 422 and '"idempotency"' in error.body:
                    return  # an earlier process posted it, as another environment
                if error.status_code not in (429, 503, 507):
                    raise
                logger.warning("a group is not posted yet: %s", error.reason)
            await asyncio.sleep(1.0)

    async def evaluate(self) -> dict[str, float]:
        """``eval/mean_reward`` over one rollout of each task; failed ones count as 0. None of them is posted."""
        # A run that evaluates keeps weights for it. At other times nothing would answer such a group.
        group = f"{EVALUATION_GROUP if self.options.config else ''}{uuid.uuid4().hex}"
        found = await asyncio.gather(*(self.rollout(group, task) for task in range(len(self.tasks))))
        if not any(found):
            raise AgentError(f"the agent failed in every task, at last with {self._last_failure}")
        rewards = [0.0 if rollout is None else float(rollout["reward"]) for rollout in found]
        return {"eval/mean_reward": sum(rewards) / len(rewards), "eval/failed": float(found.count(None))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, parser.usage = parser.add_argument, "%(prog)s {run,evaluate} MODULE:FUNCTION [--tasks FILE] [option ...]"
    add("action", choices=("run", "serve", "evaluate"), help="run (serve is the same), or evaluate on held-out tasks")
    add("function", nargs="?", metavar="MODULE:FUNCTION", help="async def solve(task, session) -> float | Reward")
    add("--agent", dest="named", help=argparse.SUPPRESS)
    add("--command", metavar="WORDS", help="a command in its place: the task is its input, exit code 0 is reward 1")
    add("--scorer", metavar="MODULE:FUNCTION", help="score(task, output of the command), in place of the exit code")
    tasks = "JSON values, one a line (default: %(default)s)"
    add("--tasks", metavar="FILE", type=Path, default="tasks.jsonl", help=tasks)
    add("--eval-tasks", metavar="FILE", type=Path, help="for evaluate (default: --tasks)")
    add_runner_arguments(parser)


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """What does not depend on where tasks and rewards come from."""
    add, url = parser.add_argument, os.environ.get
    add("--group-size", "--env.group_size", type=int, default=8, help="rollouts per task (default: %(default)s)")
    add("--concurrency", type=int, default=64, help="sessions at once (default: %(default)s)")
    add("--timeout", type=float, default=600.0, help="seconds for one rollout (default: %(default)g)")
    add("--name", "--env.wandb_name", default="agent", help="at the API (default: %(default)s)")
    add("--api-url", default=url("ATROPOS_API_URL"), help="default: $ATROPOS_API_URL; evaluate needs none")
    add("--gateway-url", default=url("ATROPOS_GATEWAY_URL"), help="default: $ATROPOS_GATEWAY_URL")
    add("--batches-ahead", "--env.max_batches_offpolicy", type=int, default=1, help="that may wait (default: 1)")
    add("--weight", "--env.inference_weight", type=float, default=1.0, help=argparse.SUPPRESS)
    add("--share", "--env.min_batch_allocation", type=float, help=argparse.SUPPRESS)
    add("--max-token-length", "--env.max_token_length", type=int, default=32768, help=argparse.SUPPRESS)
    add("--eval-dir", "--env.data_dir_to_save_evals", type=Path, help="evaluate writes metrics.json there")
    add("--config", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    for name in _IGNORED:
        add(name, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Exit code: 0, or 1 where the API, the gateway or the agent failed for good. Raises ``ConfigError``."""
    path = options.named or options.function
    file = (options.eval_tasks or options.tasks) if options.action == "evaluate" else options.tasks
    if (path is None) == (options.command is None):
        raise ConfigError("name the agent: MODULE:FUNCTION or --command, and not both")
    if options.scorer is not None and options.command is None:
        raise ConfigError("it scores the output of a --command; a function returns its reward", "--scorer")
    solve = of_function(path) if path is not None else of_command(options.command, options.scorer)
    return run_tasks(options, contextlib.nullcontext((solve, read_tasks(file))))


def run_tasks(
    options: argparse.Namespace, opened: contextlib.AbstractAsyncContextManager[tuple[Solve, Sequence[Any]]]
) -> int:
    """``run``, with what solves the tasks and the tasks of the chosen action, which ``opened`` holds open."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("atropos_verl").setLevel(logging.INFO)
    key, token = os.environ.get("ATROPOS_GATEWAY_KEY"), os.environ.get("ATROPOS_API_TOKEN")
    if options.config is not None:  # the launcher's: keys do not show in the process list
        content = yaml.safe_load(options.config.read_text())
        url, key = (content["openai"][0][name] for name in ("base_url", "api_key"))
        options.gateway_url = url.removesuffix("/v1").removesuffix(EVALUATION_PATH)  # sessions are the gateway's own
        options.api_url, token = content.get("env", {}).get("rollout_server_url", options.api_url), None
    for name in ("gateway_url", *(() if options.action == "evaluate" else ("api_url",))):
        if not (url := getattr(options, name)):
            raise ConfigError(f"set it, or ATROPOS_{name.upper()}", f"--{name.replace('_', '-')}")
        check_url(url, f"--{name.replace('_', '-')}")
    if options.group_size < 1 or options.concurrency < 1 or not options.timeout > 0:
        raise ConfigError("--group-size, --concurrency and --timeout must be above 0")
    if options.name != Path(options.name).name:
        raise ConfigError(f"{options.name!r} must be the name of a file, in agents/", "--name")

    async def work() -> None:
        async with Client(options.gateway_url, key) as gateway, opened as (solve, tasks):
            runner = Runner(gateway, solve, tasks, options)
            if options.action != "evaluate":
                with AtroposClient(options.api_url, token=token) as api:
                    await runner.serve(api, Notes(Path("agents") / f"{options.name}.jsonl"))
            figures = await runner.evaluate()
            logger.info("%s", figures)
            if options.eval_dir is not None:
                options.eval_dir.mkdir(parents=True, exist_ok=True)
                write_atomic(options.eval_dir / "metrics.json", json.dumps({"results": {"all": figures}}))

    try:
        asyncio.run(work())
    except (AtroposAPIError, SessionError, AgentError) as error:
        logger.error("%s", error)
        return 1
    return 0


def program(
    verb: str, add: Callable[[argparse.ArgumentParser], None], command: Callable[[argparse.Namespace], int]
) -> int:
    """What the launcher starts in an interpreter of its own: a verb alone, without the others."""
    parser = argparse.ArgumentParser(prog=f"atropos-verl {verb}", allow_abbrev=False)
    add(parser)
    try:
        return command(parser.parse_intermixed_args())
    except ConfigError as error:
        sys.stderr.write(f"CONFIGURATION ERROR: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(program("agents", add_arguments, run))
