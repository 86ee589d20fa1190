"""Environments of Atropos's repository, unmodified: each trains three steps, or is refused with the reason.

Opt-in, since nothing of theirs is here::

    ATROPOS_CHECKOUT=/path/to/atropos ATROPOS_PYTHON=/path/to/env-with-transformers-4 pytest tests/zoo

``ATROPOS_CHECKOUT`` is a clone of https://github.com/NousResearch/atropos (commit in ``docs/environments.md``),
``ATROPOS_PYTHON`` an interpreter with atroposlib, transformers 4 and what the environments import. With
``ATROPOS_SMOLLM2=1`` those that need a larger model train SmolLM2, for minutes each. ``ATROPOS_FORM_MODEL`` is the
directory of a model that answers in ``<answer>`` tags (``docs/environments.md`` makes one): two more train it.
"""

import os
import re
from pathlib import Path

import pytest
from support.runs import SMALL, TrainingRun

CHECKOUT, PYTHON = os.environ.get("ATROPOS_CHECKOUT"), os.environ.get("ATROPOS_PYTHON")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (CHECKOUT and PYTHON), reason="opt-in, see the docstring")]

WORDS = (
    *SMALL,
    "steps=3",
    "save_freq=-1",
    "data.max_prompt_length=900",
    "max_response_length=100",
    "env.startup_timeout=120",
    "supervise.stall_after=20",
)
SAME = "--env.ensure_scores_are_not_same,false"
"""The demo model answers none of their questions, so all scores are equal."""
SMOLLM2 = ("model.path=smollm2-135m", "batch_size=4", "group_size=2", "data.max_prompt_length=2400")
"""For prompts that are longer than the demo model's context."""
FORM_MODEL = os.environ.get("ATROPOS_FORM_MODEL")
FORM = (f"model.path={FORM_MODEL}", "batch_size=8", "data.max_prompt_length=3000", "max_response_length=64")
"""For environments that drop groups of equal scores themselves: a model without their form never fills a batch."""
GIVEN = {(): True, SMOLLM2: os.environ.get("ATROPOS_SMOLLM2"), FORM: FORM_MODEL}
BLACKJACK, REGEX = "game_environments/gymnasium/blackjack/blackjack_env", "community/regex_generation/regex_env.py"
GYM, CUBE = "reasoning_gym_environment/reasoning_gym_environment.py", "community/selcube/rubiks_cube_environment.py"
TRAINS = [
    (f"{BLACKJACK}_no_thinking.py", "", ()),
    ("community/word_hunt/word_hunt_env.py", "", ()),
    (f"{BLACKJACK}_thinking.py", ",--env.max_token_length,96", SMOLLM2),
    (CUBE, ",--env.max_token_length,64,--env.generate_visualizations,false", SMOLLM2),
    (REGEX, ",--env.steps_per_eval,-1", FORM),
    (GYM, ",--env.steps_per_eval,-1", FORM),
]
TOO_LONG = "the prompts of the environment are too long"
REFUSED = {
    f"{BLACKJACK}_thinking.py": TOO_LONG,
    REGEX: TOO_LONG,
    GYM: "policy is being sampled, but|No valid items were scored",
    CUBE: TOO_LONG,
    "community/metric_card_generator/metric_card_generator.py": TOO_LONG,
}
BEFORE_THE_START = {
    "community/conversational_style_dpo/conversational_style_dpo_env.py": "tokenize_for_trainer_dpo, which ",
    "community/ufc_prediction_env/ufc_server.py": "imports atroposlib.envs.base.OpenaiConfig, which ",
    "infinimath/infinimath_env.py": "returns tuples from collect_trajectories where Atropos sends ScoredDataGroups",
    "sft_loader_server.py": "imports atroposlib.envs.base.OpenaiConfig, which ",
    "community/solitaire_winning_probability/solitaire_server.py": "needs the file environments/community/solitaire",
    "community/accessibility_env/accessibility_env.py": "data/accessibility_dataset.jsonl (not there from",
    "community/dynastai/dynastai_server.py": "dynastai_cards.json (not there from",
    "mcp_env.py": "needs the file my_mcp_dataset.json",
    "gsm8k_server.py": "needs the data set gsm8k",
    "gsm8k_server_axolotl.py": "needs the data set gsm8k",
    "math_server.py": "needs the data set zwhe99/DeepMath-103K",
    "math_server_zero.py": "needs the data set zwhe99/DeepMath-103K",
    "mcqa_thinking_env.py": "needs the data set NousResearch/AcademicMCQA",
    "rlaif_server.py": "needs the data set allenai/WildChat",
    "fundamental_prediction_environment.py": "needs the data set NousResearch/company-fundamentals-prediction-lite",
    "multimodal_dpo/clevr_complex.py": "needs the data set MMInstruction/Clevr_CoGenT_TrainA_70K_Complex",
}
"""Most need data sets, which are in no cache; the hub is not asked."""


def started(name: str, tmp_path: Path, args: str, *more: str) -> TrainingRun:
    """Those that import from their own package are started as modules."""
    script = Path(str(CHECKOUT), "environments", name)
    relative = re.search(r"^from \.", script.read_text(), re.MULTILINE)
    module = ".".join(Path("environments", name).with_suffix("").parts)
    words = [*WORDS, *more, f"env.module={module}" if relative else f"env.script={script}"]
    words += [f"env.python={PYTHON}", f"env.cwd={script.parent}", f"env.args=[{args}]"]
    words.append(f"env.env.PYTHONPATH={CHECKOUT}")
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "HF_HOME": str(tmp_path)}
    return TrainingRun(words, run_dir=tmp_path / "run", env=offline)


@pytest.mark.parametrize(("name", "args", "words"), TRAINS)
def test_it_trains(name: str, args: str, words: tuple[str, ...], tmp_path: Path) -> None:
    if not GIVEN[words]:
        pytest.skip("opt-in, see the docstring")
    with started(name, tmp_path, SAME + args, *words) as run:
        run.must_end(0)
        lines = run.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert sum(line["data/quarantined"] for line in lines) == 0
    assert all(line["data/trained_tokens"] > 0 for line in lines), "masks leave something to train on"
    # Spans of text that was tokenised again are matched: by their ids, or repaired.
    assert words or max(line["data/unmatched_token_rate"] for line in lines) <= 0.01


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    with started(name, tmp_path, SAME) as run:
        run.must_end(1)
        assert re.search(REFUSED[name], run.stderr)


@pytest.mark.parametrize("name", BEFORE_THE_START)
def test_it_is_refused_before_anything_starts(name: str, tmp_path: Path) -> None:
    with started(name, tmp_path, SAME) as run:
        run.must_end(2)
        assert BEFORE_THE_START[name] in run.stderr
        assert "CONFIGURATION ERROR: env." in run.stderr
        assert run.log("environment") == ""
