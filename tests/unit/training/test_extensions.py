"""A user's function decides: where each of the four is called, what it gets, and what is wrong with one that cannot be.

Every function named here by ``test_extensions:…`` is one of this module.
"""

import json
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from atropos_verl.backends.local.worker import LossFunction
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.protocol.wire import decode_batch
from atropos_verl.training import extensions
from atropos_verl.training.samples import build_samples, collect_samples, sample_settings
from atropos_verl.types import SampleReport, ScoredGroup

ME = __name__
EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "extensions"
KEYS = ("loss.path", "algorithm.advantage_path", "data.filter_path", "reward.path")


@pytest.fixture(autouse=True)
def _own_launch_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(extensions.LAUNCH_DIRECTORY, str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path, str(EXAMPLES)])


def constant_loss(logprobs: Any, advantages: Any, loss_mask: Any, num_loss_tokens: int, **_: Any) -> Any:
    return torch.tensor(2.5), {"tokens": num_loss_tokens}


def mean_loss(logprobs: Any, advantages: Any, loss_mask: Any, num_loss_tokens: int, **given: Any) -> Any:
    assert set(given) == {"old_logprobs", "rollout_logprobs", "sequence_ids"}
    return (logprobs * advantages * loss_mask).sum() / num_loss_tokens, {"sequences": int(given["sequence_ids"].max())}


def by_token(scores: Any, group: ScoredGroup) -> Any:
    return [np.arange(len(tokens)) * score for tokens, score in zip(group.token_ids, scores, strict=True)]


def high_scores(groups: list[ScoredGroup]) -> list[bool]:
    return [bool(group.scores.max() > 0.5) for group in groups]


def by_length(prompts: list[str], completions: list[str]) -> list[float]:
    assert prompts == ["5,6", "5,6"]
    return [float(len(completion)) for completion in completions]


def one_argument(x: Any) -> Any: ...


def decode(tokens: list[int], skip_special_tokens: bool = False) -> str:
    return ",".join(map(str, tokens))


def group(scores: tuple[float, float] = (1.0, 0.0), **changes: Any) -> dict[str, Any]:
    masks = [[-100, -100, 7], [-100, -100, 8, 2]]
    return {"tokens": [[5, 6, 7], [5, 6, 8, 2]], "masks": masks, "scores": list(scores), **changes}


def groups(*entries: dict[str, Any]) -> list[ScoredGroup]:
    return decode_batch(json.dumps({"batch": list(entries)}).encode())


