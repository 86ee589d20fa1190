"""``inspect`` on files written by hand and on real stores of a run: text and figures are worked out here."""

import argparse
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from atropos_verl.assets import demo_model_path
from atropos_verl.protocol.journal import BatchJournal
from atropos_verl.protocol.schema import check_group
from atropos_verl.protocol.wire import decode_group, join_packed, pack_group
from atropos_verl.report import inspect as command
from atropos_verl.report.inspect import load_groups, read_path
from atropos_verl.training.quarantine import QuarantineStore
from atropos_verl.types import QuarantinedGroup

A, B, C, NEWLINE, END = 64, 65, 66, 198, 258  # of the demo model's tokenizer
DEMO = ("--tokenizer", str(demo_model_path()))

# Scores 1 and 0: mean 0.5, sample standard deviation 0.70711, so GRPO advantages are ±0.5 / 0.707108 = ±0.70711.
GROUP: dict[str, Any] = {
    "tokens": [[A, B, NEWLINE, C, END], [A, B, NEWLINE, B, A, END]],
    "masks": [[-100, -100, -100, C, END], [-100, -100, -100, B, -100, END]],
    "scores": [1.0, 0.0],
    "inference_logprobs": [[1.0, 1.0, 1.0, -0.25, -0.75], []],
    "generation_params": {"temperature": 0.9, "policy_version": 3},
    "env_id": 2,
}
Inspect = Callable[..., str]


@pytest.fixture
def inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inspect:
    """What the command says of a path, or of a file that holds ``content``; it must end with ``code``."""
    monkeypatch.chdir(tmp_path)

    def inspect(content: Any, *words: str, terminal: bool = False, code: int = 0) -> str:
        path = content if isinstance(content, Path) else Path("content.json")
        if path is not content:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        raw = io.BytesIO()
        with io.TextIOWrapper(raw, encoding="utf-8", write_through=True) as file:
            console = Console(file=file, width=80, force_terminal=terminal, _environ={"TERM": "xterm"})
            assert command.run(parser.parse_args([str(path), *words]), console) == code
            return raw.getvalue().decode()

    return inspect


def test_a_batch_shows_text_marks_and_figures(inspect: Inspect) -> None:
    text = inspect({"batch": [GROUP]}, "--policy-version", "5", *DEMO)
    assert re.sub("[0-9a-f]{16}", "ID", text) == (
        "group 0: id ID, env_id 2, sequences: 2\n"
        "  sequence 0: score 1.000, 2 of 5 tokens trained, advantage 0.707, logprob -0.500 [-0.750 .. -0.250], "
        "temperature 0.9, policy version 3 (2 behind)\n"
        "    ab\n"
        "    [[c<|im_end|>]]\n"
        "  sequence 1: score 0.000, 2 of 6 tokens trained, advantage -0.707, temperature 0.9, "
        "policy version 3 (2 behind)\n"
        "    ab\n"
        "    [[b]]a[[<|im_end|>]]\n"
        "\n"
        "groups: 1 used, 0 refused; sequences: 2 trained, 0 dropped as overlong; trained tokens: 4; mean score: 0.500\n"
    )


def test_on_a_terminal_trained_tokens_are_reversed_and_coloured(inspect: Inspect) -> None:
    text = inspect(GROUP, *DEMO, terminal=True)
    assert "    \x1b[7;32mc<|im_end|>\x1b[0m\n" in text  # reverse, green: positive advantage
    assert "    \x1b[7;31mb\x1b[0ma\x1b[7;31m<|im_end|>\x1b[0m\n" in text  # red: negative
    assert "[[" not in text
    escape = 215  # byte 0x1b in the demo's byte-level vocabulary: no trajectory reaches the terminal
    group = {"tokens": [[A, escape, 58, B]], "masks": [[-100, escape, 58, B]], "scores": [1.0]}
    assert "    a[[\\x1b[b]]\n" in inspect(group, *DEMO)


def test_every_refusal_has_its_reason(inspect: Inspect) -> None:
    wrong_mask = {**GROUP, "masks": [[-100, -100, -100, 1, END], GROUP["masks"][1]]}
    batch = {"batch": [wrong_mask, {**GROUP, "images": ["x.png"]}, {"tokens": "abc"}, GROUP]}
    text = inspect(batch, "--limit", "0", *DEMO)
    assert "  refused: masks[0][3] = 1: must be -100 (not trained) or the token id 66\n" in text
    assert "  would stop the run: images: the environment with env_id 2 sends this ScoredData field" in text
    assert "  refused: masks: the field is missing\n" in text
    assert "  sequence 0: score 1.000, 2 of 5 tokens marked as trained\n" in text
    assert "groups: 1 used, 3 refused; sequences: 2 trained" in text
    ignoring = inspect(batch, "--ignore-field", "images", "--estimator", "rloo", "--clipping", "-0.5", "3")
    # RLOO of two: score minus the other's: +1 and -1; clipped to [-0.5, 3].
    assert "advantage 1.000, logprob" in ignoring and "advantage -0.500, temp" in ignoring
    assert "groups: 2 used, 2 refused" in ignoring
    recorded = inspect({"reason": "tokens[0][1] = 65: too large", "group_id": "x", "group": GROUP})
    assert recorded.startswith("quarantined group: id ")
    assert "  quarantined by the run: tokens[0][1] = 65: too large\n" in recorded
    assert "  with the settings of this inspection it would be trained on\n" in recorded


