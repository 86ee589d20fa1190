"""What held-out evaluations are answered by: nobody before ``pin``, then one version, whatever the engine gets."""

import asyncio
import threading

import pytest
from support.engines import GREEDY, engine_of, greedy_oracle, named, prompts, request, tiny_causal_lm
from support.fake_engine import FakeEngine
from support.serving import eventually, post, serving
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.engine.protocol import PinnedEngine
from atropos_verl.errors import EngineStoppedError


def test_a_copy_keeps_its_version_while_the_engine_gets_other_weights() -> None:
    old, new = tiny_causal_lm(seed=1), tiny_causal_lm(seed=2)
    [prompt] = prompts(9)
    wanted = request(prompt, max_tokens=12, **GREEDY)
    with engine_of(tiny_causal_lm(seed=3)) as engine:
        engine.update_weights_from_tensor(named(old), policy_version=3)
        pinned = PinnedEngine(engine)
        pinned.pin(engine.copy())
        engine.stage_weights_from_tensor(named(new))
        engine.swap_weights(policy_version=4)
        [[theirs]], [evaluated] = engine.generate([wanted]), asyncio.run(pinned.agenerate(wanted))
        assert (theirs.token_ids, theirs.policy_version_runs) == (tuple(greedy_oracle(new, prompt, 12)), ((4, 12),))
        assert (evaluated.token_ids, evaluated.policy_version_runs) == (
            tuple(greedy_oracle(old, prompt, 12)),
            ((3, 12),),
        )
        assert pinned.policy_version == 3
        copy = pinned._copy
        pinned.unpin()
        assert copy is not None and not pinned.gate.is_open
        with pytest.raises(EngineStoppedError):
            copy.generate([wanted])
        pinned.pin()
        assert asyncio.run(pinned.agenerate(wanted))[0].policy_version_runs == ((4, 12),)


def test_evaluations_wait_for_their_pin_and_for_nothing_else() -> None:
    """The gate of training, and the throttle, are for prompts that are trained on."""
    engine = FakeEngine()
    pinned = PinnedEngine(engine)

    class Holding:
        def admitted(self, requests: object) -> None:
            raise AssertionError("an evaluation's prompt is never trained on")

    with serving(engine, build_tiny_tokenizer(), evaluated=pinned, throttle=Holding()) as client:
        assert client.get("/evaluation/health").status_code == 200
        answers: list[dict[str, object]] = []
        body = {"prompt": {"prompt_token_ids": [1, 2]}, "max_tokens": 3}
        asking = threading.Thread(target=lambda: answers.append(post(client, "/evaluation/generate", **body)))
        asking.start()
        eventually(lambda: pinned.gate.waiting == 1, "the request to arrive")
        assert not engine.requests
        pinned.pin()
        asking.join(10.0)
        assert answers[0]["token_ids"] == [[3, 4, 5]]
        pinned.unpin()
