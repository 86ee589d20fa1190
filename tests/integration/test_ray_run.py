"""One run on Ray and verl's V1 trainer over recorded batches: interrupted, resumed, and held against the local backend.

The batches are posted by the test to our own trajectory API; the run attaches to it. What it trained must be, step by
step, what the local backend trains on the same batches and weights.
"""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from support.runs import TrainingRun, checkpointed_step, journalled, metrics_of, summary_of
from support.serving import post
from support.trajectory_server import ServerProcess
from transformers import AutoModelForCausalLM

from atropos_verl import AtroposTrainer
from atropos_verl.assets import demo_model_path
from atropos_verl.config.composition import KEY_FILE
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.wire import decode_batch, encode_group
from atropos_verl.training.batch_source import RolloutData

GROUPS, GROUP_SIZE = 4, 4
STEPS = 4


def recorded_batches() -> list[list[bytes]]:
    """Batches of the demo model for every step, as JSON to post, with everything an environment can put into a group.

    In every batch: one group of two turns, one with token-level advantages for two of its sequences, one with a zeroed
    sequence and a reference's logprobs, one with a teacher's values. The logprobs are the demo model's. The second
    batch has a group with an id outside the vocabulary, to be quarantined; all sequences of the third have the same
    length.
    """
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
    vocabulary = int(model.config.vocab_size)
    rng = np.random.default_rng(0)
    batches: list[list[bytes]] = []
    for b in range(STEPS):
        batches.append([])
        for g in range(GROUPS):
            prompt = rng.integers(0, vocabulary, 6).tolist()
            lengths = [7 if b == 2 else int(rng.integers(4, 9)) for _ in range(GROUP_SIZE)]
            tokens = [prompt + rng.integers(0, vocabulary, length).tolist() for length in lengths]
            batches[b].append(_group(model, tokens, g, rng, spoilt=b == 1 and g == GROUPS - 1))
    return batches


def _group(model: Any, tokens: list[list[int]], kind: int, rng: np.random.Generator, *, spoilt: bool) -> bytes:
    masks = [[-100] * 6 + row[6:] for row in tokens]
    if kind == 0:  # a tool's answer between two turns
        masks = [[*mask[:7], -100, *mask[8:]] for mask in masks]
    fields: dict[str, Any] = {"inference_logprobs": []}
    for row, mask in zip(tokens, masks, strict=True):
        with torch.no_grad():
            table = torch.log_softmax(model(torch.tensor([row])).logits[0], -1)
        known = [1.0 if m == -100 else float(table[t - 1, row[t]]) for t, m in enumerate(mask)]
        fields["inference_logprobs"].append(known)
    if kind == 1:
        fields["advantages"] = [rng.normal(size=len(row)).tolist() if i < 2 else None for i, row in enumerate(tokens)]
    if kind == 2:
        fields["overrides"] = [{"set_advantage_to_zero": True}, {}, {}, {}]
        fields["ref_logprobs"] = [[1.0 if m == -100 else -2.0 for m in mask] for mask in masks]
    if kind == 3:  # one or two tokens of a teacher for each that is trained
        fields["distill_token_ids"] = [
            [[] if m == -100 else [t, t + 1][: 1 + t % 2] for t, m in enumerate(mask)] for mask in masks
        ]
        fields["distill_logprobs"] = [[[-1.5] * len(ids) for ids in row] for row in fields["distill_token_ids"]]
    if spoilt:
        tokens[2][-1] = masks[2][-1] = int(model.config.vocab_size) + 5
    about = {"temperature": 1.0, "policy_version": 0}
    scores = rng.normal(size=len(tokens)).tolist()
    return encode_group(tokens=tokens, masks=masks, scores=scores, generation_params=about, **fields)


def at_gateway(run: TrainingRun) -> httpx.Client:
    run.wait_for_output("are to use the gateway at ")
    [url] = re.findall(r"are to use the gateway at (\S+)/v1", run.stdout)
    assert run.run_dir is not None
    key = (run.run_dir / KEY_FILE).read_text().strip()
    return httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60.0)