def test_overlong_sequences_are_named_and_count_in_the_baseline(inspect: Inspect) -> None:
    text = inspect(GROUP, "--max-token-len", "5")
    assert "    not trained: 6 tokens, more than max_token_len = 5\n" in text
    assert "sequence 0: score 1.000, 2 of 5 tokens trained, advantage 0.707" in text
    assert "sequences: 1 trained, 1 dropped as overlong; trained tokens: 2; mean score: 0.500" in text


def test_a_limit_hides_sound_groups_and_no_refusal(inspect: Inspect) -> None:
    text = inspect({"batch": [GROUP] * 9 + [{**GROUP, "scores": [1.0]}]})
    lines = [line for line in text.splitlines() if line.startswith(("group", "..."))]
    assert [line.partition(": id")[0] for line in lines] == [
        *(f"group {number}" for number in range(8)),
        "... 2 more groups (--limit 0 shows all)",
        "group 9: refused: scores: 1 entries, but tokens has 2; one per sequence is needed",
        "groups: 9 used, 1 refused; sequences: 18 trained, 0 dropped as overlong; "
        "trained tokens: 36; mean score: 0.500",
    ]


def test_ids_are_shown_where_the_tokenizer_does_not_fit(inspect: Inspect) -> None:
    group = {"tokens": [[5, 70000, 8]], "masks": [[-100, 70000, 8]], "scores": [1.0]}
    assert "    5[[70000 8]]\n" in inspect(group)
    refused = "refused: tokens[0][1] = 70000: outside the vocabulary"
    assert f"{refused} [0, 261)" in inspect(group, *DEMO), "of the tokenizer's model"
    assert f"{refused} [0, 100)" in inspect(group, "--vocab-size", "100", *DEMO)


@pytest.mark.parametrize(
    ("content", "words", "code", "fault"),
    [
        (Path("no-such-file.json"), [], 2, "no-such-file.json: No such file or directory"),
        (Path(), [], 2, "holds no .json or .jsonl file"),
        ("not json", [], 1, "neither JSON nor JSON lines (line 1: group: not JSON"),
        ({"x": 1}, [], 1, "neither a batch, a group nor a quarantine file; it begins b'{\"x\": 1}'"),
        (" \n", [], 1, "content.json is empty"),
        ({"batch": 3}, [], 1, "content.json: the answer to GET /batch is not an object with a list"),
        ({"reason": "x"}, [], 1, "content.json: not a quarantine file"),
        (GROUP, ["--tokenizer", "/none.json"], 2, "no tokenizer at /none.json"),
        (GROUP, ["--tokenizer", "content.json"], 2, "no tokenizer at content.json"),
        (GROUP, ["--limit", "-1"], 2, "--limit: -1 must not be negative"),
        (GROUP, ["--clipping", "3", "-3"], 2, "clipping: [3.0, -3.0] is not a range"),
    ],
)
def test_faults_and_exit_codes(
    inspect: Inspect, capsys: pytest.CaptureFixture[str], content: Any, words: list[str], code: int, fault: str
) -> None:
    assert inspect(content, *words, code=code) == ""
    error = capsys.readouterr().err
    assert error.startswith("atropos-verl inspect: ") and fault in error


G1 = b'{"tokens": [[5, 6]], "masks": [[-100, 6]], "scores": [1.0]}'
G2 = b'{"tokens": [[7, 8]], "masks": [[-100, 8]], "scores": [2.0]}'
NAN = b'{"tokens": [[7, 8]], "masks": [[-100, 8]], "scores": [NaN]}'


def packed(*raw: bytes) -> bytes:
    return b"".join(join_packed([pack_group(check_group(group)) for group in raw]))


