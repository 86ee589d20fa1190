"""A user's function decides: where each is called, what it gets, and what is wrong with one that cannot be."""

import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.scripted_api import batch_of

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


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], str]:
    """The path of a function, as a user names it."""

    def name(function: Any) -> str:
        monkeypatch.setattr(sys.modules[ME], "of_the_user", function, raising=False)
        return f"{ME}:of_the_user"

    return name


def mean_loss(logprobs: Any, advantages: Any, loss_mask: Any, num_loss_tokens: int, **given: Any) -> Any:
    assert set(given) == {"old_logprobs", "rollout_logprobs", "sequence_ids"}
    return (logprobs * advantages * loss_mask).sum() / num_loss_tokens, {"sequences": int(given["sequence_ids"].max())}


def no_argument() -> Any: ...


def group(scores: tuple[float, float] = (1.0, 0.0), **changes: Any) -> dict[str, Any]:
    masks = [[-100, -100, 7], [-100, -100, 8, 2]]
    return {"tokens": [[5, 6, 7], [5, 6, 8, 2]], "masks": masks, "scores": list(scores), **changes}


def groups(*entries: dict[str, Any]) -> list[ScoredGroup]:
    return decode_batch(batch_of(entries))


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
        (f"{ME}:no_argument.no", "has no 'no_argument.no'"),
        (f"{ME}:no_argument", r"no_argument\(\) -> .*cannot be called as f\(\w+"),
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


def test_a_users_loss_is_the_loss_and_its_gradient() -> None:
    """Sequences of 3 and 4 tokens as verl's engine gives them: entry t of its logprobs is of token t + 1."""
    values = torch.tensor([-0.1, -0.2, 0.0, -0.3, -0.4, -0.5, 0.0], requires_grad=True)
    rows = {
        "input_ids": ([5, 6, 7], [5, 6, 8, 2]),
        "loss_mask": ([0, 0, 1], [0, 0, 1, 1]),
        "advantages": ([0.0, 0.0, 2.0], [0.0, 0.0, -1.0, -1.0]),
    }
    data: dict[str, Any] = {"batch_num_tokens": 3, "dp_size": 1}
    for name, own in rows.items():
        data[name] = torch.nested.as_nested_tensor([torch.tensor(row) for row in own], layout=torch.jagged)
    function = LossFunction(RunConfig.from_mapping({"loss": {"path": f"{ME}:mean_loss"}}))
    function.start()
    loss, _ = function({"log_probs": SimpleNamespace(values=lambda: values)}, data)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.5 / 3)  # (2·(-0.2) - (-0.4) - (-0.5)) / 3
    assert values.grad.tolist() == pytest.approx([0, 2 / 3, 0, 0, -1 / 3, -1 / 3, 0])
    assert function.finish()["sequences"] == 1.0


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


def test_a_users_advantages_replace_the_estimator_and_those_of_the_environment_replace_them(named: Any) -> None:
    def rows(*entries: Any, **config: Any) -> list[list[float]]:
        report = build(group(**{"scores": [3.0, 2.0], **dict(entries)}), algorithm={"advantage_path": path}, **config)
        return [sample.advantages.tolist() for sample in report.samples]

    path = named(
        lambda scores, group: [np.arange(len(ids)) * s for ids, s in zip(group.token_ids, scores, strict=True)]
    )
    assert rows() == [[0, 0, 6.0], [0, 0, 4.0, 6.0]]
    assert rows(("advantages", [[9.0] * 3, None])) == [[0, 0, 9.0], [0, 0, 4.0, 6.0]]
    assert rows(advantage_clipping=[-1.0, 5.0]) == [[0, 0, 5.0], [0, 0, 4.0, 5.0]]
    path = named(lambda scores, group: 2 * scores)  # one entry for each rollout
    assert rows(("scores", [3.0, 3.0]), ("rollout_ids", [4, 4])) == [[0, 0, 6.0], [0, 0, 6.0, 6.0]]