def build(*entries: dict[str, Any], **config: Any) -> SampleReport:
    return build_samples(groups(*entries), sample_settings(RunConfig.from_mapping(config), None))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_colon", "package.module:function"),
        (":f", "package.module:function"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("broken_module:f", "importing broken_module raised ZeroDivisionError"),
        (f"{ME}:no_such_function", "has no 'no_such_function'"),
        (f"{ME}:ME", "is a str, not a function"),
        (f"{ME}:one_argument.no", "has no 'one_argument.no'"),
    ],
)
def test_a_path_that_names_no_function_is_refused_by_its_key(key: str, path: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    section, name = key.split(".")
    config = RunConfig.from_mapping({section: {name: path}})
    for prefix in ("", "atropos."):
        with pytest.raises(ConfigError, match=said) as caught:
            extensions.check_extensions(config, prefix)
        assert caught.value.key == prefix + key
        assert str(caught.value).startswith(f"{prefix}{key}: ")


@pytest.mark.parametrize("key", [key for key in KEYS if key != "data.filter_path"])
def test_a_function_that_does_not_take_the_arguments_is_refused_and_told_which_they_are(key: str) -> None:
    with pytest.raises(ConfigError, match=r"one_argument\(x.*cannot be called as f\(\w+, "):
        extensions.load_function(key, f"{ME}:one_argument")


def test_a_module_is_found_in_the_directory_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(extensions.LAUNCH_DIRECTORY)
    (tmp_path / "found_beside_the_command.py").write_text("def keep(groups): return []\n")
    monkeypatch.chdir(tmp_path)
    extensions.load_function("data.filter_path", "found_beside_the_command:keep")
    # A child process works in another directory; it inherits the variable.
    monkeypatch.chdir("/")
    sys.path.remove(str(tmp_path))
    del sys.modules["found_beside_the_command"]
    extensions.load_function("data.filter_path", "found_beside_the_command:keep")


def test_loss_path_stands_alone() -> None:
    for other in ({"loss": {"path": f"{ME}:mean_loss", "type": "grpo"}}, {"use_advantage_weighting": True}):
        with pytest.raises(ConfigError, match="is the loss; leave"):
            RunConfig.from_mapping({"loss": {"path": f"{ME}:mean_loss"}} | other)


def micro_batch() -> tuple[dict[str, Any], dict[str, Any]]:
    """Sequences of 3 and 4 tokens as verl's engine gives them: entry t of its logprobs is of token t + 1."""
    values = torch.tensor([-0.1, -0.2, 0.0, -0.3, -0.4, -0.5, 0.0], requires_grad=True)
    rows = {
        "input_ids": ([5, 6, 7], [5, 6, 8, 2]),
        "loss_mask": ([0, 0, 1], [0, 0, 1, 1]),
        "advantages": ([0.0, 0.0, 2.0], [0.0, 0.0, -1.0, -1.0]),
    }
    data: dict[str, Any] = {"batch_num_tokens": 3, "dp_size": 1}
    for name, values_of in rows.items():
        data[name] = torch.nested.as_nested_tensor([torch.tensor(row) for row in values_of], layout=torch.jagged)
    return {"log_probs": SimpleNamespace(values=lambda: values), "leaf": values}, data


@pytest.mark.parametrize(
    ("name", "value", "gradient", "figure"),
    [  # (2·(-0.2) - (-0.4) - (-0.5)) / 3
        ("mean_loss", 0.5 / 3, [0, 2 / 3, 0, 0, -1 / 3, -1 / 3, 0], {"sequences": 1.0}),
        ("constant_loss", 2.5, [0] * 7, {"tokens": 3.0}),
    ],
)
def test_a_users_loss_is_the_loss_and_its_gradient(
    name: str, value: float, gradient: list[float], figure: dict[str, float]
) -> None:
    output, data = micro_batch()
    function = LossFunction(RunConfig.from_mapping({"loss": {"path": f"{ME}:{name}"}}))
    function.start()
    loss, _ = function(output, data)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(value)
    assert output["leaf"].grad.tolist() == pytest.approx(gradient)
    assert function.finish().items() >= figure.items()


def test_under_ray_the_users_loss_is_registered_with_verl_and_decides() -> None:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    from atropos_verl.backends.ray.workers import register_user_loss

    path = f"{ME}:mean_loss"
    config = SimpleNamespace(actor=SimpleNamespace(policy_loss=SimpleNamespace(loss_mode=path)))
    for _ in range(2):  # a second worker class in the same process
        register_user_loss(config)
    log_prob = torch.tensor([[-0.2, 0.0], [-0.4, -0.5]], requires_grad=True)
    loss, metrics = get_policy_loss_fn(path)(
        old_log_prob=torch.zeros(2, 2),
        log_prob=log_prob,
        advantages=torch.tensor([[1.0, 9.0], [-1.0, -1.0]]),
        response_mask=torch.tensor([[1, 0], [1, 1]]),
        config=SimpleNamespace(global_batch_info={"dp_size": 2, "batch_num_tokens": 3}),
        rollout_is_weights=torch.tensor([[2.0, 1.0], [1.0, 1.0]]),
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2 * 0.5 / 3)
    assert log_prob.grad.flatten().tolist() == pytest.approx([4 / 3, 0, -2 / 3, -2 / 3])
    assert metrics == {"actor/sequences": 1.0}


def test_a_users_advantages_replace_the_estimator_and_those_of_the_environment_replace_them() -> None:
    def rows(report: SampleReport) -> list[list[float]]:
        return [sample.advantages.tolist() for sample in report.samples]

    algorithm, scores = {"advantage_path": f"{ME}:by_token"}, (3.0, 2.0)
    assert rows(build(group(scores), algorithm=algorithm)) == [[0, 0, 6.0], [0, 0, 4.0, 6.0]]
    own = [[9.0] * 3, None]
    assert rows(build(group(scores, advantages=own), algorithm=algorithm)) == [[0, 0, 9.0], [0, 0, 4.0, 6.0]]
    assert rows(build(group((0.0, 0.0)), algorithm=algorithm)) == [[0] * 3, [0] * 4]
    clipped = build(group(scores), algorithm=algorithm, advantage_clipping=[-1.0, 5.0])
    assert rows(clipped) == [[0, 0, 5.0], [0, 0, 4.0, 5.0]]


def test_what_a_filter_leaves_out_is_counted_logged_and_in_no_baseline(caplog: pytest.LogCaptureFixture) -> None:
    config = RunConfig.from_mapping({"data": {"filter_path": f"{ME}:high_scores"}})
    bad = group(scores=(math.nan, 0.0))
    with caplog.at_level(logging.INFO):
        report, advantages = collect_samples(groups(group(), group((0.25, 0.0)), bad), sample_settings(config, None))
    assert [kept.scores.tolist() for kept in report.filtered] == [[0.25, 0.0]]
    assert (len(report.used), len(report.samples), len(advantages), len(report.quarantined)) == (1, 2, 2, 1)
    assert [score for _, score in report.scores] == [1.0, 0.0]
    assert "1 of 2 groups are left out by data.filter_path" in caplog.text


def test_a_users_reward_scores_the_text_after_the_prompt() -> None:
    [scored] = groups(group())
    rescored = extensions.load_rescoring(f"{ME}:by_length", decode)(scored)
    assert rescored.scores.tolist() == [1.0, 3.0]  # "7" and "8,2"
    assert rescored.group_id == scored.group_id


def scores(path: str) -> Any:
    """``reward_fn`` of ``AtroposTrainer``, which is a function and not a path."""
    return lambda _: extensions.scores_of(path, extensions.load_function("reward.path", path), ["a"] * 2, ["b"] * 2)


def rescore(path: str) -> Any:
    return extensions.load_rescoring(path, decode)


def keep(path: str) -> Any:
    return lambda group: extensions.load_filter(path)([group, group])


@pytest.mark.parametrize(
    ("load", "wrong", "said"),
    [
        (extensions.load_loss, 3.0, r"returned float 3.0, not \(loss, metrics\)"),
        (extensions.load_loss, None, r"returned NoneType None, not \(loss, metrics\)"),
        (extensions.load_loss, (torch.zeros(2), {}), r"a loss of \(2,\), not a tensor without dimensions"),
        (extensions.load_loss, (torch.zeros(()), {"x": None}), "returned metrics dict {'x': None}: "),
        (extensions.load_loss, (torch.zeros(()), [1]), r"not \(loss, metrics\)"),
        (extensions.load_advantage, [1.0], r"returned 1 advantages, not 2: list \[1.0\]"),
        (extensions.load_advantage, None, "returned NoneType None, not a list of 2 advantages"),
        (extensions.load_advantage, [None, 0.0], "returned NoneType None as advantage of sequence 0; it"),
        (extensions.load_advantage, [[1.0, 2.0], 0.0], r"advantage of sequence 0; .*, and a number or \(3,\)"),
        (extensions.load_advantage, [math.inf, 0.0], "returned float inf as advantage of sequence 0"),
        (keep, [True], "returned 1 values, not 2"),
        (keep, [True, None], "returned NoneType None as value 1"),
        (keep, [0.5, True], "returned 0.5 as value 0, not True or False"),
        (keep, [math.nan, True], "returned float nan as value 0"),
        *((load, *case) for load in (scores, rescore) for case in (
            ([1.0], "returned 1 scores, not 2"),
            (None, "returned NoneType None, not a list of 2 scores"),
            (0.5, "returned float 0.5, not a list of 2 scores"),
            ("12", "returned str '12', not a list of 2 scores"),
            ([1.0, math.nan], "returned float nan as score 1"),
            ([1.0, None], "returned NoneType None as score 1"),
            ([1.0, "1"], "returned str '1' as score 1"),
            ([[1.0], [2.0]], r"returned list \[1.0\] as score 0"),
        )),
        *((load, ValueError("no such word"), r"raised ValueError: no such word \(.*test_extensions.py:\d+\)")
          for load in (extensions.load_loss, extensions.load_advantage, keep, scores, rescore)),
    ],
)  # fmt: skip
def test_a_result_that_does_not_fit_is_refused_by_function_and_value(
    load: Any, wrong: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def function(*_: Any, **__: Any) -> Any:
        if isinstance(wrong, Exception):
            raise wrong
        return wrong

    [scored] = groups(group())
    monkeypatch.setattr(sys.modules[ME], "wrong", function, raising=False)
    with pytest.raises(ConfigError, match=rf"^[\w.]+: {ME}:wrong .*{said}"):
        load(f"{ME}:wrong")(torch.zeros(2) if load is extensions.load_loss else scored)


def test_the_floored_loss_stops_pushing_below_the_floor() -> None:
    loss = extensions.load_loss("floored_loss:loss")
    logprobs = torch.tensor([-1.0, -11.0, -11.0, -5.0], requires_grad=True)
    output = loss(
        logprobs, torch.tensor([1.0, 1.0, -1.0, 3.0]), torch.tensor([True, True, True, False]), 4,
        old_logprobs=None, rollout_logprobs=None, sequence_ids=torch.zeros(4, dtype=torch.int64),
    )  # fmt: skip
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx((1.0 + 11.0) / 4)
    assert logprobs.grad.tolist() == [-0.25, -0.25, 0.0, 0.0]
    assert output.metrics == {"floored": 1.0}


def test_the_other_examples() -> None:
    config = {"algorithm": {"advantage_path": "median_advantage:advantage"}}
    report = build(group((4.0, 1.0)), **config)
    assert [sample.advantages.max() or sample.advantages.min() for sample in report.samples] == [1.5, -1.5]
    report = build(group((0.5, 0.45)), group(), data={"filter_path": "spread_filter:keep"})
    assert (len(report.used), len(report.filtered)) == (1, 1)
    reward = extensions.load_function("reward.path", "spelling_reward:score")
    prompt = "Spell this word backward (example: sun -> nus): cat<|im_end|>\n<|im_start|>assistant\n"
    assert reward([prompt, prompt], ["tac", "tc"]) == [1.0, pytest.approx(1 / 3)]
