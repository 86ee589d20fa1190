"""Content, reasoning and calls of a completion, whole and however it is cut; and the grammars of calls."""

import random
from typing import Any

import pytest
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.engine.sampling import Grammars
from atropos_verl.gateway import parsing
from atropos_verl.gateway.chat import ChatTurn, Message, ToolCall
from atropos_verl.gateway.fields import ApiError, Fields, parse_sampling
from atropos_verl.gateway.parsing import ReplyReader, constraint_of
from atropos_verl.gateway.text import TextCodec
from atropos_verl.types import GenerationRequest

TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},)
REQUEST = GenerationRequest(prompt_token_ids=(1,), request_id="chatcmpl-ab-0")
F = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def codec_of(template: str | None = None, name: str = "", added: tuple[str, ...] = ()) -> TextCodec:
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.name_or_path = name
    tokenizer.add_tokens(list(added))
    return TextCodec(tokenizer, frozenset({258}))


def turn_of(**parts: Any) -> ChatTurn:
    stop = parts.pop("stop", None)
    sampling = parse_sampling(Fields({"stop": stop}), max_tokens_names=("max_tokens",), max_tokens_default=None)
    settings = {"tools": TOOLS, "separates_reasoning": True, "sampling": sampling, **parts}
    return ChatTurn(messages=(Message(role="user", content="q"),), **settings)


def read(codec: TextCodec, turn: ChatTurn, text: str, request: GenerationRequest = REQUEST) -> Message:
    """The message in ``text``, which must be the same however its tokens arrive."""
    ids = tuple(codec.encode(text, add_special_tokens=False))
    reason = "stop" if ids[-1:] == (258,) or turn.sampling.template.stop else "length"
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
    ],
)
@pytest.mark.parametrize("added", [(), MARKS])
def test_grammars(
    template: str, parts: dict[str, Any], good: list[str], bad: list[str], added: tuple[str, ...]
) -> None:
    codec = codec_of(HERMES + template, added=added)
    constraint = constraint_of(codec, turn_of(**{"tools": STRICT, **parts}), (1,))
    grammars = Grammars(codec.tokenizer, 300, frozenset({258}))
    for text in [*good, *bad]:
        matcher = grammars.matcher(GenerationRequest(prompt_token_ids=(1,), constraint=constraint))
        ids = codec.encode(text, add_special_tokens=False)
        fits = matcher.try_consume_tokens(list(ids)) == len(ids) and matcher.is_accepting()
        assert fits == (text in good), text
    assert constraint is not None
    assert (constraint.json_schema is not None) == (parts.get("tools") == () and not template)


def test_a_grammar_goes_on_in_reasoning_that_the_prompt_opens() -> None:
    codec = codec_of(HERMES)
    prompt = codec.encode("<think>\n", add_special_tokens=False)
    constraint = constraint_of(codec, turn_of(response_schema=SCHEMA, tools=()), prompt)
    for text, good in {'so {</think>\n\n{"a": 1}': True, '{"a": 1}': False}.items():
        matcher = Grammars(codec.tokenizer, 300, frozenset({258})).matcher(
            GenerationRequest(prompt_token_ids=(1,), constraint=constraint)
        )
        assert (
            matcher.consume_tokens(list(codec.encode(text, add_special_tokens=False))) and matcher.is_accepting()
        ) == good


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

    written_call = parsing._written_call
    monkeypatch.setattr(parsing, "_written_call", counted)
    for step in (len(text), 1000, 50):
        tags, pieces = parsing._Tags(calls=True, opened=False), list[parsing.Piece]()
        for start in range(0, len(text), step):
            pieces += tags.push(text[start : start + step], ended=start + step >= len(text))
        assert sum(piece.call is not None for piece in pieces) == calls
        assert calls or "".join(piece.text for piece in pieces) == text
        assert sum(read_as_json) <= len(text)
        read_as_json.clear()