def test_what_a_filter_leaves_out_is_counted_logged_and_in_no_baseline(
    named: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = named(lambda groups: [group.scores.max() > 0.5 for group in groups])
    made = sample_settings(RunConfig.from_mapping({"data": {"filter_path": path}}), None)
    with caplog.at_level(logging.INFO):
        report, advantages = collect_samples(groups(group(), group((0.25, 0.0)), group((math.nan, 0.0))), made)
    assert [kept.scores.tolist() for kept in report.filtered] == [[0.25, 0.0]]
    assert (len(report.used), len(report.samples), len(advantages), len(report.quarantined)) == (1, 2, 2, 1)
    assert [score for _, score in report.scores] == [1.0, 0.0]
    assert "1 of 2 groups are left out by data.filter_path" in caplog.text


@pytest.mark.parametrize(("rollouts", "expected"), [({}, [1.0, 3.0]), ({"rollout_ids": [4, 4]}, [3.0, 3.0])])
def test_a_users_reward_scores_the_text_after_the_prompt_and_a_rollout_by_its_last_row(
    named: Any, rollouts: dict[str, Any], expected: list[float]
) -> None:
    """Of "7" and "8,2"."""
    path = named(lambda prompts, completions: [len(text) for text in completions if prompts == ["5,6"] * 2])
    [scored] = groups(group((3.0, 3.0), **rollouts))
    rescored = rescore(path)(scored)
    assert rescored.scores.tolist() == expected
    assert rescored.group_id == scored.group_id


def rescore(path: str) -> Any:
    return extensions.load_rescoring(path, lambda ids, **_: ",".join(map(str, ids)))


def keep(path: str) -> Any:
    return lambda group: extensions.load_filter(path)([group, group])


@pytest.mark.parametrize(
    ("load", "wrong", "said"),
    [
        (extensions.load_loss, 3.0, r"returned float 3.0, not \(loss, metrics\)"),
        (extensions.load_loss, (torch.zeros(2), {}), r"a loss of \(2,\), not a tensor without dimensions"),
        (extensions.load_loss, (torch.zeros(()), {"x": None}), "returned metrics dict {'x': None}: "),
        (extensions.load_advantage, [1.0], r"returned 1 advantages, not 2: list \[1.0\]"),
        (extensions.load_advantage, None, "returned NoneType None, not a list of 2 advantages"),
        (extensions.load_advantage, [[1.0, 2.0], 0.0], r"advantage of sequence 0; .*, and a number or \(3,\)"),
        (keep, [0.5, True], "returned 0.5 as value 0, not True or False"),
        (keep, [math.nan, True], "returned float nan as value 0"),
        (rescore, [1.0], "returned 1 scores, not 2"),
        (rescore, "12", "returned str '12', not a list of 2 scores"),
        (rescore, [1.0, math.nan], "returned float nan as score 1"),
        (rescore, [1.0, "1"], "returned str '1' as score 1"),
        *((load, ValueError("no such word"), r"raised ValueError: no such word \(.*test_extensions.py:\d+\)")
          for load in (extensions.load_loss, extensions.load_advantage, keep, rescore)),
    ],
)  # fmt: skip
def test_a_result_that_does_not_fit_is_refused_by_function_and_value(
    named: Any, load: Any, wrong: Any, said: str
) -> None:
    def function(*_: Any, **__: Any) -> Any:
        if isinstance(wrong, Exception):
            raise wrong
        return wrong

    [scored] = groups(group())
    with pytest.raises(ConfigError, match=rf"^[\w.]+: {ME}:of_the_user .*{said}"):
        load(named(function))(torch.zeros(2) if load is extensions.load_loss else scored)


def test_the_examples() -> None:
    loss = extensions.load_loss("floored_loss:loss")  # stops pushing below the floor
    logprobs = torch.tensor([-1.0, -11.0, -11.0, -5.0], requires_grad=True)
    given = dict.fromkeys(("old_logprobs", "rollout_logprobs", "sequence_ids"))
    output = loss(logprobs, torch.tensor([1.0, 1.0, -1.0, 3.0]), torch.tensor([True, True, True, False]), 4, **given)
    output.loss.backward()
    assert output.loss.item() == pytest.approx((1.0 + 11.0) / 4) and output.metrics == {"floored": 1.0}
    assert logprobs.grad.tolist() == [-0.25, -0.25, 0.0, 0.0]
    report = build(group((4.0, 1.0)), algorithm={"advantage_path": "median_advantage:advantage"})
    assert [sample.advantages[2] for sample in report.samples] == [1.5, -1.5]
    report = build(group((0.5, 0.45)), group(), data={"filter_path": "spread_filter:keep"})
    assert (len(report.used), len(report.filtered)) == (1, 1)
    reward = extensions.load_function("reward.path", "spelling_reward:score")
    prompt = "Spell this word backward (example: sun -> nus): cat<|im_end|>\n<|im_start|>assistant\n"
    assert reward([prompt, prompt], ["tac", "tc"]) == [1.0, pytest.approx(1 / 3)]
