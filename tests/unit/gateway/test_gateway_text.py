"""Text of completions; their content, reasoning and calls, whole and however they are cut; the grammars of calls."""

import random
from typing import Any

import pytest
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.engine.sampling import Grammars
from atropos_verl.gateway import text as module
from atropos_verl.gateway.chat import ChatTurn, Message, ToolCall
from atropos_verl.gateway.fields import ApiError, Fields, Sampling, parse_sampling
from atropos_verl.gateway.text import ReplyReader, StreamText, TextCodec, constraint_of, cut_at_stop
from atropos_verl.types import GenerationRequest

EOS = 258


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(build_tiny_tokenizer(), frozenset({EOS}))


def plain(**fields: object) -> Sampling:
    return parse_sampling(Fields(fields), ("max_tokens",))


def test_completion_text_follows_vllm(codec: TextCodec) -> None:
    hi = [71, 72]  # "hi": byte - 33
    assert codec.completion_text([*hi, EOS], "stop", plain()) == ("hi", EOS)
    # vLLM leaves the stop token out of the text even when special tokens are shown
    assert codec.completion_text([*hi, EOS], "stop", plain(skip_special_tokens=False)) == ("hi", EOS)
    shown = plain(skip_special_tokens=False, include_stop_str_in_output=True)
    assert codec.completion_text([*hi, EOS], "stop", shown) == ("hi<|im_end|>", EOS)
    # a stop token the client asked for is left out though it is an ordinary letter
    assert codec.completion_text(hi, "stop", plain(stop_token_ids=[72])) == ("h", 72)
    assert codec.completion_text(hi, "length", plain(stop_token_ids=[72])) == ("hi", None)
    # the earliest stop string
    assert codec.completion_text(hi, "stop", plain(stop=["i", "h"])) == ("", "h")
    assert codec.completion_text(hi, "stop", plain(stop=["h"], include_stop_str_in_output=True)) == ("h", "h")
    assert codec.completion_text(hi, "stop", plain(stop=["j"])) == ("hi", None)
    assert codec.completion_text([*hi, EOS], "length", plain(ignore_eos=True, skip_special_tokens=False)) == (
        "hi<|im_end|>",
        None,
    )


def test_tokens_that_are_no_text_have_their_bytes() -> None:
    """SentencePiece names bytes, and its decoders drop the space at the start of a text."""

    class Sentences:
        names = ("<0xE6>", "\u2581the", "the", "\u0120the", None)

        def convert_ids_to_tokens(self, token_id: int) -> str | None:
            return self.names[token_id]

        def decode(self, token_ids: list[int], **_: bool) -> str:
            return "\ufffd" if token_ids == [0] else "the"

    codec = TextCodec(Sentences(), frozenset())
    assert [codec.tokens[token_id] for token_id in (0, 1, 2, 4)] == [
        ("\ufffd", b"\xe6"),
        (" the", b" the"),
        ("the", b"the"),
        ("the", b"the"),
    ]


def test_stream_holds_back_half_a_character_and_a_possible_stop_string(codec: TextCodec) -> None:
    stream = StreamText(codec, plain(stop=["</a>"]))
    ids = codec.encode("é</b></a>", add_special_tokens=False)
    assert len(ids) == 10  # é is two bytes
    pieces = [stream.push([token_id], None) for token_id in ids[:-1]]
    #          é (1st, 2nd byte)  <   /   b      >    <   /   a: begins the stop string until b comes
    assert pieces == ["", "é", "", "", "</b", ">", "", "", ""]
    assert stream.push([ids[-1]], "stop") == ""


