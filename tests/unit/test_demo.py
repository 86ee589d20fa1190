"""The demo environments against our gateway, and the shipped model, which is as good and as bad as documented."""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.fake_engine import FakeEngine
from support.serving import serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from atropos_verl import assets
from atropos_verl.assets import demo_model_path
from atropos_verl.types import GenerationRequest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUESTION = "Spell this word backward (example: sun -> nus): "
EOS = 258


def load_example(name: str) -> ModuleType:
    """``examples/NAME`` executed as a module of its own; it is no package, so nothing could import it."""
    path = EXAMPLES / name
    spec = util.spec_from_file_location(f"_demo_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SPELL = load_example("environments/spell_backward.py")
SUMS = load_example("environments/sums.py").SumsEnv
PRETRAIN = load_example("demo_model/pretrain.py")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture
def server(tokenizer: Any) -> Iterator[Any]:
    """A gateway at ``url`` whose completion i is ``answers[i]``; None stands for the right one. The logprob of output
    position t is -(t + 1) / 4."""

    def spell(request: GenerationRequest, index: int) -> list[int]:
        word = tokenizer.decode(request.prompt_token_ids).split("nus): ")[1].split("<|im_end|>")[0]
        answer = engine.answers[index % len(engine.answers)]
        return [*tokenizer.encode(word[::-1] if answer is None else answer), EOS]

    engine: Any = FakeEngine(spell)
    engine.answers = [None, "zz"]
    engine.logprob = lambda index, position: -(position + 1) / 4
    with serving(engine, tokenizer) as client:
        engine.url = f"{client.base_url}/v1"
        yield engine


async def environment(kind: Any = SPELL.SpellBackwardEnv, url: str = "http://127.0.0.1:9/v1", **settings: Any) -> Any:
    config, servers = kind.config_init()
    server = servers[0].model_copy(update={"base_url": url})
    env = kind(config=config.model_copy(update=settings), server_configs=[server])
    await env.setup()
    return env


def words_of(tasks: list[dict[str, Any]]) -> list[str]:
    return [task["metadata"]["word"] for task in tasks]


@pytest.mark.parametrize("kind", [SPELL.SpellBackwardEnv, SUMS])
async def test_a_resumed_run_goes_on_behind_the_tasks_drawn_so_far(kind: Any, tmp_path: Path) -> None:
    """As Atropos calls it: the status before each task, ``load_checkpoint`` on registering with a run past step 0."""

    async def registered(step: int) -> Any:
        env = await environment(kind)
        env.checkpoint_dir, env.checkpoint_interval, env.wandb_prepend = str(tmp_path), 5, "environment_0"
        env.curr_step = step
        return env

    async def draw(env: Any, step: int) -> Any:
        env.status_dict = {"current_step": step}
        return await env.get_next_item()

    straight, first = await registered(0), await registered(0)
    tasks = list(itertools.islice(straight.train_tasks, 20))
    assert [await draw(first, step) for step in range(13)] == tasks[:13]
    # A file for each checkpoint of the trainer, and one for the last step seen.
    files = sorted(path.name for path in (tmp_path / "env_checkpoints" / "environment_0").iterdir())
    assert files == ["step-10.json", "step-12.json", "step-5.json"]
    for step, drawn in ((12, 12), (11, 10), (5, 5), (4, 0)):  # interrupted, or rolled back to that checkpoint
        resumed = await registered(step)
        resumed.load_checkpoint()
        assert [await draw(resumed, step) for _ in range(3)] == tasks[drawn : drawn + 3]


def test_defaults_run_by_hand() -> None:
    config, [server] = SPELL.SpellBackwardEnv.config_init()  # a bare config would ignore --openai.base_url
    assert server.num_requests_for_eval >= config.eval_words  # all of an evaluation at once
    assert Path(config.tokenizer_name) == demo_model_path() == Path(server.tokenizer_name)
    assert config.wandb_name == "spell_backward"  # null would be refused by the API at /register-env
    # Longest sequence: 13 prompt tokens around a word of 5, the answer's bound; Atropos's bound is exclusive.
    assert 13 + 5 + config.max_answer_tokens < config.max_token_length


async def test_words_are_split_by_a_hash_and_follow_the_seed() -> None:
    # First byte of sha256 by coreutils: able b0, actor 50, cat 77, neon 1b, table 0d; held out when divisible by 16.
    words = ("able", "ABLE", "actor", "cat", "neon", "table")
    assert [SPELL.is_held_out(word) for word in words] == [True] * 3 + [False] * 3
    train, kept = PRETRAIN.split_words()
    assert not any(map(SPELL.is_held_out, train)) and all(map(SPELL.is_held_out, kept))
    assert 0.04 < len(kept) / (len(train) + len(kept)) < 0.085  # one in 16 is 0.0625
    envs = [await environment(seed=seed, eval_words=600) for seed in (0, 0, 1)]
    first, same, other = (words_of(list(itertools.islice(env.train_tasks, 4000))) for env in envs)
    held_out = words_of(envs[0].eval_tasks)
    assert first == same and first[:50] != other[:50]
    assert held_out == words_of(envs[2].eval_tasks)
    assert set(first).isdisjoint(held_out)
    assert len(held_out) == len(set(held_out)) == 600  # of 858, each once
    assert all(3 <= len(word) <= 5 and word.islower() for word in first + held_out)


async def test_reward_by_hand() -> None:
    task = {"question": "…: neon", "answer": "noen", "metadata": {"word": "neon"}}
    env, partial = await environment(), await environment(partial_credit=True)
    answers = ("noen", " noen\n", "NOEN", "noe", "nxen", "neon", "noenn", "")
    assert [env.score(text, task) for text in answers] == [1.0] * 3 + [0.0] * 5
    # A quarter point per letter in its place; a right answer with letters after it gets 0.8 from reasoning-gym.
    found = [partial.score(text, task) for text in answers]
    assert found == pytest.approx([1.0, 1.0, 1.0, 0.75, 0.75, 0.5, 0.8, 0.0])


async def test_settings_without_a_task_are_refused() -> None:
    for message, settings in {
        r"--env\.min_word_len 6 is above --env\.max_word_len 5": {"min_word_len": 6, "max_word_len": 5},
        r"30-40 letters": {"min_word_len": 30, "max_word_len": 40},
        r"--env\.max_answer_tokens 64 leaves no room": {"max_answer_tokens": 64},
    }.items():
        with pytest.raises(ValueError, match=message):
            await environment(**settings)


async def test_a_group_is_token_exact(server: Any, tokenizer: Any) -> None:
    env = await environment(url=server.url, group_size=4, temperature=0.7, latency=0.05)
    task = {"question": f"{QUESTION}cat", "answer": "tac", "metadata": {"word": "cat"}}
    started = time.monotonic()
    group, backlog = await env.collect_trajectories(task)
    assert time.monotonic() - started >= 0.05, "scoring takes --env.latency"
    prompt = tokenizer.encode(f"<|im_start|>user\n{QUESTION}cat<|im_end|>\n<|im_start|>assistant\n")
    right, wrong = [*tokenizer.encode("tac"), EOS], [*tokenizer.encode("zz"), EOS]
    hidden, shown = [-100] * len(prompt), [1.0] * len(prompt)
    assert backlog == []
    assert group == {
        "tokens": [prompt + right, prompt + wrong] * 2,
        "masks": [hidden + right, hidden + wrong] * 2,
        "scores": [1.0, 0.0, 1.0, 0.0],
        "inference_logprobs": [[*shown, -0.25, -0.5, -0.75, -1.0], [*shown, -0.25, -0.5, -0.75]] * 2,
        "generation_params": {"temperature": 0.7},
    }
    [sent] = server.requests
    assert list(sent.prompt_token_ids) == prompt
    assert (sent.n, sent.max_tokens, sent.temperature) == (4, 8, 0.7)


def test_evaluate_scores_every_held_out_word_without_torch(server: Any, tmp_path: Path) -> None:
    server.answers = [None, "zz", "zz", "zz"]  # one of four samples is right
    # A torch that cannot be imported stands in front of the real one: the process must not even try.
    (tmp_path / "torch.py").write_text("raise SystemExit('the environment imported torch')\n")
    options = {f"{part}.tokenizer_name": demo_model_path() for part in ("openai", "env")} | {"slurm": "false"}
    options |= {"openai.base_url": server.url, "openai.model_name": "demo", "openai.api_key": "x"}
    options |= {"openai.server_type": "vllm", "env.use_wandb": "false", "env.eval_words": 10, "env.eval_samples": 4}
    options |= {"env.seed": 7, "env.data_dir_to_save_evals": tmp_path / "evals"}
    command = [sys.executable, str(EXAMPLES / "environments" / "spell_backward.py"), "evaluate"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    variables = {**os.environ, "PYTHONPATH": str(tmp_path), "WANDB_MODE": "disabled"}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "held-out mean reward 0.2500 over 40 sequences" in result.stdout
    written = json.loads((tmp_path / "evals" / "metrics.json").read_text())
    metrics = {"eval/mean_reward": 0.25, "eval/exact_match": 0.25, "eval/words": 10.0, "eval/sequences": 40.0}
    assert written["results"]["all"] == metrics
    assert written["config_general"]["generation_parameters"] == {"max_new_tokens": 8, "temperature": 1.0, "n": 4}
    samples = [json.loads(line) for line in (tmp_path / "evals" / "samples.jsonl").read_text().splitlines()]
    assert [sample["score"] for sample in samples] == [1.0, 0.0, 0.0, 0.0] * 10
    answer = samples[0]["question"].removeprefix(QUESTION)[::-1]
    assert samples[0] == {"question": samples[0]["question"], "expected": answer, "answer": answer, "score": 1.0}
    assert [request.n for request in server.requests] == [4] * 10


async def test_a_pair_is_held_out_in_both_orders_and_never_trained() -> None:
    def pairs(tasks: Any) -> set[tuple[int, ...]]:
        return {tuple(map(int, task["metadata"]["expression"].split(" + "))) for task in tasks}

    sums = await environment(SUMS)
    trained, held_out = set(sums.train_pairs), pairs(sums.eval_tasks)
    assert not trained & held_out
    assert len(trained) + len(held_out) == 144
    assert held_out == {(right, left) for left, right in held_out}
    assert len(held_out) == 27  # 15 pairs, three of them of one number twice
    assert pairs(itertools.islice(sums.train_tasks, 200)) <= trained


async def test_the_last_number_of_an_answer_counts() -> None:
    sums = await environment(SUMS)
    answers = ("12", "5 + 7 = 12.", "The answer is 12.0", "12, not 13", "-12", "")
    assert [sums.score(answer, sums._task(5, 7)) for answer in answers] == [1.0] * 3 + [0.0] * 3


@pytest.fixture
def model() -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(demo_model_path()).eval()
    torch.set_num_threads(threads)


def test_the_model_is_a_small_standard_qwen2_and_readable_by_all(model: Any, tokenizer: Any) -> None:
    files = [path for path in demo_model_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert sum(p.numel() for p in model.parameters()) == 822_016
    assert next(model.parameters()).dtype is torch.float32
    assert len(tokenizer) == model.config.vocab_size == 261
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == EOS


def test_the_tokenizer_spells_words_and_is_known_to_transformers_4_and_5(tokenizer: Any, tmp_path: Path) -> None:
    prompt = f"<|im_start|>user\n{QUESTION}neon<|im_end|>\n<|im_start|>assistant\n"
    for text in ("\n", "line one\r\n\tline  two \n\n", "héllo — 日本語 🙂", prompt):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert max(tokenizer.encode(text)) < 261
    asked = [{"role": "user", "content": f"{QUESTION}neon"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == prompt
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("<|im_start|>user\na neon<|im_end|>"))
    assert pieces == ["<|im_start|>", *"user", "Ċ", "a", "Ġ", *"neon", "<|im_end|>"]
    assert PRETRAIN.Examples(tokenizer, ["neon"], seed=0).prompt("neon") == tokenizer.encode(prompt)
    # transformers 5 saves TokenizersBackend, which transformers 4, and so every environment, cannot load.
    shipped = json.loads((demo_model_path() / "tokenizer_config.json").read_text())
    assert shipped["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in shipped
    PRETRAIN.save_tokenizer(PRETRAIN.build_tokenizer(), tmp_path)
    for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (demo_model_path() / name).read_bytes(), name


def test_success_on_held_out_words_is_as_documented(model: Any, tokenizer: Any) -> None:
    train, held_out = PRETRAIN.split_words()
    examples = PRETRAIN.Examples(tokenizer, train, seed=0)
    words = random.Random(7).sample(held_out, 64)
    assert PRETRAIN.success_rate(model, examples, words, greedy=True) >= 0.9
    torch.manual_seed(0)
    sampled = PRETRAIN.success_rate(model, examples, words, greedy=False, samples=8)
    assert 0.15 <= sampled <= 0.45


@pytest.mark.usefixtures("model")  # its threads are given back
def test_a_short_pretraining_runs_and_saves_a_loadable_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, held_out = PRETRAIN.split_words()
    monkeypatch.setattr(PRETRAIN, "split_words", lambda: (train, held_out[:20]))
    settings = ["--seed", "5", "--clean-steps", "2", "--mixed-steps", "1", "--batch-size", "8", "--threads", "1"]
    result = PRETRAIN.main(["--out", str(tmp_path), *settings])
    assert "step 3/3" in capsys.readouterr().out
    assert (result["parameters"], result["greedy_success"]) == (822_016, 0.0)  # three steps teach nothing
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path).parameters()) == 822_016
    assert AutoTokenizer.from_pretrained(tmp_path).decode([257]) == "<|im_start|>"


def test_missing_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=r"demo_model/model\.safetensors; make it with"):
        assets.demo_model_path()
