"""The demo environment with one fault, named by the variable FAULT: no batch ever comes from it."""

import os
import sys
from pathlib import Path
from typing import Any

sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # it never runs a model, and starts faster
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "environments"))

from spell_backward import SpellBackwardEnv  # noqa: E402

FAULT = os.environ.get("FAULT", "")


class FailingEnv(SpellBackwardEnv):
    """``raises``: in every task; ``asks_wrongly``: for what the gateway refuses; ``sends_wrongly``: what the API
    refuses; ``same``: equal scores; ``long``: prompts over the model's context.

    Beside the faults: CHAT asks by the chat client of Atropos, too, and READS names a file that must be there.
    """

    async def setup(self) -> None:
        await super().setup()
        if "READS" in os.environ:
            Path(os.environ["READS"]).read_text()  # noqa: ASYNC240
        self.config.ensure_scores_are_not_same = FAULT == "same"

    async def collect_trajectories(self, item: dict[str, Any]) -> Any:
        if FAULT == "raises":
            raise KeyError("answer_key")
        if FAULT == "asks_wrongly":
            await self.server.completion(prompt=item["question"], n=1, max_tokens=8, best_of=7)
        if os.environ.get("CHAT"):
            await self.server.chat_completion(messages=[{"role": "user", "content": "a"}], n=1, max_tokens=1)
        times = 300 if FAULT == "long" else 1
        group, backlog = await super().collect_trajectories({**item, "question": times * item["question"]})
        if FAULT == "sends_wrongly":
            group["masks"] = [mask[:-1] for mask in group["masks"]]
        if FAULT == "same":
            group["scores"] = [1.0 for _ in group["scores"]]
        return group, backlog


if __name__ == "__main__":
    FailingEnv.cli()