def test_stream_pieces_join_to_the_whole_text(codec: TextCodec) -> None:
    rng = random.Random(0)
    alphabet = ["a", "b", "é", "漢", "🙂", "<", "/", "<|im_start|>", "\n"]
    for case in range(300):
        if case % 3:
            text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 40)))
            ids = list(codec.encode(text, add_special_tokens=False))
        else:
            ids = [rng.randrange(259) for _ in range(rng.randrange(1, 200))]  # mostly bytes that are no UTF-8
        finish = rng.choice(["stop", "length"])
        sampling = plain(stop=rng.choice([[], ["b/"], ["ab", "é<"], ["🙂"]]))
        if finish == "stop" and sampling.template.stop:  # an engine stops at the stop string: cut the tokens after it
            whole = codec.decode(ids, skip_special_tokens=True)
            _, found = cut_at_stop(whole, sampling.template.stop, include_stop=False)
            if found is not None:
                ends = (k for k in range(1, len(ids) + 1) if found in codec.decode(ids[:k], skip_special_tokens=True))
                ids = ids[: next(ends)]
        expected, _ = codec.completion_text(ids, finish, sampling)  # type: ignore[arg-type]
        stream, pieces, start = StreamText(codec, sampling), [], 0
        while start < len(ids):
            width = rng.randrange(1, 4)
            last = start + width >= len(ids)
            pieces.append(stream.push(ids[start : start + width], finish if last else None))  # type: ignore[arg-type]
            start += width
        assert "".join(pieces) == expected, (case, ids, sampling.template.stop, finish)


def test_endless_invalid_bytes_are_not_held_back_for_ever(codec: TextCodec) -> None:
    stream = StreamText(codec, plain())
    invalid = 97  # a lone continuation byte
    assert codec.decode([invalid], skip_special_tokens=False) == "\ufffd"
    pieces = [stream.push([invalid], None) for _ in range(130)]
    assert sum(len(piece) for piece in pieces) == 128  # two windows of 64 were given up
    assert stream.push([invalid], "length") == "\ufffd" * 3


TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},)
REQUEST = GenerationRequest(prompt_token_ids=(1,), request_id="chatcmpl-ab-0")
F = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def codec_of(template: str | None = None, name: str = "", added: tuple[str, ...] = ()) -> TextCodec:
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.name_or_path = name
    tokenizer.add_tokens(list(added))
    return TextCodec(tokenizer, frozenset({EOS}))


def turn_of(**parts: Any) -> ChatTurn:
    sampling = plain(stop=parts.pop("stop", None))
    settings = {"tools": TOOLS, "separates_reasoning": True, "sampling": sampling, **parts}
    return ChatTurn(messages=(Message(role="user", content="q"),), **settings)


def read(codec: TextCodec, turn: ChatTurn, text: str, request: GenerationRequest = REQUEST) -> Message:
    """The message in ``text``, which must be the same however its tokens arrive."""
    ids = tuple(codec.encode(text, add_special_tokens=False))
    reason = "stop" if ids[-1:] == (EOS,) or turn.sampling.template.stop else "length"
    at_once = ReplyReader(codec, turn, request)
    at_once.push(ids, reason)
    whole = at_once.message
    for seed in range(3):
        rng, reader, pieces, at = random.Random(seed), ReplyReader(codec, turn, request), [], 0
        while at < len(ids):
            step = rng.choice([1, 1, 2, 7])
            pieces += reader.push(ids[at : at + step], reason if at + step >= len(ids) else None)
            at += step
        assert reader.message == whole
        assert "".join(p.text for p in pieces if p.kind == "content") == whole.content
        assert "".join(p.text for p in pieces if p.kind == "reasoning") == (whole.reasoning_content or "")
        assert tuple(p.call for p in pieces if p.call is not None) == whole.tool_calls
    return whole


def called(*calls: tuple[str, str], content: str = "", thought: str | None = None) -> Message:
    made = tuple(ToolCall(f"call_ab-0-0-{k}", name, arguments) for k, (name, arguments) in enumerate(calls))
    return Message(role="assistant", content=content, tool_calls=made, reasoning_content=thought)


