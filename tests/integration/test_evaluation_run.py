"""A whole run with ``mode=overlap`` that is evaluated while it trains: the ledger says which weights wrote what."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.runs import SMALL, TrainingRun, metrics_of, summary_of
from transformers import AutoTokenizer

from atropos_verl.assets import demo_model_path
from atropos_verl.provenance.ledger import IDS, Ledger

WORDS, SAMPLES = 24, 2
PINNED, LAST = 4, 8


def test_every_evaluated_token_is_of_one_version_while_training_goes_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [*SMALL, "mode=overlap", f"steps={LAST}", f"eval.every={PINNED}", "eval.keep_best=true", "eval.after=true"]
    words += [f'env.args=["--env.eval_words","{WORDS}","--env.eval_samples","{SAMPLES}"]']
    words += ["save_freq=1", "trainer.max_ckpt_to_keep=1"]
    with TrainingRun(words, run_dir=run_dir) as run:
        run.must_end(0)
    place = run_dir / "eval" / f"step_{PINNED}"
    questions = {json.loads(line)["question"] for line in (place / "samples.jsonl").read_text().splitlines()}
    assert len(questions) == WORDS
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    ledger = Ledger()
    ledger.persist(run_dir / "ledger", LAST)
    versions: Counter[int] = Counter()
    pinned, trained = [], []
    for record in ledger.newest(len(ledger)):
        prompt = tokenizer.decode(np.frombuffer(record.prompt.ids, dtype=IDS).tolist())
        if any(question in prompt for question in questions):
            [(version, _)] = record.runs
            versions[version] += 1
            pinned += [record.order] * (version == PINNED)
        else:
            trained.append((record.order, max(version for version, _ in record.runs)))
    ledger.close()
    assert versions == {PINNED: WORDS * SAMPLES, LAST: WORDS * SAMPLES}
    assert any(order < max(pinned) for order, version in trained if version > PINNED), "newer weights wrote meanwhile"
    lines, summary = metrics_of(run_dir), summary_of(run_dir)
    [score] = summary["held_out_steps"].values()
    assert [(line["held_out/step"], line["held_out/score"]) for line in lines if "held_out/step" in line] in (
        [],  # it ended after the last step
        [(PINNED, score)],
    )
    best = LAST if summary["held_out_after"] >= score else PINNED
    assert (run_dir / "checkpoints" / f"global_step_{best}").is_dir()
    assert (run_dir / "checkpoints" / "best").resolve().name == f"global_step_{best}"


@pytest.mark.skipif(not os.environ.get("ATROPOS_VERL_EVALUATION_RESUME"), reason="two more runs: half a minute")
def test_a_run_that_is_interrupted_in_an_evaluation_makes_it_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [*SMALL, "steps=6", "eval.every=2", "eval.keep_best=true", "save_freq=100"]
    words += [f'env.args=["--env.eval_words","{WORDS}","--env.eval_samples","{SAMPLES}"]']
    with TrainingRun(words, run_dir=run_dir) as run:
        run.wait_for_output("evaluating on held-out tasks at step 4")
        run.ctrl_c()
        run.must_end(130)
    with TrainingRun(words, run_dir=run_dir) as run:
        run.must_end(0)
        assert "at step 4, policy version 4" in run.stdout
        assert "held-out mean reward at step 2" not in run.stdout
        assert "held-out mean reward at step 4" in run.stdout
    scores = summary_of(run_dir)["held_out_steps"]
    assert list(scores) == ["2", "4"]
    lines = [line for line in metrics_of(run_dir) if "held_out/step" in line]
    assert [(line["step"], line["held_out/step"], line["held_out/score"]) for line in lines] == [
        (3, 2, scores["2"]),
        (5, 4, scores["4"]),
    ]
    best = 4 if scores["4"] >= scores["2"] else 2
    assert (run_dir / "checkpoints" / "best").resolve().name == f"global_step_{best}"
