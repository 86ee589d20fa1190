"""Chat templates: what reaches them of a request, and what is refused."""

from typing import Any

import pytest
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.gateway.chat import ChatTemplate
from atropos_verl.gateway.fields import ApiError, Fields, parse_sampling

EACH = "{% for m in messages %}"
CALL = {"id": "c1", "type": "function"}


def prompt(template: str, *messages: dict[str, Any], **body: Any) -> str:
    """The prompt of the model's ``template``."""
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = template
    own = ChatTemplate(tokenizer)
    fields = Fields({"messages": list(messages), **body})
    said, form = own.messages(fields, "messages", enumerate(messages)), (fields, "response_format")
    sampling = parse_sampling(fields, ("max_tokens",), served="response_format")
    return own.prompt(own.turn(fields, said, lambda tool: tool["function"], form, sampling=sampling))


def calling(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": {"name": "w", **arguments}}]}


ARGUMENTS = EACH + "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
ITEMS = EACH + "{% for c in m.tool_calls %}{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}"
ITEMS += "{% endfor %}{% endfor %}"
CONTENT = EACH + "{{ '[' + m.content + ']' }}{% endfor %}"
AB = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    ("template", "message", "expected"),
    [
        (ARGUMENTS, calling({"arguments": '{"city": "Rome"}'}), '{"city": "Rome"}'),
        (ITEMS, calling({"arguments": '{"city": "Rome"}'}), "city=Rome"),
        (ITEMS, calling({"arguments": {"city": "Rome"}}), "city=Rome"),
        (ARGUMENTS, calling({}), "{}"),
        (ARGUMENTS, calling({"arguments": ""}), "{}"),
        (ARGUMENTS, calling({"arguments": "[1"}), '"[1"'),  # what a policy wrote need not be JSON
        (ARGUMENTS, calling({"arguments": "[" * 5000}), f'"{"[" * 5000}"'),
        (CONTENT, {"role": "user", "content": AB}, "[a\nb]"),
        (CONTENT, {"role": "user", "content": ["a", {"type": "input_text", "text": "b"}]}, "[a\nb]"),
        (CONTENT, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "[no]"),
        (CONTENT, {"role": "tool", "tool_call_id": "c1", "content": AB}, "[a\nb]"),
        (CONTENT, {"role": "assistant", "content": None}, "[]"),
        # Absent, as to templates that ask whether it is defined.
        (EACH + "{{ m.tool_calls is defined }}{{ m.name is defined }}{% endfor %}", calling({}), "TrueFalse"),
        (
            EACH + "{{ m.tool_calls is defined }}{{ m.function_call is defined }}{% endfor %}",
            {"role": "assistant", "content": "x", "tool_calls": [], "function_call": None},
            "FalseFalse",
        ),
        (EACH + "{{ m.role }}{% endfor %}", {"role": "developer", "content": "x"}, "system"),
        (EACH + "{{ m.role }}{# developer #}{% endfor %}", {"role": "developer", "content": "x"}, "developer"),
    ],
)
def test_messages_reach_templates_in_the_form_that_they_expect(
    template: str, message: dict[str, Any], expected: str
) -> None:
    assert prompt(template, message) == expected


def test_a_tools_answer_has_the_name_of_the_call() -> None:
    answers: list[dict[str, Any]] = [{"role": "tool", "tool_call_id": "c1", "content": "ok"}]
    answers.append({**answers[0], "name": "given"})
    assert prompt(EACH + "{{ m.name }}|{% endfor %}", calling({}), *answers) == "|w|given|"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[7].role }}", "UndefinedError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 'x' * 16777216 }}y", "16777216 characters"),
        ("{{ messages[10000].content }}", "10001 messages; send 10000 at most"),
    ],
)
def test_a_template_that_fails_is_a_400(template: str, reason: str) -> None:
    message = {"role": "user", "content": "x"}
    with pytest.raises(ApiError, match=reason) as caught:
        prompt(template, *[message] * (10_001 if "10000" in template else 1))
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_templates_of_clients_are_refused_unless_they_are_the_models() -> None:
    message = {"role": "user", "content": "x"}
    assert prompt("own", message, chat_template="own") == "own"
    with pytest.raises(ApiError, match="runs the model's own only"):
        prompt("own", message, chat_template="sent")


TOOLS = [{"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}]


def test_tools_are_text_for_a_template_that_knows_none() -> None:
    chatml = EACH + "[{{ m.role }}|{{ m.content }}]{% endfor %}"
    asked: dict[str, Any] = {"role": "user", "content": "q"}
    answers = [{"role": "tool", "tool_call_id": f"c{k}", "content": f"r{k}"} for k in (1, 2)]
    said = [{"role": "system", "content": "Be brief."}, asked, calling({"arguments": '{"x":  1}'}), *answers]
    text = prompt(chatml, *said, tools=TOOLS)
    assert text.startswith('[system|Be brief.\n\nYou may call tools:\n<tools>\n{"name":"w",')
    call = '[assistant|<tool_call>\n{"name": "w", "arguments": {"x":  1}}\n</tool_call>]'
    results = "[user|<tool_response>\nr1\n</tool_response>\n<tool_response>\nr2\n</tool_response>]"
    assert text.endswith(f"</tool_call>][user|q]{call}{results}")
    assert prompt(chatml, asked, tools=TOOLS).startswith("[system|You may call tools:")
    # Without calls nothing changes; what an assistant called before is never lost.
    assert prompt(chatml, asked, tools=TOOLS, tool_choice="none") == "[user|q]"
    assert prompt(chatml, asked, calling({"arguments": "{}"}), answers[0]).endswith("</tool_call>][tool|r1]")
    assert prompt(EACH + "{{ tools[0].function.name }}{% endfor %}", asked, tools=TOOLS) == "w"
