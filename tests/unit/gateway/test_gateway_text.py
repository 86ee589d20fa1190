"""Prompts by the chat template; the content, reasoning and calls in a completion, however it is cut; grammars."""

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.engine.sampling import Grammars
from atropos_verl.gateway import text as module
from atropos_verl.gateway.chat import ChatTemplate, ChatTurn, Message, ToolCall
from atropos_verl.gateway.fields import ApiError, Fields, Sampling, parse_sampling
from atropos_verl.gateway.text import ReplyReader, StreamText, TextCodec, constraint_of
from atropos_verl.types import GenerationRequest

EOS = 258
CODEC = TextCodec(build_tiny_tokenizer(), frozenset({EOS}))

EACH = "{% for m in messages %}"
USER: dict[str, Any] = {"role": "user", "content": "x"}
TOOLS = ({"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}},)


def prompt(template: str, *messages: dict[str, Any], **body: Any) -> str:
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = template
    own = ChatTemplate(tokenizer)
    fields = Fields({"messages": list(messages), **body})
    said, form = own.messages(fields, "messages", enumerate(messages)), (fields, "response_format")
    sampling = parse_sampling(fields, ("max_tokens",), served="response_format")
    return own.prompt(own.turn(fields, said, lambda tool: tool["function"], form, sampling=sampling))


def calling(**arguments: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "w", **arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def answer(content: Any = "ok", **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "c1", "content": content, **fields}


ARGUMENTS = EACH + "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
ITEMS = EACH + "{% for c in m.tool_calls %}{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}"
ITEMS += "{% endfor %}{% endfor %}"
CONTENT = EACH + "[{{ m.content }}]{% endfor %}"
DEFINED = EACH + "{{ m.tool_calls is defined }}{{ m.name is defined }}{{ m.function_call is defined }}{% endfor %}"
AB = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


def test_messages_reach_templates_in_the_form_that_they_expect() -> None:
    developer, parts = {"role": "developer", "content": "x"}, ["a", {"type": "input_text", "text": "b"}]
    for template, messages, expected in (
        (ARGUMENTS, [calling(arguments='{"city": "Rome"}')], '{"city": "Rome"}'),
        (ITEMS, [calling(arguments='{"city": "Rome"}')], "city=Rome"),
        (ITEMS, [calling(arguments={"city": "Rome"})], "city=Rome"),
        (ARGUMENTS, [calling()], "{}"),
        (ARGUMENTS, [calling(arguments="")], "{}"),
        (ARGUMENTS, [calling(arguments="[1")], '"[1"'),  # what a policy wrote need not be JSON
        (ARGUMENTS, [calling(arguments="[" * 5000)], f'"{"[" * 5000}"'),
        (CONTENT, [{"role": "user", "content": AB}, answer(AB), {"role": "user", "content": parts}], "[a\nb]" * 3),
        (CONTENT, [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}], "[no]"),
        (CONTENT, [{"role": "assistant", "content": None}], "[]"),
        (DEFINED, [calling()], "TrueFalseFalse"),
        (DEFINED, [{**USER, "tool_calls": [], "function_call": None}], "FalseFalseFalse"),
        (EACH + "{{ m.role }}{% endfor %}", [developer], "system"),
        (EACH + "{{ m.role }}{# developer #}{% endfor %}", [developer], "developer"),
        (EACH + "{{ m.name }}|{% endfor %}", [calling(), answer(), answer(name="given")], "|w|given|"),
    ):
        assert prompt(template, *messages) == expected, messages


def test_a_template_that_fails_is_a_400() -> None:
    for template, reason in (
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[7].role }}", "UndefinedError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 'x' * 16777216 }}y", "16777216 characters"),
        ("{{ messages[10000].content }}", "10001 messages; send 10000 at most"),
    ):
        with pytest.raises(ApiError, match=reason) as caught:
            prompt(template, *[USER] * (10_001 if "10000" in template else 1))
        assert (caught.value.status, caught.value.param) == (400, "messages")


def test_a_client_may_send_variables_and_no_template_but_the_models() -> None:
    shown = "{{ mood }}|{{ add_generation_prompt }}"
    options = {"chat_template_kwargs": {"mood": "calm"}, "add_generation_prompt": False}
    assert prompt(shown, USER, **options, chat_template=shown) == "calm|False"
    with pytest.raises(ApiError, match="runs the model's own only"):
        prompt("own", USER, chat_template="sent")