@pytest.mark.parametrize(
    ("content", "scores"),
    [
        (b'{"batch": [' + G1 + b", " + G2 + b"]}", [1.0, 2.0]),
        (b'\n{ "batch":[' + G1 + b"," + G2 + b"]}\n", [1.0, 2.0]),
        (b'{"lease_id": "x", "batch": [' + G1 + b", " + G2 + b"]}", [1.0, 2.0]),
        (b"[" + G1 + b"," + G2 + b"]", [1.0, 2.0]),
        (packed(G1), [1.0]),
        (G1, [1.0]),
        (json.dumps(json.loads(G1), indent=2).encode(), [1.0]),
        (b'{"batch": null}', []),
        *[(body, [math.nan]) for body in (NAN, NAN.replace(b", ", b",\n"), b"[" + NAN + b"]")],
    ],
)
def test_batches_lists_and_single_groups(content: bytes, scores: list[float]) -> None:
    found = [(one.origin, one.group.scores.tolist(), one.group.defect) for one in load_groups(content, "FILE")]
    assert str(found) == str([(f"group {i}", [score], None) for i, score in enumerate(scores)])  # NaN is not itself


def test_a_bad_line_of_a_directory_does_not_hide_the_rest(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_bytes(b'{"reason": "why", "group_id": "b", "group": ' + G2 + b"}")
    (tmp_path / "a.jsonl").write_bytes(G1 + b"\n\n{oops\n" + G2 + b"\r\n")
    (tmp_path / "batch_000001.json").write_bytes(b'{"batch":[' + G2 + b"]}")
    for beside in ("meta", "parts"):
        (tmp_path / f"batch_000001.{beside}.json").write_text("{}")
    (tmp_path / "note.txt").write_text("no")
    found = read_path(tmp_path)
    assert [(f.origin, f.recorded_reason, f.group.scores.tolist()) for f in found] == [
        ("a.jsonl line 1", None, [1.0]),
        ("a.jsonl line 3", None, []),
        ("a.jsonl line 4", None, [2.0]),
        ("b.json", "why", [2.0]),
        ("batch_000001.json group 0", None, [2.0]),
    ]
    assert str(found[1].group.defect).startswith("group: not JSON")


def test_a_run_is_journal_and_quarantine(inspect: Inspect, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Batches as the trainer journals them, packed by default; one is cut short. Before and after there is any."""
    (tmp_path / "config.json").write_text('{"model": {"path": null}}')
    inspect(tmp_path, code=2)
    (tmp_path / "metrics.jsonl").touch()
    inspect(tmp_path, code=2)
    first, second = capsys.readouterr().err.splitlines()
    assert "no batch has come yet" in first and "the run refused no group" in second
    journal, quarantine = BatchJournal(tmp_path / "journal", keep=1), QuarantineStore(tmp_path / "quarantine")
    entries = [journal.record(body) for body in (packed(G1, G2), b'{"batch":[' + G2 + b"]}", packed(G2))]
    for entry in entries:
        journal.attach(entry, "ledger.msgpack", b"x")
    refused = quarantine.put(QuarantinedGroup(group=decode_group(NAN), reason="scores[0] = nan: must be finite"))
    journal.record(packed(G1)[:-9])
    groups = [f"batch_00000{name}" for name in ("1.json group 0", "1.json group 1", "2.json group 0", "3.json group 0")]
    found = read_path(tmp_path)
    assert [f.origin for f in found[:4]] == [f"journal/{name}" for name in groups]
    assert [f.group.scores.tolist() for f in found[:4]] == [[1.0], [2.0], [2.0], [2.0]]
    assert [f.origin for f in found[4:]] == ["journal/batch_000004.json", f"quarantine/{refused.name}"]
    assert str(found[4].group.defect).startswith(f"{journal.directory}/batch_000004.json: ")
    assert found[5].recorded_reason == "scores[0] = nan: must be finite"
    assert "groups: 4 used, 2 refused" in inspect(tmp_path)
    journal.change(entries[1], step=1)
    journal.discard_through(1)
    kept = [f.origin for f in read_path(journal.directory)]
    assert kept == [*groups[:2], groups[3], "batch_000004.json", f"kept/{groups[2]}"]


@pytest.mark.parametrize(("name", "section"), [("config.json", "model"), ("config.yaml", "actor_rollout_ref")])
def test_a_run_directory_says_which_model_it_trains(inspect: Inspect, tmp_path: Path, name: str, section: str) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(demo_model_path(), model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "vocab_size": C}))
    (run / "quarantine").mkdir(parents=True)
    about = {"path": str(model), "tokenizer_path": None}
    (run / name).write_text(json.dumps({section: about if section == "model" else {"model": about}}))
    path = run / "quarantine" / "1.json"
    path.write_text(json.dumps(GROUP))
    for source in (run, path):
        assert "refused: tokens[0][2] = 198: outside the vocabulary" in inspect(source)
    assert "groups: 1 used" in inspect(path, "--vocab-size", "261")
    shutil.rmtree(model)
    assert "groups: 1 used" in inspect(run)
