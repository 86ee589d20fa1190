"""The embedded engine's output, against plain forward passes of the same model."""

import asyncio
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.engines import (
    GREEDY,
    check_greedy,
    check_logprobs,
    engine_of,
    greedy_oracle,
    logprob_oracle,
    one,
    prompts,
    request,
    tiny_causal_lm,
)
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.engine import runner
from atropos_verl.engine.embedded import TransformersEngine
from atropos_verl.engine.protocol import GenerationEngine
from atropos_verl.errors import EngineError, GenerationRequestError
from atropos_verl.types import GenerationDelta, GenerationRequest

EOS = 258
TOKENIZER = build_tiny_tokenizer()


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_greedy_tokens_and_logprobs_equal_plain_forwards_for_ragged_prompts(family: str) -> None:
    model = tiny_causal_lm(family=family)
    ragged = prompts(1, 2, 7, 31, 32, 33, 90)
    with engine_of(copy.deepcopy(model)) as engine:
        assert isinstance(engine, GenerationEngine)
        answers = engine.generate([request(p, max_tokens=24, **GREEDY) for p in ragged])
    for prompt, [answer] in zip(ragged, answers, strict=True):
        assert list(answer.token_ids) == greedy_oracle(model, prompt, 24)
        assert answer.finish_reason == "length"
        check_logprobs(model, prompt, answer)


def test_logprobs_are_of_the_sampling_temperature_over_the_full_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_causal_lm()
    [prompt] = prompts(9)
    [long] = prompts(100)
    with engine_of(copy.deepcopy(model)) as engine:
        for settings in ({"temperature": 0.7}, {"temperature": 1.6, "top_p": 0.5}, {"top_k": 3, "min_p": 0.2}):
            answer = one(engine, prompt, max_tokens=30, ignore_eos=True, seed=3, **settings)
            check_logprobs(model, prompt, answer, settings.get("temperature", 1.0))
        assert engine.compute_logprobs(prompt[:1]) == []
        for _ in range(2):
            assert engine.compute_logprobs(long) == pytest.approx(logprob_oracle(model, long), abs=1e-5)
            monkeypatch.setattr(runner, "_LOGITS_BYTES", 4 * 259 * 17)  # chunks of 17 positions


def test_bfloat16_logprobs_agree_with_a_bfloat16_forward() -> None:
    model = tiny_causal_lm()
    ragged = prompts(4, 21, 40)
    reference = model.to(torch.bfloat16)
    with engine_of(copy.deepcopy(reference)) as engine:
        answers = engine.generate([request(p, max_tokens=12, ignore_eos=True, seed=1) for p in ragged])
    for prompt, [answer] in zip(ragged, answers, strict=True):
        expected = logprob_oracle(reference, prompt + answer.token_ids)[len(prompt) - 1 :]
        assert list(answer.logprobs) == pytest.approx(expected, abs=0.15)  # 8 bits of mantissa, logits of about 5


def test_a_seeded_request_gives_the_same_tokens_alone_and_among_thirty_others_in_fewer_slots() -> None:
    model = tiny_causal_lm()
    [prompt, *others] = prompts(11, *range(3, 33))
    wanted = request(prompt, n=11, max_tokens=25, temperature=0.9, top_p=0.95, seed=44, ignore_eos=True)
    noise = [request(p, max_tokens=5 + i, temperature=1.2, ignore_eos=True) for i, p in enumerate(others)]
    with engine_of(copy.deepcopy(model), seed=7) as wide, engine_of(model, max_running=3) as narrow:
        [alone] = wide.generate([wanted])
        crowded = narrow.generate([*noise[:15], wanted, *noise[15:]])[15]
        [other_seed] = wide.generate([replace(wanted, seed=43)])
        unseeded = [one(wide, prompt, max_tokens=16, ignore_eos=True).token_ids for _ in range(2)]
    with engine_of(tiny_causal_lm(), seed=7) as same:  # those without a seed have the engine's
        assert [one(same, prompt, max_tokens=16, ignore_eos=True).token_ids for _ in range(2)] == unseeded
    assert [g.token_ids for g in alone] == [g.token_ids for g in crowded]
    for a, b in zip(alone, crowded, strict=True):
        assert list(a.logprobs) == pytest.approx(list(b.logprobs), abs=1e-5)
    assert len({g.token_ids for g in alone}) == 11  # completions of one request differ
    assert {g.token_ids for g in alone}.isdisjoint({g.token_ids for g in other_seed})
    assert unseeded[0] != unseeded[1]