def turn(client: httpx.Client, session: dict[str, Any], *messages: dict[str, str]) -> dict[str, Any]:
    """The answer to the agent's first request, or after ``messages``; a request that is sent again has one answer."""
    key = {"authorization": f"Bearer {session['api_key']}", "idempotency-key": f"turn {len(messages)}"}
    body = {"messages": [*messages, {"role": "user", "content": "a"}], "max_tokens": 3}
    answer = client.post("/v1/chat/completions", json=body, headers=key)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_run_that_is_interrupted_and_killed_trains_every_batch_once_as_the_local_backend_does(tmp_path: Path) -> None:
    """Until Ctrl-C after two steps; going on, with a killed replica and later a killed task runner; to the end."""
    run_dir, batches = tmp_path / "run", recorded_batches()
    with ServerProcess(tmp_path) as server, AtroposClient(server.url) as client:
        words = [
            "backend=ray",
            f"atropos.api_url={server.url}",
            f"trainer.total_training_steps={STEPS}",
            f"data.train_batch_size={GROUPS}",
            f"actor_rollout_ref.rollout.n={GROUP_SIZE}",
            "trainer.save_freq=1",
            "atropos.off_policy.max_staleness=null",
            "atropos.advantage_normalization=global",
            "atropos.loss.ref_weight=0.1",
        ]
        with TrainingRun(words, run_dir=run_dir) as run:
            run.wait_for_output("waiting for a batch")
            for batch in batches[:2]:
                client.post_scored_data_list(batch)
            run.wait_for_step(2)
            run.ctrl_c()
            run.must_end(130)
            assert run.processes_seen > 8, "Ray's processes were among those watched"
        assert checkpointed_step(run_dir) == 2
        with TrainingRun(words, run_dir=run_dir) as run:
            run.wait_for_output("resumed at step 2")
            run.kill_actor("TransformersServer")
            client.post_scored_data_list(batches[2])
            run.wait_for_step(3)
            with at_gateway(run) as gateway:
                session = post(gateway, "/sessions", group="g")
                first = turn(gateway, session)
            run.kill_actor("AtroposTaskRunner")
            run.must_end(1)
            assert "Ray's actor AtroposTaskRunner was killed." in run.stderr
            goes_on = f"(the same command with run_dir={run_dir} trainer.resume_mode=auto goes on from step 3)"
            assert run.stderr.splitlines()[-1] == goes_on
            assert "Traceback" not in run.stderr
        with TrainingRun(words, run_dir=run_dir) as run:
            run.wait_for_output("resumed at step 3")
            with at_gateway(run) as gateway:
                again = turn(gateway, session)
                assert (again["id"], again["choices"]) == (first["id"], first["choices"]), "it was sampled again"
                turn(gateway, session, {"role": "user", "content": "a"}, first["choices"][0]["message"])
                post(gateway, f"/sessions/{session['id']}/reward", reward=1)
                rollout = gateway.get(f"/sessions/{session['id']}/rollout").json()
                assert [row["turns"] for row in rollout["rows"]] == [[0, 1]]
            client.post_scored_data_list(batches[3])
            run.must_end(0)
        status = client.status()
    assert (status.queue_size, status.current_step) == (0, STEPS)
    assert (checkpointed_step(run_dir), journalled(run_dir)) == (STEPS, [])

    lines = metrics_of(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["sync/replicas_replaced"] for line in lines] == [0, 0, 1, 0]
    assert all(line["sync/canary_max_abs_logprob_diff"] < 1e-5 for line in lines)
    summary = summary_of(run_dir)
    assert summary["rewards"] == [line["reward/mean"] for line in lines], "of all processes"
    assert summary["reward_first"] == pytest.approx(sum(summary["rewards"][:2]) / 2)
    totals = json.loads((run_dir / "checkpoints" / f"global_step_{STEPS}" / "atropos.json").read_text())["totals"]
    assert (totals["groups_used"], totals["groups_quarantined"]) == (STEPS * GROUPS - 1, 1)
    [path] = (run_dir / "quarantine").glob("*.json")
    assert "tokens[2]" in path.read_text()
    assert [line["data/quarantined"] for line in lines] == [0, 1, 0, 0]
    # The engine that wrote the first batch had the trainer's weights. The later ones are of the same weights: the
    # figure says that they are old.
    diffs = [line["training/rollout_probs_diff_mean"] for line in lines]
    assert diffs[0] < 1e-5
    assert all(earlier < later for earlier, later in pairwise(diffs))
    assert [line["off_policy/staleness_max"] for line in lines] == [0, 1, 2, 3]
    check_against_the_local_backend(lines, batches, tmp_path / "local")


def check_against_the_local_backend(lines: list[dict[str, Any]], batches: list[list[bytes]], run_dir: Path) -> None:
    config = {
        "run_dir": str(run_dir),
        "atropos": {"api_url": "http://127.0.0.1:9"},  # never asked
        "group_size": GROUP_SIZE,
        "batch_size": GROUPS * GROUP_SIZE,
        "advantage_normalization": "global",
        "max_response_length": 16,
        "data": {"max_prompt_length": 48},
        "optim": {"lr": 2e-4},
        "use_advantage_weighting": True,
        "loss": {"ref_weight": 0.1},
    }
    with AtroposTrainer.from_config(config) as trainer:
        bodies = [b'{"batch": [' + b",".join(batch) + b"]}" for batch in batches]
        reports = [trainer.train_on(RolloutData(decode_batch(body))) for body in bodies]
    # To the last bit but one: verl multiplies a figure by the number of rows and divides again. The values themselves
    # are compared bit by bit in tests/unit/backends/ray/test_feed.py.
    for line, report in zip(lines, reports, strict=True):
        step = report.metrics
        assert line["advantage/mean_abs"] == pytest.approx(step["advantage/mean_abs"], rel=1e-14)
        assert line["data/trained_tokens"] == step["data/trained_tokens"]
        # Over the trained tokens of the loss itself, inside verl's worker: what was posted is what is optimised.
        assert line["actor/advantage_mean"] == pytest.approx(step["actor/advantage_mean"], rel=1e-5, abs=1e-7)
        assert line["loss"] == pytest.approx(report.loss, rel=1e-4), line["step"]
        assert line["actor/grad_norm"] == pytest.approx(step["actor/grad_norm"], rel=1e-4), line["step"]
        ours, theirs = ({k: v for k, v in d.items() if k.startswith(("distill/", "ref/"))} for d in (step, line))
        assert theirs == pytest.approx(ours, rel=1e-4), line["step"]
        assert (line["advantage/replaced_sequences"], line["advantage/zeroed_sequences"]) == (2.0, 1.0)
    assert {"distill/kl", "distill/known", "ref/kl", "ref/known"} <= lines[0].keys()
