"""A second environment for the demo model: spell words of one length backward, three letters unless told otherwise.

It exists so that several different environments can train one policy at once (``--config-name two_environments``). All
it has of its own is its name and its words; tasks, scores and arguments are those of ``spell_backward.py``.

Errors: a ``ValueError`` at start for settings that leave no word.
"""

import logging
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # tokenises only; see spell_backward.py

sys.path.insert(0, str(Path(__file__).resolve().parent))  # its sibling, wherever this is started from

from atroposlib.envs.base import APIServerConfig
from spell_backward import SpellBackwardConfig, SpellBackwardEnv


class ShortWordsEnv(SpellBackwardEnv):
    """Words of exactly ``min_word_len`` = ``max_word_len`` = 3 letters by default, with part of a point per letter."""

    name = "short_words"

    @classmethod
    def config_init(cls) -> tuple[SpellBackwardConfig, list[APIServerConfig]]:
        config, servers = super().config_init()
        values = {"wandb_name": cls.name, "min_word_len": 3, "max_word_len": 3, "partial_credit": True}
        return config.model_copy(update=values), servers


if __name__ == "__main__":
    logging.getLogger("atroposlib.envs.base").setLevel(logging.WARNING)
    ShortWordsEnv.cli()