def test_tools_are_text_for_a_template_that_knows_none() -> None:
    chatml = EACH + "[{{ m.role }}|{{ m.content }}]{% endfor %}"
    answers = [answer("r1"), answer("r2", tool_call_id="c2")]
    said = [{"role": "system", "content": "Be brief."}, USER, calling(arguments='{"x":  1}'), *answers]
    text = prompt(chatml, *said, tools=TOOLS)
    assert text.startswith('[system|Be brief.\n\nYou may call tools:\n<tools>\n{"name":"w",')
    call = '[assistant|<tool_call>\n{"name": "w", "arguments": {"x":  1}}\n</tool_call>]'
    results = "[user|<tool_response>\nr1\n</tool_response>\n<tool_response>\nr2\n</tool_response>]"
    assert text.endswith(f"</tool_call>][user|x]{call}{results}")
    assert prompt(chatml, USER, tools=TOOLS).startswith("[system|You may call tools:")
    # Without calls nothing changes; what an assistant called before is never lost.
    assert prompt(chatml, USER, tools=TOOLS, tool_choice="none") == "[user|x]"
    assert prompt(chatml, USER, calling(), answer()).endswith("</tool_call>][tool|ok]")
    assert prompt(EACH + "{{ tools[0].function.name }}{% endfor %}", USER, tools=TOOLS) == "w"


def plain(**fields: object) -> Sampling:
    return parse_sampling(Fields(fields), ("max_tokens",))


def test_completion_text_follows_vllm() -> None:
    shown, kept = {"skip_special_tokens": False}, {"include_stop_str_in_output": True}
    cases: list[tuple[list[int], Any, dict[str, Any], Any]] = [
        ([71, 72, EOS], "stop", {}, ("hi", EOS)),
        # vLLM leaves the stop token out of the text even when special tokens are shown
        ([71, 72, EOS], "stop", shown, ("hi", EOS)),
        ([71, 72, EOS], "stop", {**shown, **kept}, ("hi<|im_end|>", EOS)),
        ([71, 72, EOS], "length", {**shown, "ignore_eos": True}, ("hi<|im_end|>", None)),
        # a stop token the client asked for is left out though it is an ordinary letter
        ([71, 72], "stop", {"stop_token_ids": [72]}, ("h", 72)),
        ([71, 72], "length", {"stop_token_ids": [72]}, ("hi", None)),
        # the earliest stop string
        ([71, 72], "stop", {"stop": ["i", "h"]}, ("", "h")),
        ([71, 72], "stop", {"stop": ["h"], **kept}, ("h", "h")),
        ([71, 72], "stop", {"stop": ["j"]}, ("hi", None)),
    ]
    for ids, finish, asked, expected in cases:
        assert CODEC.completion_text(ids, finish, plain(**asked)) == expected, asked


def test_tokens_that_are_no_text_have_their_bytes() -> None:
    """SentencePiece names bytes, and its decoders drop the space at the start of a text."""
    names = ("<0xE6>", "\u2581the", "the", "\u0120the", None)
    tokenizer = SimpleNamespace(
        convert_ids_to_tokens=names.__getitem__, decode=lambda ids, **_: "\ufffd" if ids == [0] else "the"
    )
    texts = [TextCodec(tokenizer, frozenset()).tokens[token_id] for token_id in (0, 1, 2, 4)]
    assert texts == [("\ufffd", b"\xe6"), (" the", b" the"), ("the", b"the"), ("the", b"the")]


def test_stream_holds_back_half_a_character_and_a_possible_stop_string() -> None:
    stream = StreamText(CODEC, plain(stop=["</a>"]))
    *ids, last = CODEC.encode("é</b></a>", add_special_tokens=False)
    pieces = [stream.push([token_id], None) for token_id in ids]
    #          é (1st, 2nd byte)  <   /   b      >    <   /   a: begins the stop string until b comes
    assert pieces == ["", "é", "", "", "</b", ">", "", "", ""]
    assert stream.push([last], "stop") == ""


def test_endless_invalid_bytes_are_not_held_back_for_ever() -> None:
    stream, lone_continuation = StreamText(CODEC, plain()), 97
    pieces = [stream.push([lone_continuation], None) for _ in range(130)]
    assert "".join(pieces) == "\ufffd" * 128  # two windows of 64 were given up
    assert stream.push([lone_continuation], "length") == "\ufffd" * 3


