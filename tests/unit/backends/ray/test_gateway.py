"""The engine over verl's replicas, against a client that aborts at given tokens."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from support.tiny_model import build_tiny_tokenizer
from verl.workers.rollout.replica import TokenOutput

from atropos_verl.backends.ray.gateway import AttemptClient, ReplicaEngine, to_structured
from atropos_verl.engine.protocol import GenerationEngine
from atropos_verl.engine.requests import EngineLimits
from atropos_verl.errors import EngineError, EngineStoppedError, GenerationRequestError
from atropos_verl.types import UNKNOWN_VERSION, Constraint, Generation, GenerationRequest

_EOS = 258


@dataclass
class _Replica:
    """Writes ``script`` (the completion it would give), and is aborted after so many tokens of it in all.

    Its weights are of step ``10 * (aborts so far)``. Logprobs name the position and the version, so that each value
    in the answer can be traced: ``-(position + version / 1000)``.
    """

    script: list[int]
    abort_at: list[int] = field(default_factory=list)
    turned_away: int = 0
    says_reason: bool = True
    change: Callable[[Any], None] = lambda output: None
    """Applied to every answer before it is returned."""
    calls: list[dict[str, Any]] = field(default_factory=list)
    prompt_len: int = 3

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> TokenOutput:
        self.calls.append({"request_id": request_id, "prompt_ids": list(prompt_ids), **sampling_params})
        await asyncio.sleep(0)
        if self.turned_away:
            self.turned_away -= 1
            nothing = {"global_steps": 0, "min_global_steps": 0, "max_global_steps": 0}
            return TokenOutput(token_ids=[], log_probs=None, stop_reason="aborted", extra_fields=nothing)
        done = len(prompt_ids) - self.prompt_len
        version = 10 * sum(at <= done for at in self.abort_at)
        limit = min(len(self.script), done + sampling_params["max_tokens"])
        cut = next((at for at in self.abort_at if done < at < limit), None)
        end = limit if cut is None else cut
        extra: dict[str, Any] = {"min_global_steps": version, "max_global_steps": version, "global_steps": version}
        extra["asked"] = sampling_params.get("prompt_logprobs")
        reason = "stop" if end == len(self.script) else "length"
        if self.says_reason and cut is None:
            extra["finish_reason"] = reason
        output = TokenOutput(
            token_ids=self.script[done:end],
            log_probs=[-(position + version / 1000) for position in range(done, end)],
            stop_reason="completed" if cut is None else "aborted",
            extra_fields=extra,
        )
        self.change(output)
        return output


def _engine(replica: Any) -> ReplicaEngine:
    limits = EngineLimits(max_context_len=64, vocab_size=259, eos_token_ids=frozenset({_EOS}))
    return ReplicaEngine(replica, build_tiny_tokenizer(), limits)


def _request(**settings: Any) -> GenerationRequest:
    return GenerationRequest(**({"prompt_token_ids": (1, 2, 3), "max_tokens": 40} | settings))


async def _one(engine: ReplicaEngine, **settings: Any) -> Generation:
    [generation] = await engine.agenerate(_request(**settings))
    return generation


@pytest.mark.parametrize("abort_at", [[], [1], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 7]])
async def test_an_aborted_answer_goes_on_from_its_tokens_and_loses_nothing(abort_at: list[int]) -> None:
    script = [*range(20, 29), _EOS]
    replica = _Replica(script, abort_at)
    engine = _engine(replica)
    answer = await _one(engine)
    assert list(answer.token_ids) == script and answer.finish_reason == "stop"
    versions = [10 * sum(at <= position for at in abort_at) for position in range(10)]
    assert answer.logprobs == pytest.approx([-(i + v / 1000) for i, v in enumerate(versions)])
    assert answer.policy_versions == (versions[0], versions[-1])
    assert answer.policy_version_runs == tuple((v, len(list(run))) for v, run in groupby(versions))
    assert isinstance(engine, GenerationEngine)
    assert engine.policy_version == versions[-1]
    starts = [0, *abort_at]
    assert [call["prompt_ids"] for call in replica.calls] == [[1, 2, 3, *script[:start]] for start in starts]
    assert [call["max_tokens"] for call in replica.calls] == [40 - start for start in starts]
    assert all(call["logprobs"] is True for call in replica.calls)


@pytest.mark.parametrize("says_reason", [True, False])
@pytest.mark.parametrize(
    ("script", "max_tokens", "settings", "reason"),
    [
        (list(range(30)), 12, {}, "length"),
        ([5, 6, _EOS], 12, {}, "stop"),
        ([5, 6, _EOS], 3, {}, "stop"),
        ([5, 6, 7], 3, {"stop_token_ids": (7,)}, "stop"),
        (list(range(100)), None, {}, "length"),
    ],
)
async def test_finish_reason_is_known_whether_or_not_the_replica_says_it(
    says_reason: bool, script: list[int], max_tokens: int | None, settings: dict[str, Any], reason: str
) -> None:
    for abort_at in ([], [2]):
        engine = _engine(_Replica(script, abort_at, says_reason=says_reason))
        answer = await _one(engine, max_tokens=max_tokens, **settings)
        assert answer.finish_reason == reason
        assert len(answer.token_ids) == min(len(script), max_tokens or 61)


async def test_an_abort_at_the_very_last_token_allowed_ends_with_length() -> None:
    replica = _Replica(list(range(30)), change=lambda output: setattr(output, "stop_reason", "aborted"))
    answer = await _one(_engine(replica), max_tokens=5)
    assert answer.finish_reason == "length" and len(answer.token_ids) == 5 and len(replica.calls) == 1


@pytest.mark.parametrize("cut", range(1, 16))
async def test_a_stop_string_cut_in_two_by_an_abort_still_stops(cut: int) -> None:
    # A replica sees the tokens of its own attempt only, so this one never finds the string itself.
    text = "abc</answer>xyz and more"
    replica = _Replica(list(build_tiny_tokenizer()(text).input_ids), [cut])
    answer = await _one(_engine(replica), stop=("</answer>",))
    if 3 <= cut < 12:
        assert build_tiny_tokenizer().decode(answer.token_ids) == "abc</answer>"
        assert answer.finish_reason == "stop" and len(answer.logprobs) == len(answer.token_ids)
    else:  # whole inside one attempt: the replica's business
        assert len(answer.token_ids) == len(text)


async def test_a_replica_that_turns_requests_away_is_asked_again() -> None:
    replica = _Replica([5, _EOS], turned_away=3)
    answer = await _one(_engine(replica))
    assert answer.token_ids == (5, _EOS)
    assert [call["max_tokens"] for call in replica.calls] == [40] * 4


@pytest.mark.parametrize("kind", [EngineError, EngineStoppedError])
async def test_a_request_outlasts_replicas_that_fail_or_die_and_goes_on_from_its_tokens(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    monkeypatch.setattr("atropos_verl.backends.ray.gateway._NO_SERVER_RETRY", 0.0)

    def die(output: Any) -> None:
        if 2 <= len(replica.calls) <= 8:
            raise kind("killed")

    replica = _Replica([5, 6, 7, _EOS], [2], change=die)
    answer = await _one(_engine(replica))
    assert answer.token_ids == (5, 6, 7, _EOS)
    assert [call["prompt_ids"] for call in replica.calls] == [[1, 2, 3], *[[1, 2, 3, 5, 6]] * 8]


async def test_a_dead_load_balancer_is_told_to_the_trainer_and_the_request_refused() -> None:
    async def gone(*_: Any, **__: Any) -> Any:
        raise RayActorError

    client = AttemptClient(config=None, load_balancer_handle=None)
    client._acquire_server = gone
    with pytest.raises(EngineStoppedError, match="load balancer is gone"):
        await client.generate("a", prompt_ids=[1], sampling_params={})
    assert client.lost.is_set()


async def test_n_completions_are_separate_requests_with_random_streams_of_their_own() -> None:
    replica = _Replica([5, 6, 7, _EOS], [2])
    generations = await _engine(replica).agenerate(_request(n=3, seed=1))
    assert [g.token_ids for g in generations] == [(5, 6, 7, _EOS)] * 3
    assert len({call["request_id"] for call in replica.calls}) == 3
    assert len({call["seed"] for call in replica.calls}) == 6  # a continuation must not repeat the numbers


async def test_streaming_hands_over_attempt_by_attempt_and_ends_each_completion_once() -> None:
    deltas = [delta async for delta in _engine(_Replica([5, 6, 7, _EOS], [1, 3])).astream(_request(n=2))]
    for index in (0, 1):
        mine = [delta for delta in deltas if delta.index == index]
        assert [delta.token_ids for delta in mine] == [(5,), (6, 7), (_EOS,)]
        assert [delta.finish_reason for delta in mine] == [None, None, "stop"]
        assert [len(delta.logprobs) for delta in mine] == [1, 2, 1]
        assert [delta.policy_version for delta in mine] == [0, 10, 20]


@pytest.mark.parametrize(
    ("tokens", "runs"), [(1, ((4, 1),)), (2, ((3, 1), (4, 1))), (5, ((3, 1), (UNKNOWN_VERSION, 3), (4, 1)))]
)
async def test_a_replica_that_knows_only_first_and_last_policy_is_not_credited_with_more(
    tokens: int, runs: tuple[tuple[int, int], ...]
) -> None:
    spans = {"min_global_steps": 3, "max_global_steps": 4}
    answer = await _one(_engine(_Replica([7] * tokens, change=lambda output: output.extra_fields.update(spans))))
    assert answer.policy_version_runs == runs


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_breaks_every_replica_ends_with_the_cause_and_cancels_the_rest(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr("atropos_verl.backends.ray.gateway._NO_SERVER_RETRY", 0.0)

    def break_the_second(_: Any) -> None:
        if replica.calls[-1]["request_id"].endswith("-1"):
            raise EngineError("the replica broke")

    replica = _Replica([5] * 30, [*range(1, 30)], change=break_the_second)
    engine = _engine(replica)
    with pytest.raises(EngineStoppedError, match="failed 8 times at this request, the last time: the replica broke"):
        if stream:
            _ = [delta async for delta in engine.astream(_request(n=2))]
        else:
            await engine.agenerate(_request(n=2))
    assert len(asyncio.all_tasks()) == 1


async def test_cancelling_reaches_the_client() -> None:
    asked, answer = asyncio.Event(), asyncio.get_running_loop().create_future()

    def generate(*_: Any, **__: Any) -> Any:
        asked.set()
        return answer

    task = asyncio.ensure_future(_engine(SimpleNamespace(generate=generate)).agenerate(_request()))
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert answer.cancelled()


async def test_missing_logprobs_and_a_prompt_that_does_not_fit_are_refused() -> None:
    replica = _Replica([5, _EOS], change=lambda output: setattr(output, "log_probs", None))
    with pytest.raises(GenerationRequestError, match="64 tokens; the context holds 64"):
        await _one(_engine(replica), prompt_token_ids=(1,) * 64)
    assert replica.calls == []
    with pytest.raises(EngineError, match="2 tokens with 0 logprobs"):
        await _one(_engine(replica))


async def test_prompt_logprobs_hold_the_prompts_own_token_beside_the_best() -> None:
    def score(output: Any) -> None:
        own = output.extra_fields["asked"] == 0
        rows = [[2], [3], [0]] if own else [[9, 8], [3, 9], [0, 0]]
        values = [[-5.0], [-0.5], [0.0]] if own else [[-1.0, -2.0], [-0.5, -3.0], [0.0, 0.0]]
        output.extra_fields |= {"prompt_ids": rows, "prompt_logprobs": values}

    engine = _engine(_Replica([_EOS], change=score))
    generation = await _one(engine, prompt_logprobs=2)
    assert generation.prompt_logprobs == (None, {2: -5.0, 9: -1.0, 8: -2.0}, {3: -0.5, 9: -3.0})
    generation = await _one(engine, prompt_logprobs=0)
    assert generation.prompt_logprobs == (None, {2: -5.0}, {3: -0.5})


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_aborted_constrained_answer_begins_again(streamed: bool) -> None:
    """What a replica samples after an abort would be held to the grammar from its beginning."""
    replica = _Replica([20, 21, 22, _EOS], abort_at=[2])
    replica.change = lambda output: replica.abort_at.clear()
    constraint = Constraint(grammar="start: /.*/")
    request = _request(constraint=constraint)
    if streamed:
        deltas = [delta async for delta in _engine(replica).astream(request)]
        tokens = [token for delta in deltas for token in delta.token_ids]
    else:
        [generation] = await _engine(replica).agenerate(request)
        tokens = list(generation.token_ids)
    assert tokens == [20, 21, 22, _EOS]
    assert [(call["prompt_ids"], call["constraint"]) for call in replica.calls] == [([1, 2, 3], constraint)] * 2


def test_what_kind_of_replica_enforces_what() -> None:
    schema = Constraint(grammar='start: %json {"type": "object"}', json_schema='{"type": "object"}')
    calls = Constraint(grammar="start: /x/", param="tool_choice")
    assert to_structured(schema, "sglang") == {"json_schema": schema.json_schema}
    for kind, constraint in (("sglang", calls), ("trtllm", schema)):
        with pytest.raises(GenerationRequestError, match=kind) as caught:
            to_structured(constraint, kind)
        assert caught.value.param == constraint.param


async def test_alternatives_are_refused_by_name() -> None:
    with pytest.raises(GenerationRequestError, match="top_logprobs"):
        await _one(_engine(_Replica([_EOS])), top_logprobs=2)
