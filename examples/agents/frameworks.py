"""Agents of four frameworks, unmodified, each pointed at its session. A framework goes into a virtual environment
of its own (``agents.NAME.python``): smolagents[openai], openai-agents, pydantic-ai-slim[openai], mini-swe-agent.

    PYTHONPATH=examples/agents atropos-verl agents run frameworks:smolagents --tasks words.jsonl

The task is a word (``speller.py`` prints some), to be spelt backward; half of the share of its letters in the answer is
the reward of a wrong one. The sizes fit the demo model, whose context is 1,024 tokens of one byte: a language model
does with the frameworks' own prompts.
"""

from typing import Any

QUESTION = "Spell this word backward (example: sun -> nus): "


def letters(task: str, answer: Any) -> float:
    """In [0, 1]."""
    word = task[::-1]
    return 1.0 if str(answer).strip() == word else 0.5 * sum(letter in str(answer) for letter in word) / len(word)


def smolagents(task: str, session: Any) -> float:
    """A ``ToolCallingAgent``; not async, so it runs in a thread."""
    from smolagents import OpenAIServerModel, ToolCallingAgent
    from smolagents.agents import EMPTY_PROMPT_TEMPLATES

    model = OpenAIServerModel("policy", api_base=session.base_url, api_key=session.api_key, max_tokens=100)
    templates: Any = {**EMPTY_PROMPT_TEMPLATES, "system_prompt": "Spell."}
    agent = ToolCallingAgent(tools=[], model=model, max_steps=1, prompt_templates=templates, verbosity_level=0)
    answer = agent.run(QUESTION + task)
    said = [str(output) for step in agent.memory.steps if (output := getattr(step, "model_output", None))]
    return letters(task, answer or " ".join(said))


async def openai_agents(task: str, session: Any) -> float:
    """An ``Agent`` on chat completions."""
    from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=session.base_url, api_key=session.api_key)
    model = OpenAIChatCompletionsModel(model="policy", openai_client=client)
    agent = Agent(name="speller", model=model, model_settings=ModelSettings(max_tokens=16, temperature=1.0))
    result = await Runner.run(agent, QUESTION + task)
    return letters(task, result.final_output)


async def pydantic_ai(task: str, session: Any) -> float:
    """An ``Agent`` on chat completions."""
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("policy", provider=OpenAIProvider(base_url=session.base_url, api_key=session.api_key))
    result = await Agent(model, model_settings={"max_tokens": 16, "temperature": 1.0}).run(QUESTION + task)
    return letters(task, result.output)


def mini_swe_agent(task: str, session: Any) -> float:
    """The ``DefaultAgent`` with a shell; an answer without a call of it is a format error, of which it takes three."""
    import tempfile

    from minisweagent.agents.default import DefaultAgent
    from minisweagent.environments.local import LocalEnvironment
    from minisweagent.models.litellm_model import LitellmModel

    at = {"api_base": session.base_url, "api_key": session.api_key, "max_tokens": 24, "temperature": 1.0}
    model = LitellmModel(model_name="openai/policy", model_kwargs=at, cost_tracking="ignore_errors")
    with tempfile.TemporaryDirectory() as directory:
        shell = LocalEnvironment(cwd=directory)
        agent = DefaultAgent(model, shell, system_template="Spell.", instance_template="{{task}}", step_limit=2)
        agent.run(QUESTION + task)
    answers = [found for message in agent.messages if (found := message.get("extra", {}).get("response"))]
    return letters(task, answers[0]["choices"][0]["message"]["content"])