REQUEST = GenerationRequest(prompt_token_ids=(1,), request_id="chatcmpl-ab-0")
F = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
FTOOL = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},)
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def codec_of(template: str | None = None, name: str = "", added: tuple[str, ...] = ()) -> TextCodec:
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.name_or_path = name
    tokenizer.add_tokens(list(added))
    return TextCodec(tokenizer, frozenset({EOS}))


def turn_of(**parts: Any) -> ChatTurn:
    sampling = plain(stop=parts.pop("stop", None))
    settings = {"tools": FTOOL, "separates_reasoning": True, "sampling": sampling, **parts}
    return ChatTurn(messages=(Message(role="user", content="q"),), **settings)


RAW: dict[str, Any] = {"tools": (), "separates_reasoning": False}


def read(
    codec: TextCodec, turn: ChatTurn, said: str | Sequence[int], *, reason: Any = None, request: Any = REQUEST
) -> Message:
    """The message in a text, or tokens, which must be the same however its tokens arrive."""
    ids = codec.encode(said, add_special_tokens=False) if isinstance(said, str) else said
    reason = reason or ("stop" if ids[-1:] == (EOS,) or turn.sampling.template.stop else "length")
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


ONE = ("f", '{"x": 1}')
BROKEN = "<tool_call>\n{'name': f}\n</tool_call>"


def test_stream_pieces_join_to_the_whole_text() -> None:
    rng = random.Random(0)
    alphabet = ["a", "b", "é", "漢", "🙂", "<", "/", "<|im_start|>", "\n"]
    for case in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 40)))
        noise = [rng.randrange(259) for _ in range(rng.randrange(1, 200))]  # mostly bytes that are no UTF-8
        ids = CODEC.encode(text, add_special_tokens=False) if case % 3 else tuple(noise)
        finish, stop = rng.choice(["stop", "length"]), rng.choice([[], ["b/"], ["ab", "é<"], ["🙂"]])
        if finish == "stop":  # an engine stops at the stop string
            begun = (ids[:k] for k in range(1, len(ids)))
            texts = ((some, CODEC.decode(some, skip_special_tokens=True)) for some in begun)
            ids = next((some for some, text in texts if any(word in text for word in stop)), ids)
        turn = turn_of(**RAW, stop=stop)
        expected, _ = CODEC.completion_text(ids, finish, turn.sampling)  # type: ignore[arg-type]
        assert read(CODEC, turn, ids, reason=finish).content == expected, (case, ids, stop, finish)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hé 世 <b> ", called(content="hé 世 <b> ")),
        (F, called(ONE)),
        (f"Let me see.\n\n{F}\n{F}", called(ONE, ONE, content="Let me see.")),
        (f"<think>\nhm <tool_call>\n</think>\n\n{F}", called(ONE, thought="hm <tool_call>")),
        ("<think></think>a", called(content="a")),
        ("<think>never done", called(thought="never done")),
        ("a <think>b</think>", called(content="a <think>b</think>")),  # only at the beginning
        ("<thin", called(content="<thin")),
        ("a <tool_cal", called(content="a <tool_cal")),
        (
            '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>',
            called(("f", '{"x": "</tool_call>"}')),
        ),
        # Letter by letter as the policy wrote them: what it is trained on is what the client saw.
        ('<tool_call>{"name":"f","arguments":{"é" : 1.0,\n"b":tru}}</tool_call>', None),
        (
            '<tool_call>{"name":"f","arguments":{"é" : 1.0,\n"b":1e2}}</tool_call>',
            called(("f", '{"é" : 1.0,\n"b":1e2}')),
        ),
        ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', called(ONE)),
        ('<tool_call>{"name": "g"}</tool_call>', called(("g", "{}"))),
        (f"{BROKEN} and {F}", called(ONE, content=f"{BROKEN} and")),
        ('<tool_call>{"name": "", "arguments": {}}</tool_call>', None),
        ("<tool_call>" + "[" * 3000, None),
        ("<tool_call>", None),
        (f"{F}\nsome more", called(ONE, content="some more")),
    ],
)
def test_tags(text: str, expected: Message | None) -> None:
    assert read(codec_of(), turn_of(), text) == (expected or called(content=text))


