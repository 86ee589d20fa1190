"""Sample rollouts for the trackers of ``trainer.logger`` that can show a table or a conversation."""

import logging
from typing import Any

from atropos_verl.errors import ConfigError
from atropos_verl.report.trace_reader import RolloutFilter, TraceReader

logger = logging.getLogger(__name__)

_EVERY = 10
_SAMPLES = 4
_COLUMNS = ("step", "id", "environment", "reward", "tokens", "prompt", "answer")


def send_rollouts(tracking: Any, reader: TraceReader, step: int) -> None:
    """After step 2 and every tenth step from there on, sends a few rollouts of the step before (those of ``step`` are
    being written) as ``rollouts`` to wandb and trackio. ``tracking``: verl's ``Tracking``, which takes them there."""
    names = [name for name in ("wandb", "trackio") if name in tracking.logger]
    if step % _EVERY != 2 or not names:
        return
    try:
        of_step = RolloutFilter(step=step - 1, state="trained")
        found = [reader.sequence(one["id"]) for one in reader.rollouts(of_step, _SAMPLES)]
    except (ConfigError, KeyError) as error:  # KeyError: it was removed meanwhile
        logger.warning("no rollouts of step %d for trackers: %s", step - 1, error)
        return
    for one in found:
        turns = one["turns"] or []
        first = next((number for number, turn in enumerate(turns) if turn["trained"]), len(turns))
        one["prompt"], one["answer"] = ("".join(t["text"] for t in part) for part in (turns[:first], turns[first:]))
    rows = [[one[name] for name in _COLUMNS] for one in found]
    for name in names if rows else ():
        if name == "wandb":
            shown: Any = tracking.logger[name].Table(columns=list(_COLUMNS), data=rows)
        else:
            from trackio import Trace  # type: ignore[import-not-found]

            said = [[{"role": t["role"], "content": t["text"]} for t in one["turns"] or []] for one in found]
            facts = [dict(zip(_COLUMNS[:5], row, strict=False)) for row in rows]
            shown = [Trace(messages=m, metadata=f) for m, f in zip(said, facts, strict=True)]
        tracking.log(data={"rollouts": shown}, step=step, backend=[name])
