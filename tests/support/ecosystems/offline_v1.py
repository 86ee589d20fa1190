"""A taskset of verifiers that needs no network: two kinds of tasks, weighted rewards, an agent in the process."""

import httpx
import verifiers.v1 as vf

__all__ = ["InProcess", "Offline"]


class Config(vf.TasksetConfig):
    turns: int = 1


class Data(vf.TaskData):
    word: str
    turns: int = 1


class Word(vf.Task[Data]):
    @vf.reward(weight=2.0)
    async def letters(self, trace: vf.Trace) -> float:
        """Share of the word's letters that were said."""
        return sum(letter in trace.last_reply for letter in self.data.word) / len(self.data.word)

    @vf.reward(weight=-0.25)
    async def length(self, trace: vf.Trace) -> float:
        return min(1.0, len(trace.last_reply) / 100)

    @vf.metric
    async def replies(self, trace: vf.Trace) -> float:
        return float(len(trace.assistant_messages))


class Offline(vf.Taskset[Word, Config]):
    def load(self):
        for word in ("sun", "moon", "star", "rain", "snow", "wind", "tree", "leaf"):
            data = Data(prompt=f"Spell this word backward (example: sun -> nus): {word}", word=word)
            yield Word(data.model_copy(update={"turns": self.config.turns}), self.config.task)


class InProcess(vf.Harness[vf.HarnessConfig]):
    EXECUTES_CODE = NEEDS_CONTAINER = False
    APPENDS_SYSTEM_PROMPT = True

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        messages = [{"role": "user", "content": data.prompt}]
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {secret}"}, timeout=60) as client:
            for _ in range(data.turns):
                body = {"model": ctx.model, "messages": messages}
                answer = await client.post(f"{endpoint}/chat/completions", json=body)
                if answer.status_code != 200:
                    return vf.ProgramResult(exit_code=1, stdout="", stderr=answer.text)
                messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": "Again."}]
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")