def test_what_is_read_is_what_was_asked_for() -> None:
    thought = f"<think>a</think>{F}"
    assert read(CODEC, turn_of(**RAW), thought) == called(content=thought)
    assert read(CODEC, turn_of(tool_choice="none"), thought) == called(content=F, thought="a")
    assert read(CODEC, turn_of(parallel_tool_calls=False), f"{F}\n{F}") == called(ONE)
    assert read(CODEC, turn_of(stop="</tool_call>"), F) == called(ONE)
    opened = GenerationRequest(prompt_token_ids=CODEC.encode("<think>\n", add_special_tokens=False), request_id="a-b-0")
    assert read(CODEC, turn_of(), "\nso\n</think>\n\n7", request=opened) == called(content="7", thought="so")
    special = codec_of()
    special.tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    assert read(special, turn_of(), f"<think>a</think>b{F}<|im_end|>") == called(ONE, content="b", thought="a")
    assert read(special, turn_of(**RAW), "<think>a</think>b") == called(content="ab")


QWEN35 = "{{ tools }}<function=example_function_name>"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
XML = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize("name", ["Qwen/Qwen3.5-4B", "/m/Qwen3.5-4B/", "/hub/models--Qwen--Qwen3.5-4B/snapshots/0a"])
def test_formats_that_the_library_knows(name: str) -> None:
    codec = codec_of(QWEN35, name, (*MARKS, *VISION))
    assert type(codec.renderer).__name__ == "Qwen35Renderer"
    found = read(codec, turn_of(), f"<think>\nhm\n</think>\n\nyes\n\n{XML}<|im_end|>")
    assert found == called(ONE, content="yes", thought="hm")
    broken = "<tool_call>\n<function=>\n</tool_call>"
    assert "<function=>" in str(read(codec, turn_of(), f"<think>\n</think>\n\n{broken}<|im_end|>").content)
    with pytest.raises(ApiError, match="tool_choice"):
        constraint_of(codec, turn_of(tool_choice="required"), (1,))


def test_an_unknown_format_is_said_and_tags_are_looked_for(caplog: pytest.LogCaptureFixture) -> None:
    assert read(codec_of(QWEN35, "/m/my-own"), turn_of(), F) == called(ONE)
    [message] = caplog.messages
    assert "/m/my-own" in message


HERMES = '{{ tools }} {"name": <function-name>, "arguments": <args-json-object>} '
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]}
SCHEMA |= {"additionalProperties": False}
STRICT = ({"type": "function", "function": {"name": 'f"é', "parameters": SCHEMA}}, *FTOOL)
G = '<tool_call>\n{"name": "f\\"é", "arguments": {"a": 1}}\n</tool_call>'
OPENED = '<think>\n{</think>\n{"a": 1}'
REQUIRED, SERIAL = {"tool_choice": "required"}, {"tool_choice": "required", "parallel_tool_calls": False}
FORM, FORM_ONLY = {"response_schema": SCHEMA}, {"response_schema": SCHEMA, "tools": ()}


@pytest.mark.parametrize(
    ("template", "parts", "good", "bad"),
    [
        ("", REQUIRED, [G, f"{G}\n{G}"], ["yes", G.replace("1", "10"), F.replace("1", "1.")]),
        ("", SERIAL, [G], [f"{G}\n{G}"]),
        ("", {"tool_choice": 'function f"é'}, [G], [F]),
        ("", FORM_ONLY, ['{"a": 1}'], [G, '{"a":  1}', "<think>a</think>"]),
        ("", FORM, ['{"a": 1}', G], ["yes"]),
        ("<think>", FORM, ['{"a": 1}', OPENED, f"<think></think>{G}"], ["yes"]),
        ("", {**FORM_ONLY, "prompt": "<think>\n"}, ['so {</think>\n{"a": 1}'], ['{"a": 1}']),
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
    written_call, lengths = module._written_call, list[int]()
    monkeypatch.setattr(module, "_written_call", lambda text: lengths.append(len(text)) or written_call(text))
    for step in (len(text), 1000, 50):
        tags, pieces = module._Tags(calls=True, opened=False), list[module.Piece]()
        for start in range(0, len(text), step):
            pieces += tags.push(text[start : start + step], ended=start + step >= len(text))
        assert sum(piece.call is not None for piece in pieces) == calls
        assert calls or "".join(piece.text for piece in pieces) == text
        assert sum(lengths) <= len(text)
        lengths.clear()