def test_n_completions_share_one_prefill_and_a_prompt_may_be_a_list() -> None:
    [first, second, third] = prompts(40, 40, 9, seed=3)
    with engine_of(tiny_causal_lm()) as engine:
        engine.generate([request(first, n=8, max_tokens=2, ignore_eos=True)])
        assert engine.stats().prompt_tokens == 40
        assert engine.stats().generated_tokens == 16
        engine.generate([request(second, n=8, max_tokens=2, ignore_eos=True)] * 2)
        # both in one prefill; or the first was admitted already, and its blocks are used
        assert engine.stats().prompt_tokens in (80, 84)
        from_list = one(engine, list(third), n=1, max_tokens=5, seed=1)  # type: ignore[arg-type]
        assert from_list == one(engine, third, max_tokens=5, seed=1)


def test_end_of_sequence_stops_unless_ignored_and_is_part_of_the_tokens() -> None:
    model = tiny_causal_lm()
    [prompt] = prompts(8)
    tokens = greedy_oracle(model, prompt, 20)
    last = tokens[6]
    cut = tokens.index(last) + 1
    model.generation_config.eos_token_id = [EOS, last]
    with engine_of(model) as engine:
        stopped = one(engine, prompt, max_tokens=20, temperature=0.0)
        assert (list(stopped.token_ids), stopped.finish_reason) == (tokens[:cut], "stop")
        ignored = one(engine, prompt, max_tokens=20, **GREEDY)
        assert (list(ignored.token_ids), ignored.finish_reason) == (tokens, "length")
        other = one(engine, prompt, max_tokens=20, **GREEDY, stop_token_ids=(tokens[3],))
        assert list(other.token_ids) == tokens[: tokens.index(tokens[3]) + 1]
        assert other.finish_reason == "stop"


def scripted_model(text: str) -> Any:
    """A model that, greedily, spells ``text`` from any prompt of one token: position decides the token."""
    model, ids = tiny_causal_lm(num_hidden_layers=1), TOKENIZER.encode(text, add_special_tokens=False)
    inner = model.forward

    def scripted(**kwargs: Any) -> Any:
        out = inner(**kwargs)
        positions, keep = kwargs["position_ids"], kwargs["logits_to_keep"]
        kept = positions[:, -keep:] if isinstance(keep, int) else positions[:, keep]
        out.logits = torch.full_like(out.logits, -30.0)
        for row, column in torch.cartesian_prod(torch.arange(kept.shape[0]), torch.arange(kept.shape[1])).tolist():
            out.logits[row, column, ids[min(int(kept[row, column]), len(ids) - 1)]] = 30.0
        return out

    model.forward = scripted
    return model


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("Answer: 42\nUser: more", ("\nUser:",), "Answer: 42\nUser:"),  # over six tokens
        ("one two three", ("x", "two "), "one two "),  # ends in whitespace
        ("caf\u00e9 \u20ac5 end", ("\u20ac",), "caf\u00e9 \u20ac"),  # the last of three bytes completes it
        ("a\U0001f600b", ("\U0001f600b",), "a\U0001f600b"),
        ("aaaaaaab", ("aaab",), "aaaaaaab"),
        ("stop", ("stop",), "stop"),
    ],
)
def test_stop_strings_are_found_across_token_borders_and_their_tokens_kept(
    text: str, stop: tuple[str, ...], kept: str
) -> None:
    with engine_of(scripted_model(text + "........")) as engine:
        answer = one(engine, (0,), max_tokens=40, **GREEDY, stop=stop)
        assert engine.tokenizer.decode(list(answer.token_ids)) == kept
        assert answer.finish_reason == "stop"
        assert len(answer.token_ids) == len(kept.encode())
        # "0" is the prompt, which is no place for a stop string
        free = one(engine, (48,), max_tokens=len(text.encode()), **GREEDY, stop=("nowhere", "0" + text[0]))
        assert (engine.tokenizer.decode(list(free.token_ids)), free.finish_reason) == (text, "length")


def test_context_limit_ends_a_sequence_with_length() -> None:
    model = tiny_causal_lm()
    [prompt] = prompts(20)
    with engine_of(copy.deepcopy(model), max_context_len=32) as engine:
        assert engine.max_context_len == 32
        for max_tokens in (None, 500):
            answer = one(engine, prompt, max_tokens=max_tokens, **GREEDY)
            assert list(answer.token_ids) == greedy_oracle(model, prompt, 12)
            assert answer.finish_reason == "length"


