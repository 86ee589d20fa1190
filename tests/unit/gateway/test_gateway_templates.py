"""Chat templates: what reaches them of a request, and what happens when one does not end."""

import subprocess
from typing import Any

import pytest
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.gateway import templates
from atropos_verl.gateway.fields import ApiError, Fields, parse_sampling
from atropos_verl.gateway.templates import ChatTemplate

EACH = "{% for m in messages %}"
CALL = {"id": "c1", "type": "function"}


def prompt(template: str, *messages: dict[str, Any], allows_clients: bool = False, **body: Any) -> str:
    """The prompt of the model's own ``template``."""
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = template
    own = ChatTemplate(tokenizer, allows_clients=allows_clients)
    fields = Fields({"messages": list(messages), **body})
    sampling = parse_sampling(fields, max_tokens_names=("max_tokens",), max_tokens_default=None)
    tools, choice = tuple(body.get("tools", ())), body.get("tool_choice", "auto")
    return own.prompt(own.turn(fields, own.messages(fields), sampling=sampling, tools=tools, tool_choice=choice))


def calling(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": {"name": "w", **arguments}}]}


ARGUMENTS = EACH + "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
ITEMS = EACH + "{% for c in m.tool_calls %}{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}"
ITEMS += "{% endfor %}{% endfor %}"
CONTENT = EACH + "{{ '[' + m.content + ']' }}{% endfor %}"
PARTS = EACH + "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}<{{ p.text }}>{% endfor %}"
PARTS += "{% endif %}{% endfor %}"
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
        (PARTS, {"role": "user", "content": AB}, "<a><b>"),
        (PARTS, {"role": "user", "content": "ab"}, "ab"),
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
    ("template", "sent", "param", "reason"),
    [
        ("{{ 1 // 0 }}", False, "messages", "ZeroDivisionError"),
        ("{{ messages[7].role }}", False, "messages", "UndefinedError"),
        ("{{ messages + 1 }}", False, "messages", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", False, "messages", "RecursionError"),
        ("{% if %}", False, "messages", "TemplateSyntaxError"),
        ("{{ 'x' * 16777216 }}y", False, "messages", "16777216 characters"),
        ("{{ 'x' * 16777216 }}y", True, "messages", "16777216 characters"),
        ("{{ 1 // 0 }}", True, "chat_template", "ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_is_a_400_that_names_the_field(
    template: str, sent: bool, param: str, reason: str
) -> None:
    own, body = ("", {"chat_template": template}) if sent else (template, {})
    with pytest.raises(ApiError, match=reason) as caught:
        prompt(own, {"role": "user", "content": "x"}, allows_clients=True, **body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_templates_of_clients_are_refused_unless_they_are_the_models_or_allowed() -> None:
    message = {"role": "user", "content": "x"}
    with pytest.raises(ApiError, match=r"gateway\.allow_client_templates") as caught:
        prompt("own", message, chat_template="sent")
    assert caught.value.param == "chat_template"
    assert prompt("own", message, chat_template="own") == "own"
    assert (
        prompt(
            "own", message, chat_template="sent {{ bos }}{{ x }}", chat_template_kwargs={"x": 1}, allows_clients=True
        )
        == "sent 1"
    )


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{{ '' }}{% endfor %}{% endfor %}"
POWER = "{{ (9**(9**8)) % 7 }}"
DOUBLING = "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"


@pytest.mark.parametrize(("template", "sent"), [(ENDLESS, False), (ENDLESS, True), (POWER, True), (DOUBLING, True)])
def test_rendering_has_an_end(template: str, sent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # The last one ends at the bound on memory, whenever its process has started.
    monkeypatch.setattr(templates, "_SECONDS", 60.0 if template == DOUBLING else 0.5)
    own, body = ("", {"chat_template": template}) if sent else (template, {})
    with pytest.raises(ApiError, match="MemoryError" if template == DOUBLING else r"takes longer than 0\.5 s"):
        prompt(own, {"role": "user", "content": "x"}, allows_clients=True, **body)


def test_the_process_of_a_clients_template_gets_no_variable_that_it_does_not_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, str] = {}

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> Any:
        given.update(env)
        raise subprocess.TimeoutExpired(command, 1.0)

    for name in ("PGPASSWD", "BASIC_AUTH", "SENTRY_DSN", "DATABASE_URL", "HF_TOKEN", "PYTHONPATH", "HF_HOME", "LC_ALL"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ApiError):
        prompt("", {"role": "user", "content": "x"}, allows_clients=True, chat_template="y")
    assert {name for name, value in given.items() if value == "x"} == {"PYTHONPATH", "HF_HOME", "LC_ALL"}
    assert "PATH" in given


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
