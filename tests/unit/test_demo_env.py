"""The demo environment: split, reward, token-exact groups and evaluation, against a real HTTP server in a thread."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from support.examples import EXAMPLES, load_example

from atropos_verl.assets import demo_model_path
from atropos_verl.http_thread import ServerThread

SCRIPT = EXAMPLES / "environments" / "spell_backward.py"
EOS = 258


@pytest.fixture(scope="module")
def env_module() -> ModuleType:
    return load_example("environments/spell_backward.py")


class VllmServer:
    """Speaks ``/health`` and vLLM's ``/generate``; completion i is ``answers[i]`` spelled in the demo's byte tokens.

    ``None`` as an answer stands for the right one. The logprob of output position t is -(t + 1) / 4.
    """

    url: str

    def __init__(self, answers: list[str | None]) -> None:
        from transformers import AutoTokenizer

        self.answers = answers
        self.tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
        self.requests: list[dict[str, Any]] = []

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(request)
        prompt = self.tokenizer.decode(request["prompt"]["prompt_token_ids"])
        word = prompt.split("nus): ")[1].split("<|im_end|>")[0]
        logprobs, reasons = [], []
        for i in range(request["n"]):
            answer = self.answers[i % len(self.answers)]
            ids = [*self.tokenizer.encode(word[::-1] if answer is None else answer), EOS][: request["max_tokens"]]
            logprobs.append([[{str(token): -(t + 1) / 4}] for t, token in enumerate(ids)])
            reasons.append("stop" if ids[-1] == EOS else "length")
        return {"logprobs": logprobs, "finish_reasons": reasons}


@pytest.fixture
def server() -> Iterator[VllmServer]:
    vllm = VllmServer([None, "zz"])

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({})

    async def generate(request: Request) -> JSONResponse:
        return JSONResponse(vllm.reply(await request.json()))

    app = Starlette(routes=[Route("/health", health), Route("/generate", generate, methods=["POST"])])
    with ServerThread(app, service="vLLM", advice="", host="127.0.0.1", port=0) as thread:
        vllm.url = f"{thread.url}/v1"
        yield vllm


def make_env(module: ModuleType, url: str = "http://127.0.0.1:9/v1", **settings: Any) -> Any:
    config, servers = module.SpellBackwardEnv.config_init()
    return module.SpellBackwardEnv(
        config=config.model_copy(update=settings), server_configs=[servers[0].model_copy(update={"base_url": url})]
    )


def words_of(tasks: list[dict[str, Any]]) -> list[str]:
    return [task["metadata"]["word"] for task in tasks]


async def test_a_resumed_run_goes_on_behind_the_tasks_drawn_so_far(env_module: ModuleType, tmp_path: Path) -> None:
    """As Atropos calls it: the status before each task, ``load_checkpoint`` on registering with a run past step 0."""

    def registered(step: int) -> Any:
        env = make_env(env_module)
        env.checkpoint_dir, env.checkpoint_interval, env.wandb_prepend = str(tmp_path), 5, "environment_0"
        env.curr_step, env.status_dict = step, {"current_step": step}
        return env

    async def draw(env: Any, step: int) -> str:
        env.status_dict = {"current_step": step}
        return str(words_of([await env.get_next_item()])[0])

    straight, first = registered(0), registered(0)
    await straight.setup()
    await first.setup()
    words = words_of([next(straight.train_tasks) for _ in range(20)])
    assert [await draw(first, step) for step in range(13)] == words[:13]
    # A file for each checkpoint of the trainer, and one for the last step seen.
    files = sorted(path.name for path in (tmp_path / "env_checkpoints" / "environment_0").iterdir())
    assert files == ["step-10.json", "step-12.json", "step-5.json"]
    for step, drawn in ((12, 12), (11, 10), (5, 5), (4, 0)):  # interrupted, or rolled back to that checkpoint
        resumed = registered(step)
        await resumed.setup()
        resumed.load_checkpoint()
        assert [await draw(resumed, step) for _ in range(3)] == words[drawn : drawn + 3]


def test_defaults_run_by_hand(env_module: ModuleType) -> None:
    config, servers = env_module.SpellBackwardEnv.config_init()
    assert isinstance(servers, list) and len(servers) == 1  # a bare config would ignore --openai.base_url
    assert servers[0].server_type == "vllm"
    assert servers[0].num_requests_for_eval >= config.eval_words  # all of an evaluation at once
    assert Path(config.tokenizer_name) == demo_model_path() == Path(servers[0].tokenizer_name)
    assert config.wandb_name == "spell_backward"  # null would be refused by the API at /register-env
    assert config.ensure_scores_are_not_same is False and config.use_wandb is False
    assert (config.group_size, config.temperature, config.max_batches_offpolicy) == (8, 1.0, 1)
    # Longest sequence: 13 prompt tokens around a word of 5, the answer's bound; Atropos's bound is exclusive.
    assert 13 + 5 + config.max_answer_tokens < config.max_token_length


def test_split_is_the_hash_rule(env_module: ModuleType) -> None:
    # First byte of sha256 by coreutils: able b0, actor 50, cat 77, neon 1b, table 0d; held out when divisible by 16.
    assert [env_module.is_held_out(w) for w in ("able", "actor", "cat", "neon", "table")] == [True, True] + [False] * 3
    assert env_module.is_held_out("ABLE") is True
    pretrain = load_example("demo_model/pretrain.py")
    train, held_out = pretrain.split_words()
    assert not any(map(env_module.is_held_out, train)) and all(map(env_module.is_held_out, held_out))
    assert 0.04 < len(held_out) / (len(train) + len(held_out)) < 0.085  # one in 16 is 0.0625
    assert pretrain.HELD_OUT_SHARE == env_module.HELD_OUT_SHARE


async def test_training_words_follow_the_seed_and_are_never_held_out(env_module: ModuleType) -> None:
    envs = [make_env(env_module, seed=seed, eval_words=600) for seed in (0, 0, 1)]
    for env in envs:
        await env.setup()
    first, same, other = (words_of(list(itertools.islice(env.train_tasks, 4000))) for env in envs)
    held_out = words_of(envs[0].eval_tasks)
    assert first == same and first[:50] != other[:50]
    assert held_out == words_of(envs[2].eval_tasks)
    assert set(first).isdisjoint(held_out)
    assert len(held_out) == len(set(held_out)) == 600  # of 858, each once
    assert all(3 <= len(word) <= 5 and word.islower() for word in first + held_out)


async def test_reward_by_hand(env_module: ModuleType) -> None:
    task = {"question": "…: neon", "answer": "noen", "metadata": {"word": "neon"}}
    env = make_env(env_module)
    await env.setup()
    assert [env.score(text, task) for text in ("noen", " noen\n", "NOEN")] == [1.0, 1.0, 1.0]
    assert [env.score(text, task) for text in ("neon", "noe", "noenn", "", "xxxx")] == [0.0] * 5
    partial = make_env(env_module, partial_credit=True)
    await partial.setup()
    # A quarter point per letter in its place; a right answer with letters after it gets 0.8 from reasoning-gym.
    assert [partial.score(text, task) for text in ("noen", "noe", "nxen", "neon", "noenn", "")] == pytest.approx(
        [1.0, 0.75, 0.75, 0.5, 0.8, 0.0]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_word_len": 6, "max_word_len": 5}, r"--env\.min_word_len 6 is above --env\.max_word_len 5"),
        ({"min_word_len": 30, "max_word_len": 40}, r"30-40 letters"),
        ({"max_answer_tokens": 64}, r"--env\.max_answer_tokens 64 leaves no room"),
    ],
)
async def test_settings_without_a_task_are_refused(
    env_module: ModuleType, settings: dict[str, Any], message: str
) -> None:
    env = make_env(env_module, **settings)
    with pytest.raises(ValueError, match=message):
        await env.setup()


async def test_a_group_is_token_exact(env_module: ModuleType, server: VllmServer) -> None:
    env = make_env(env_module, server.url, group_size=4, temperature=0.7, latency=0.05)
    await env.setup()
    question = "Spell this word backward (example: sun -> nus): cat"
    task = {"question": question, "answer": "tac", "metadata": {"word": "cat"}}
    started = time.monotonic()
    group, backlog = await env.collect_trajectories(task)
    assert time.monotonic() - started >= 0.05, "scoring takes --env.latency"

    encode = server.tokenizer.encode
    prompt = encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    right, wrong = [*encode("tac"), EOS], [*encode("zz"), EOS]
    hidden = [-100] * len(prompt)
    assert backlog == []
    assert group == {
        "tokens": [prompt + right, prompt + wrong, prompt + right, prompt + wrong],
        "masks": [hidden + right, hidden + wrong, hidden + right, hidden + wrong],
        "scores": [1.0, 0.0, 1.0, 0.0],
        "inference_logprobs": [
            [1.0] * len(prompt) + logprobs for logprobs in ([-0.25, -0.5, -0.75, -1.0], [-0.25, -0.5, -0.75]) * 2
        ],
        "generation_params": {"temperature": 0.7},
    }
    assert len(server.requests) == 1
    sent = server.requests[0]
    assert sent["prompt"] == {"prompt_token_ids": prompt}
    assert (sent["n"], sent["max_tokens"], sent["temperature"]) == (4, 8, 0.7)


async def test_evaluate_scores_every_held_out_word(
    env_module: ModuleType, server: VllmServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers = [None, "zz", "zz", "zz"]  # one of four samples is right
    env = make_env(env_module, server.url, eval_words=10, eval_samples=4, data_dir_to_save_evals=str(tmp_path))
    await env.setup()
    metrics = await env.evaluate()
    assert metrics == {"eval/mean_reward": 0.25, "eval/exact_match": 0.25, "eval/words": 10.0, "eval/sequences": 40.0}
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["results"]["all"] == metrics
    assert written["config_general"]["generation_parameters"] == {"max_new_tokens": 8, "temperature": 1.0, "n": 4}
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 40
    assert samples[0] == {
        "question": env.eval_tasks[0]["question"],
        "expected": env.eval_tasks[0]["answer"],
        "answer": env.eval_tasks[0]["answer"],
        "score": 1.0,
    }
    assert [sample["score"] for sample in samples[:4]] == [1.0, 0.0, 0.0, 0.0]
    assert "held-out mean reward 0.2500 over 40 sequences" in capsys.readouterr().out


def test_evaluate_command_runs_without_torch(server: VllmServer, tmp_path: Path) -> None:
    # A torch that cannot be imported stands in front of the real one: the process must not even try.
    (tmp_path / "torch.py").write_text("raise SystemExit('the environment imported torch')\n")
    command = [sys.executable, str(SCRIPT), "evaluate", "--slurm", "false", "--openai.base_url", server.url]
    command += ["--openai.model_name", "demo", "--openai.api_key", "x", "--openai.server_type", "vllm"]
    command += ["--openai.tokenizer_name", str(demo_model_path()), "--env.tokenizer_name", str(demo_model_path())]
    command += ["--env.use_wandb", "false", "--env.eval_words", "3", "--env.eval_samples", "2", "--env.seed", "7"]
    command += ["--env.data_dir_to_save_evals", str(tmp_path / "evals")]
    variables = {**os.environ, "PYTHONPATH": str(tmp_path), "WANDB_MODE": "disabled"}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((tmp_path / "evals" / "metrics.json").read_text())["results"]["all"]
    assert results == {"eval/mean_reward": 0.5, "eval/exact_match": 0.5, "eval/words": 3.0, "eval/sequences": 6.0}
    assert [request["n"] for request in server.requests] == [2, 2, 2]