def test_prompt_logprobs_hold_the_token_and_the_best_alternatives() -> None:
    """Of the whole prompt, also where its beginning is stored."""
    model = tiny_causal_lm()
    [prompt] = prompts(40)
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([prompt])).logits[0].double(), -1)
    with engine_of(copy.deepcopy(model)) as engine:
        for k in (0, 3):
            answer = one(engine, prompt, max_tokens=1, temperature=0.0, prompt_logprobs=k)
            assert answer.prompt_logprobs is not None
            assert len(answer.prompt_logprobs) == 40
            assert answer.prompt_logprobs[0] is None
            for position, entry in enumerate(answer.prompt_logprobs[1:], start=1):
                best = logp[position - 1].topk(k).indices.tolist()
                assert entry is not None
                assert set(entry) == {prompt[position], *best}
                for token, value in entry.items():
                    assert value == pytest.approx(float(logp[position - 1, token]), abs=1e-4)
        assert one(engine, prompt, max_tokens=1).prompt_logprobs is None
        assert engine.stats().reused_tokens == 2 * 36


async def test_stream_yields_the_same_tokens_one_by_one() -> None:
    [prompt] = prompts(6)
    wanted = request(prompt, n=2, max_tokens=9, seed=4, ignore_eos=True)
    with engine_of(tiny_causal_lm()) as engine:
        whole = await engine.agenerate(wanted)
        deltas: list[GenerationDelta] = [delta async for delta in engine.astream(wanted)]
    for index, generation in enumerate(whole):
        mine = [delta for delta in deltas if delta.index == index]
        assert tuple(token for delta in mine for token in delta.token_ids) == generation.token_ids
        assert [value for delta in mine for value in delta.logprobs] == pytest.approx(generation.logprobs, abs=1e-5)
        assert [delta.finish_reason for delta in mine] == [None] * 8 + ["length"]


@pytest.fixture(scope="module")
def narrow() -> Iterator[TransformersEngine]:
    with engine_of(tiny_causal_lm(), max_context_len=32) as engine:
        yield engine


@pytest.mark.parametrize(
    ("settings", "param", "message"),
    [
        ({"prompt_token_ids": ()}, "prompt_token_ids", "is empty"),
        ({"prompt_token_ids": (1,) * 32}, "prompt_token_ids", "has 32 tokens; the context holds 32"),
        ({"prompt_token_ids": (5, 259)}, "prompt_token_ids", r"\[1\] is 259, outside the vocabulary \[0, 259\)"),
        ({"prompt_token_ids": (-1,)}, "prompt_token_ids", r"\[0\] is -1"),
        ({"n": 0}, "n", "n must be at least 1, not 0"),
        ({"max_tokens": 0}, "max_tokens", "at least 1, not 0"),
        ({"temperature": float("nan")}, "temperature", "not nan"),
        ({"top_p": 0.0}, "top_p", r"in \(0, 1\], not 0.0"),
        ({"top_k": -2}, "top_k", "not -2"),
        ({"min_p": 1.1}, "min_p", "not 1.1"),
        ({"stop": ("ok", "")}, "stop", "without empty strings"),
        ({"stop": "User:"}, "stop", "a tuple of strings.* not 'User:'"),
        ({"prompt_logprobs": 260}, "prompt_logprobs", "not 260"),
    ],
)
async def test_bad_requests_name_the_parameter_the_value_and_the_limit(
    narrow: TransformersEngine, settings: dict[str, Any], param: str, message: str
) -> None:
    bad = GenerationRequest(**({"prompt_token_ids": (1, 2)} | settings))
    with pytest.raises(GenerationRequestError, match=message) as caught:
        await asyncio.wait_for(narrow.agenerate(bad), 10)
    assert caught.value.param == param
    with pytest.raises(GenerationRequestError, match=message):
        narrow.astream(bad)
    with pytest.raises(GenerationRequestError, match=message):
        narrow.generate([request((1, 2)), bad])
    assert narrow.stats().requests == 0  # nothing of a list with one bad request was started


def test_compute_logprobs_refuses_bad_input_by_name(narrow: TransformersEngine) -> None:
    for tokens, message in (
        ([1, 300], r"token_ids\[1\] is 300"),
        ([1] * 33, "has 33 tokens; the context holds 32"),
        ([], "token_ids is empty"),
    ):
        with pytest.raises(GenerationRequestError, match=message):
            narrow.compute_logprobs(tokens)


def test_architectures_it_cannot_run_exactly_are_refused() -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    too_long = r"sliding window of 64 tokens.*max_context_len <= 64 \(it is 512\)"
    with pytest.raises(EngineError, match=too_long):
        engine_of(tiny_causal_lm(**sliding))
    model = tiny_causal_lm(**sliding)
    [prompt] = prompts(30)
    with engine_of(copy.deepcopy(model), max_context_len=64) as engine:  # within the window it is exact
        check_greedy(engine, model, prompt, 30)
    for setting, value in (("max_running", 0), ("max_context_len", 1)):
        with pytest.raises(EngineError, match=f"{setting} is {value}"):
            engine_of(tiny_causal_lm(), **{setting: value})