BROKEN = "<tool_call>\n{'name': f}\n</tool_call>"
INSIDE = '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hé 世 <b> ", called(content="hé 世 <b> ")),
        (F, called(("f", '{"x": 1}'))),
        (f"Let me see.\n\n{F}\n{F}", called(("f", '{"x": 1}'), ("f", '{"x": 1}'), content="Let me see.")),
        (f"<think>\nhm <tool_call>\n</think>\n\n{F}", called(("f", '{"x": 1}'), thought="hm <tool_call>")),
        ("<think></think>a", called(content="a")),
        ("<think>never done", called(thought="never done")),
        ("a <think>b</think>", called(content="a <think>b</think>")),  # only at the beginning
        ("<thin", called(content="<thin")),
        ("a <tool_cal", called(content="a <tool_cal")),
        (INSIDE, called(("f", '{"x": "</tool_call>"}'))),
        # Letter by letter as the policy wrote them: what it is trained on is what the client saw.
        ('<tool_call>{"name":"f","arguments":{"é" : 1.0,\n"b":tru}}</tool_call>', None),
        (
            '<tool_call>{"name":"f","arguments":{"é" : 1.0,\n"b":1e2}}</tool_call>',
            called(("f", '{"é" : 1.0,\n"b":1e2}')),
        ),
        ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', called(("f", '{"x": 1}'))),
        ('<tool_call>{"name": "g"}</tool_call>', called(("g", "{}"))),
        (f"{BROKEN} and {F}", called(("f", '{"x": 1}'), content=f"{BROKEN} and")),
        ('<tool_call>{"name": "", "arguments": {}}</tool_call>', None),
        ("<tool_call>" + "[" * 3000, None),
        ("<tool_call>", None),
        (f"{F}\nsome more", called(("f", '{"x": 1}'), content="some more")),
    ],
)
def test_tags(text: str, expected: Message | None) -> None:
    assert read(codec_of(), turn_of(), text) == (expected or called(content=text))


def test_what_was_not_asked_for_stays_in_the_content() -> None:
    text = f"<think>a</think>{F}"
    assert read(codec_of(), turn_of(tools=(), separates_reasoning=False), text) == called(content=text)
    assert read(codec_of(), turn_of(tool_choice="none"), text) == called(content=F, thought="a")


def test_tags_that_are_special_tokens_are_read_as_well() -> None:
    codec = codec_of()
    codec.tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    assert read(codec, turn_of(), f"<think>a</think>b{F}<|im_end|>") == called(
        ("f", '{"x": 1}'), content="b", thought="a"
    )
    plain = turn_of(tools=(), separates_reasoning=False)
    assert read(codec, plain, "<think>a</think>b") == called(content="ab")


def test_one_call_where_parallel_ones_are_not_wanted_and_a_stop_string_may_end_it() -> None:
    assert read(codec_of(), turn_of(parallel_tool_calls=False), f"{F}\n{F}") == called(("f", '{"x": 1}'))
    assert read(codec_of(), turn_of(stop="</tool_call>"), F) == called(("f", '{"x": 1}'))


def test_reasoning_that_the_prompt_opens() -> None:
    codec = codec_of()
    request = GenerationRequest(
        prompt_token_ids=codec.encode("x<think>\n", add_special_tokens=False), request_id="a-b-0"
    )
    assert read(codec, turn_of(), "\nso\n</think>\n\n7", request) == called(content="7", thought="so")


QWEN35 = "{{ tools }}<function=example_function_name>"
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
XML = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize("name", ["Qwen/Qwen3.5-4B", "/m/Qwen3.5-4B/", "/hub/models--Qwen--Qwen3.5-4B/snapshots/0a"])
def test_formats_that_the_library_knows(name: str) -> None:
    codec = codec_of(QWEN35, name, (*MARKS, *VISION))
    assert type(codec.renderer).__name__ == "Qwen35Renderer"
    broken = "<tool_call>\n<function=>\n</tool_call>"
    assert read(codec, turn_of(), f"<think>\nhm\n</think>\n\nyes\n\n{XML}<|im_end|>") == called(
        ("f", '{"x": 1}'), content="yes", thought="hm"
    )
    assert "<function=>" in str(read(codec, turn_of(), f"<think>\n</think>\n\n{broken}<|im_end|>").content)
    with pytest.raises(ApiError, match="tool_choice"):
        constraint_of(codec, turn_of(tool_choice="required"), (1,))


