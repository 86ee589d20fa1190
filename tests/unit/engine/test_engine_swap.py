"""Double-buffered weights: staged and checked while the engine generates, swapped at a token boundary."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.engines import (
    StepCounter,
    engine_of,
    greedy_oracle,
    logprob_oracle,
    named,
    prompts,
    request,
    tiny_causal_lm,
)

from atropos_verl.errors import EngineError, WeightSyncError


@pytest.mark.parametrize("keep_kv", [False, True])
def test_sequences_in_flight_go_on_under_the_swapped_weights(keep_kv: bool) -> None:
    """With ``recompute`` every token is greedy, and its logprob right, under the version that it is recorded with."""
    old, new = tiny_causal_lm(seed=1), tiny_causal_lm(seed=2)
    given = prompts(5, 12, 30)
    engine_model = copy.deepcopy(old)
    with engine_of(engine_model, keep_kv=keep_kv) as engine, ThreadPoolExecutor(1) as pool:
        engine.update_weights_from_tensor(named(old), policy_version=3)
        engine.stage_weights_from_tensor(named(new))
        counter = StepCounter(engine_model)
        counter.hold_at = 7  # the eighth decode step is held: generation is under way
        wanted = [request(p, max_tokens=20, temperature=0.0, ignore_eos=True) for p in given]
        answering = pool.submit(engine.generate, wanted)
        assert counter.held.wait(10.0)
        # In the middle of a decode step: the idle buffer can be filled and looked at, the serving one is untouched.
        assert engine.stage_weights_from_tensor(iter(named(new))) == sum(tensor.nbytes for _, tensor in named(new))
        tokens = given[1] + (9, 8)
        assert engine.compute_staged_logprobs(tokens) == pytest.approx(logprob_oracle(new, tokens), abs=1e-5)
        assert engine.policy_version == 3
        threading.Timer(0.05, counter.go_on.set).start()
        engine.swap_weights(policy_version=4)
        answers = answering.result(60.0)
        assert engine.policy_version == 4
        assert engine.stats().evictions == (0 if keep_kv else 3)
        assert engine.stats().failed == 0
        assert engine.compute_logprobs(tokens) == pytest.approx(logprob_oracle(new, tokens), abs=1e-5)
    for prompt, [answer] in zip(given, answers, strict=True):
        assert (answer.policy_version_first, answer.policy_version_last) == (3, 4)
        under_old = greedy_oracle(old, prompt, 20)
        alike = next(i for i, (a, b) in enumerate(zip(answer.token_ids, under_old, strict=True)) if a != b)
        assert alike >= 8, "what was sampled before the swap is the old policy's"
        if not keep_kv:
            first_new = next(
                start
                for start in range(8, 12)
                if list(answer.token_ids[start:]) == greedy_oracle(new, prompt + answer.token_ids[:start], 20 - start)
            )
            after = logprob_oracle(new, prompt + answer.token_ids)[len(prompt) - 1 + first_new :]
            assert list(answer.logprobs[first_new:]) == pytest.approx(after, abs=1e-4)


def test_swapping_moves_storage_and_copies_nothing() -> None:
    model, new = tiny_causal_lm(seed=1), tiny_causal_lm(seed=2)
    with engine_of(model) as engine:
        engine.stage_weights_from_tensor(named(new))
        before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        engine.swap_weights(policy_version=1)
        after = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        assert all(before[name] != after[name] for name in before)
        for (name, expected), (_, found) in zip(named(new), named(model), strict=True):
            assert torch.equal(found, expected), name
        engine.stage_weights_from_tensor(named(new))
        engine.swap_weights(policy_version=2)
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


def test_only_complete_staged_weights_are_swapped_in_and_only_once() -> None:
    model, new = tiny_causal_lm(seed=1), tiny_causal_lm(seed=2)
    [tokens] = prompts(12)
    with engine_of(copy.deepcopy(model)) as engine:
        with pytest.raises(WeightSyncError, match="no weights are staged"):
            engine.swap_weights(policy_version=1)
        with pytest.raises(EngineError, match="no weights are staged"):
            engine.compute_staged_logprobs([1, 2])

        def broken() -> object:
            yield named(new)[0]
            raise OSError("the source is gone")

        with pytest.raises(OSError, match="gone"):
            engine.stage_weights_from_tensor(broken())  # type: ignore[arg-type]
        with pytest.raises(WeightSyncError, match="cannot be swapped"):
            engine.swap_weights(policy_version=1)
        with pytest.raises(EngineError, match="no complete weights are staged"):
            engine.compute_staged_logprobs([1, 2])
        with pytest.raises(WeightSyncError, match="tensors are missing"):
            engine.stage_weights_from_tensor(named(new)[1:])
        assert engine.policy_version == -1
        # what generates is untouched by failures
        assert engine.compute_logprobs(tokens) == pytest.approx(logprob_oracle(model, tokens), abs=1e-5)

        engine.stage_weights_from_tensor(named(new))
        engine.swap_weights(policy_version=1)
        with pytest.raises(WeightSyncError, match="swapped in already"):
            engine.swap_weights(policy_version=2)
        assert engine.policy_version == 1
        assert engine.compute_logprobs(tokens) == pytest.approx(logprob_oracle(new, tokens), abs=1e-5)
