"""The engine over verl's replicas, against a client that aborts at given tokens."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from ray.exceptions import RayActorError
from support.tiny_model import build_tiny_tokenizer
from verl.workers.rollout.replica import TokenOutput

from atropos_verl.backends.ray import gateway
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
    change: Callable[[Any], None] = lambda output: None
    """Applied to every answer before it is returned."""
    calls: list[dict[str, Any]] = field(default_factory=list)

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> TokenOutput:
        self.calls.append({"request_id": request_id, "prompt_ids": list(prompt_ids), **sampling_params})
        await asyncio.sleep(0)
        done = len(prompt_ids) - 3
        version = 10 * sum(at <= done for at in self.abort_at)
        limit = min(len(self.script), done + sampling_params["max_tokens"])
        end = min([limit, *(at for at in self.abort_at if at > done)])
        extra: dict[str, Any] = dict.fromkeys(("min_global_steps", "max_global_steps", "global_steps"), version)
        if end == limit:
            extra["finish_reason"] = "stop" if end == len(self.script) else "length"
        output = TokenOutput(
            token_ids=self.script[done:end],
            log_probs=[-(position + version / 1000) for position in range(done, end)],
            stop_reason="completed" if end == limit else "aborted",
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


@pytest.mark.parametrize("change", [lambda output: None, lambda output: output.extra_fields.pop("finish_reason", None)])
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
    change: Callable[[Any], None], script: list[int], max_tokens: int | None, settings: dict[str, Any], reason: str
) -> None:
    for abort_at in ([], [2]):
        answer = await _one(_engine(_Replica(script, abort_at, change)), max_tokens=max_tokens, **settings)
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


@pytest.mark.parametrize("kind", [None, EngineError, EngineStoppedError])
async def test_a_request_outlasts_replicas_that_turn_it_away_fail_or_die_and_goes_on_from_its_tokens(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception] | None
) -> None:
    monkeypatch.setattr(gateway, "_NO_SERVER_RETRY", 0.0)
    monkeypatch.setattr(gateway, "_TURNED_AWAY_WAIT", (0.0, 0.0))

    def fail(output: Any) -> None:
        if 2 <= len(replica.calls) <= 8:
            if kind is not None:
                raise kind("killed")
            output.token_ids, output.log_probs, output.stop_reason = [], None, "aborted"

    replica = _Replica([5, 6, 7, _EOS], [2], change=fail)
    assert (await _one(_engine(replica))).token_ids == (5, 6, 7, _EOS)
    assert [call["prompt_ids"] for call in replica.calls] == [[1, 2, 3], *[[1, 2, 3, 5, 6]] * 8]


async def test_a_dead_load_balancer_is_told_to_the_trainer_and_the_request_refused() -> None:
    client = AttemptClient(config=None, load_balancer_handle=None)
    client._acquire_server = AsyncMock(side_effect=RayActorError)
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
    monkeypatch.setattr(gateway, "_NO_SERVER_RETRY", 0.0)

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
    client = Mock(generate=lambda *_, **__: asked.set() or answer)
    task = asyncio.ensure_future(_engine(client).agenerate(_request()))
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert answer.cancelled()


async def test_what_no_replica_can_do_and_tokens_without_logprobs_are_refused_by_name() -> None:
    replica = _Replica([5, _EOS], change=lambda output: setattr(output, "log_probs", None))
    with pytest.raises(GenerationRequestError, match="64 tokens; the context holds 64"):
        await _one(_engine(replica), prompt_token_ids=(1,) * 64)
    with pytest.raises(GenerationRequestError, match="top_logprobs"):
        await _one(_engine(replica), top_logprobs=2)
    assert replica.calls == []
    with pytest.raises(EngineError, match="2 tokens with 0 logprobs"):
        await _one(_engine(replica))


async def test_prompt_logprobs_hold_the_prompts_own_token_beside_the_best() -> None:
    def score(output: Any) -> None:
        own = replica.calls[-1]["prompt_logprobs"] == 0
        rows = [[2], [3], [0]] if own else [[9, 8], [3, 9], [0, 0]]
        values = [[-5.0], [-0.5], [0.0]] if own else [[-1.0, -2.0], [-0.5, -3.0], [0.0, 0.0]]
        output.extra_fields |= {"prompt_ids": rows, "prompt_logprobs": values}

    replica = _Replica([_EOS], change=score)
    own, best = [await _one(_engine(replica), prompt_logprobs=k) for k in (0, 2)]
    assert own.prompt_logprobs == (None, {2: -5.0}, {3: -0.5})
    assert best.prompt_logprobs == (None, {2: -5.0, 9: -1.0, 8: -2.0}, {3: -0.5, 9: -3.0})


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_aborted_constrained_answer_begins_again(streamed: bool) -> None:
    """What a replica samples after an abort would be held to the grammar from its beginning."""
    replica = _Replica([20, 21, 22, _EOS], abort_at=[2])
    replica.change = lambda output: replica.abort_at.clear()
    request = _request(constraint=(constraint := Constraint(grammar="start: /.*/")))
    parts: Any = [delta async for delta in _engine(replica).astream(request)] if streamed else None
    parts = parts or await _engine(replica).agenerate(request)
    assert [token for part in parts for token in part.token_ids] == [20, 21, 22, _EOS]
    assert [(call["prompt_ids"], call["constraint"]) for call in replica.calls] == [([1, 2, 3], constraint)] * 2


def test_what_kind_of_replica_enforces_what() -> None:
    schema = Constraint(grammar='start: %json {"type": "object"}', json_schema='{"type": "object"}')
    calls = Constraint(grammar="start: /x/", param="tool_choice")
    assert to_structured(schema, "sglang") == {"json_schema": schema.json_schema}
    for kind, constraint in (("sglang", calls), ("trtllm", schema)):
        with pytest.raises(GenerationRequestError, match=kind) as caught:
            to_structured(constraint, kind)
        assert caught.value.param == constraint.param