def test_an_unknown_format_is_said_and_tags_are_looked_for(caplog: pytest.LogCaptureFixture) -> None:
    codec = codec_of(QWEN35, "/m/my-own")
    assert read(codec, turn_of(), F) == called(("f", '{"x": 1}'))
    [record] = caplog.records
    assert "/m/my-own" in record.getMessage()


HERMES = '{{ tools }} {"name": <function-name>, "arguments": <args-json-object>} '
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]}
SCHEMA |= {"additionalProperties": False}
STRICT = ({"type": "function", "function": {"name": 'f"é', "parameters": SCHEMA}}, *TOOLS)
G = '<tool_call>\n{"name": "f\\"é", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("template", "parts", "good", "bad"),
    [
        ("", {"tool_choice": "required"}, [G, f"{G}\n{G}"], ["yes", G.replace("1", "10"), F.replace("1", "1.")]),
        ("", {"tool_choice": "required", "parallel_tool_calls": False}, [G], [f"{G}\n{G}"]),
        ("", {"tool_choice": 'function f"é'}, [G], [F]),
        ("", {"response_schema": SCHEMA, "tools": ()}, ['{"a": 1}'], [G, '{"a":  1}', "<think>a</think>"]),
        ("", {"response_schema": SCHEMA}, ['{"a": 1}', G], ["yes"]),
        (
            "<think>",
            {"response_schema": SCHEMA},
            ['{"a": 1}', '<think>\n{</think>\n{"a": 1}', f"<think></think>{G}"],
            ["yes"],
        ),
        ("", {"response_schema": SCHEMA, "tools": (), "prompt": "<think>\n"}, ['so {</think>\n{"a": 1}'], ['{"a": 1}']),
    ],
)
@pytest.mark.parametrize("added", [(), MARKS])
def test_grammars(
    template: str, parts: dict[str, Any], good: list[str], bad: list[str], added: tuple[str, ...]
) -> None:
    codec, parts = codec_of(HERMES + template, added=added), {"tools": STRICT, **parts}
    prompt = codec.encode(parts.pop("prompt", "a"), add_special_tokens=False)
    constraint = constraint_of(codec, turn_of(**parts), prompt)
    grammars = Grammars(codec.tokenizer, 300, frozenset({EOS}))
    for text in [*good, *bad]:
        matcher = grammars.matcher(GenerationRequest(prompt_token_ids=(1,), constraint=constraint))
        ids = codec.encode(text, add_special_tokens=False)
        fits = matcher.try_consume_tokens(list(ids)) == len(ids) and matcher.is_accepting()
        assert fits == (text in good), text
    assert constraint is not None
    assert (constraint.json_schema is not None) == (parts["tools"] == () and not template and prompt == (64,))


OPEN = '<tool_call>{"name": "f", "arguments": {"x": "'


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (OPEN + "</tool_call>" * 16_000, 0),
        (OPEN + "</tool_call>" * 16_000 + '"}}</tool_call>', 1),
        ("<tool_call>" + "</tool_call>" * 16_000, 0),
        ("<tool_call></tool_call>" * 8_000, 0),
        (OPEN[:-1] + "7}} " + " " * 100_000 + "</tool_call>", 1),
        ("<tool_call>" + "{" * 100_000, 0),
    ],
)
def test_tags_that_are_repeated_are_read_once(text: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read_as_json: list[int] = []

    def counted(text: str) -> ToolCall | None:
        read_as_json.append(len(text))
        return written_call(text)

    written_call = module._written_call
    monkeypatch.setattr(module, "_written_call", counted)
    for step in (len(text), 1000, 50):
        tags, pieces = module._Tags(calls=True, opened=False), list[module.Piece]()
        for start in range(0, len(text), step):
            pieces += tags.push(text[start : start + step], ended=start + step >= len(text))
        assert sum(piece.call is not None for piece in pieces) == calls
        assert calls or "".join(piece.text for piece in pieces) == text
        assert sum(read_as_json) <= len(text)
        read_as_json.clear()
