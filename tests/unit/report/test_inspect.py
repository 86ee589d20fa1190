"""``inspect`` on files written by hand and on real servers: text and figures are worked out here, not by the code.

Ids of the demo model's tokenizer: a = 64, b = 65, c = 66, newline = 198, <|im_end|> = 258.
"""

import argparse
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from atropos_verl.assets import demo_model_path
from atropos_verl.errors import ConfigError, DataError
from atropos_verl.protocol.journal import BatchJournal
from atropos_verl.protocol.schema import check_group
from atropos_verl.protocol.wire import decode_group, join_packed, pack_group
from atropos_verl.report import inspect as inspection_command
from atropos_verl.report.inspect import load_groups, read_path
from atropos_verl.training.quarantine import QuarantineStore
from atropos_verl.types import QuarantinedGroup

A, B, C, NEWLINE, END = 64, 65, 66, 198, 258

# Scores 1 and 0: mean 0.5, sample standard deviation 0.70711, so GRPO advantages are ±0.5 / 0.707108 = ±0.70711.
GROUP: dict[str, Any] = {
    "tokens": [[A, B, NEWLINE, C, END], [A, B, NEWLINE, B, A, END]],
    "masks": [[-100, -100, -100, C, END], [-100, -100, -100, B, -100, END]],
    "scores": [1.0, 0.0],
    "inference_logprobs": [[1.0, 1.0, 1.0, -0.25, -0.75], []],
    "generation_params": {"temperature": 0.9, "policy_version": 3},
    "env_id": 2,
}


def inspect(source: object, *words: str, terminal: bool = False, named: bool = True) -> tuple[int, str]:
    """``named``: with the tokenizer of the demo model, unless ``words`` name another."""
    if named and "--tokenizer" not in words:
        words = (*words, "--tokenizer", str(demo_model_path()))
    parser = argparse.ArgumentParser()
    inspection_command.add_arguments(parser)
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="utf-8", write_through=True) as file:
        console = Console(file=file, width=80, force_terminal=terminal, _environ={"TERM": "xterm"})
        return inspection_command.run(parser.parse_args([str(source), *words]), console), raw.getvalue().decode()


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_batch_shows_text_marks_and_figures(tmp_path: Path) -> None:
    path = write(tmp_path / "batch.json", {"batch": [GROUP]})
    code, text = inspect(path, "--policy-version", "5")
    assert code == 0
    group_id = re.search(r"id ([0-9a-f]{16}),", text)
    assert group_id
    assert text == (
        f"group 0: id {group_id[1]}, env_id 2, sequences: 2\n"
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


def test_on_a_terminal_trained_tokens_are_reversed_and_coloured(tmp_path: Path) -> None:
    path = write(tmp_path / "group.json", GROUP)
    _, text = inspect(path, terminal=True)
    assert "    \x1b[7;32mc<|im_end|>\x1b[0m\n" in text  # reverse, green: positive advantage
    assert "    \x1b[7;31mb\x1b[0ma\x1b[7;31m<|im_end|>\x1b[0m\n" in text  # red: negative
    assert "[[" not in text
    # Control characters of a trajectory cannot reach the terminal.
    escape = 215  # byte 0x1b in the demo's byte-level vocabulary
    group = {"tokens": [[A, escape, 58, B]], "masks": [[-100, escape, 58, B]], "scores": [1.0]}
    _, text = inspect(write(tmp_path / "group.json", group))
    assert "    a[[\\x1b[b]]\n" in text


def test_every_refusal_has_its_reason(tmp_path: Path) -> None:
    wrong_mask = {**GROUP, "masks": [[-100, -100, -100, 1, END], GROUP["masks"][1]]}
    image = {**GROUP, "images": ["x.png"]}
    undecodable = {"tokens": "abc"}
    path = write(tmp_path / "batch.json", {"batch": [wrong_mask, image, undecodable, GROUP]})
    code, text = inspect(path, "--limit", "0")
    assert code == 0
    assert "  refused: masks[0][3] = 1: must be -100 (not trained) or the token id 66\n" in text
    assert "  would stop the run: images: the environment with env_id 2 sends this ScoredData field" in text
    assert "  refused: masks: the field is missing\n" in text
    assert "  sequence 0: score 1.000, 2 of 5 tokens marked as trained\n" in text
    assert "groups: 1 used, 3 refused; sequences: 2 trained" in text
    _, ignoring = inspect(path, "--ignore-field", "images", "--estimator", "rloo", "--clipping", "-0.5", "3")
    # RLOO of two: score minus the other's: +1 and -1; clipped to [-0.5, 3].
    assert "advantage 1.000, logprob" in ignoring and "advantage -0.500, temp" in ignoring
    assert "groups: 2 used, 2 refused" in ignoring


def test_overlong_sequences_are_named_and_count_in_the_baseline(tmp_path: Path) -> None:
    _, text = inspect(write(tmp_path / "group.json", GROUP), "--max-token-len", "5")
    assert "    not trained: 6 tokens, more than max_token_len = 5\n" in text
    assert "sequence 0: score 1.000, 2 of 5 tokens trained, advantage 0.707" in text
    assert "sequences: 1 trained, 1 dropped as overlong; trained tokens: 2; mean score: 0.500" in text


def test_a_limit_hides_sound_groups_and_no_refusal(tmp_path: Path) -> None:
    bad = {**GROUP, "scores": [1.0]}
    path = write(tmp_path / "batch.json", {"batch": [GROUP] * 9 + [bad]})
    _, text = inspect(path)
    assert [line for line in text.splitlines() if line.startswith(("group", "..."))] == [
        *(line for line in text.splitlines() if re.match(r"group [0-7]: id", line)),
        "... 2 more groups (--limit 0 shows all)",
        "group 9: refused: scores: 1 entries, but tokens has 2; one per sequence is needed",
        "groups: 9 used, 1 refused; sequences: 18 trained, 0 dropped as overlong; "
        "trained tokens: 36; mean score: 0.500",
    ]


def test_ids_are_shown_where_the_tokenizer_does_not_fit(tmp_path: Path) -> None:
    group = {"tokens": [[5, 70000, 8]], "masks": [[-100, 70000, 8]], "scores": [1.0]}
    path = write(tmp_path / "group.json", group)
    assert "    5[[70000 8]]\n" in inspect(path, named=False)[1]
    # Named, the tokenizer's model says which ids there are: 261.
    code, text = inspect(path, "--tokenizer", str(demo_model_path()))
    assert code == 0
    assert "refused: tokens[0][1] = 70000: outside the vocabulary [0, 261)" in text
    assert "refused: tokens[0][1] = 70000: outside the vocabulary [0, 100)" in inspect(path, "--vocab-size", "100")[1]


def test_quarantine_shows_what_the_run_said_and_what_is_said_now(tmp_path: Path) -> None:
    entry = {"reason": "tokens[0][1] = 65: outside the vocabulary [0, 65)", "group_id": "x", "group": GROUP}
    path = write(tmp_path / "675a2b5fc456cf4c.json", entry)
    code, text = inspect(path)
    assert code == 0
    assert text.startswith("quarantined group: id ")
    assert "  quarantined by the run: tokens[0][1] = 65: outside the vocabulary [0, 65)\n" in text
    assert "  with the settings of this inspection it would be trained on\n" in text


@pytest.mark.parametrize(
    ("words", "code", "fault"),
    [
        (["no-such-file.json"], 2, "no-such-file.json: No such file or directory"),
        (["{dir}"], 2, "holds no .json or .jsonl file"),
        (["{bad}"], 1, "neither JSON nor JSON lines (line 1: group: not JSON"),
        (["{other}"], 1, "neither a batch, a group nor a quarantine file; it begins b'{\"x\": 1}'"),
        (["{good}", "--tokenizer", "{dir}/none.json"], 2, "no tokenizer at"),
        (["{good}", "--tokenizer", "{bad}"], 2, "no tokenizer at"),
        (["{good}", "--limit", "-1"], 2, "--limit: -1 must not be negative"),
        (["{good}", "--clipping", "3", "-3"], 2, "clipping: [3.0, -3.0] is not a range"),
    ],
)
def test_faults_and_exit_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, fault: str
) -> None:
    names = {
        "dir": tmp_path / "empty",
        "bad": write(tmp_path / "bad", "not json"),
        "other": write(tmp_path / "other", {"x": 1}),
        "good": write(tmp_path / "good.json", GROUP),
    }
    names["dir"].mkdir()
    assert inspect(*(word.format(**names) for word in words)) == (code, "")
    error = capsys.readouterr().err
    assert error.startswith("atropos-verl inspect: ")
    assert fault in error


G1 = b'{"tokens": [[5, 6]], "masks": [[-100, 6]], "scores": [1.0]}'
G2 = b'{"tokens": [[7, 8]], "masks": [[-100, 8]], "scores": [2.0]}'
NAN = b'{"tokens": [[7, 8]], "masks": [[-100, 8]], "scores": [NaN]}'


def shown(content: bytes) -> list[tuple[str, list[float], str | None]]:
    return [(f.origin, f.group.scores.tolist(), f.group.defect) for f in load_groups(content, "FILE")]


BOTH = [("group 0", [1.0], None), ("group 1", [2.0], None)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"batch": [' + G1 + b", " + G2 + b"]}", BOTH),
        (b'\n{ "batch":[' + G1 + b"," + G2 + b"]}\n", BOTH),
        (b'{"lease_id": "x", "batch": [' + G1 + b", " + G2 + b"]}", BOTH),
        (b"[" + G1 + b"," + G2 + b"]", BOTH),
        (G1, BOTH[:1]),
        (json.dumps(json.loads(G1), indent=2).encode(), BOTH[:1]),
        (b'{"batch": null}', []),
        *[(body, [("group 0", [math.nan], None)]) for body in (NAN, NAN.replace(b", ", b",\n"), b"[" + NAN + b"]")],
    ],
)
def test_batches_lists_and_single_groups(content: bytes, expected: list[object]) -> None:
    assert str(shown(content)) == str(expected)  # NaN is not itself


def test_lines_keep_their_numbers_and_a_bad_line_does_not_hide_the_rest() -> None:
    found = shown(G1 + b"\n\n{oops\n" + G2 + b"\r\n")
    assert [origin for origin, *_ in found] == ["line 1", "line 3", "line 4"]
    assert [scores for _, scores, _ in found] == [[1.0], [], [2.0]]
    assert str(found[1][2]).startswith("group: not JSON")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b" \n", "FILE is empty"),
        (b'{"batch": 3}', "FILE: the answer to GET /batch is not an object with a list"),
        (b'{"reason": "x"}', "FILE: not a quarantine file"),
    ],
)
def test_other_content_is_refused_by_name(content: bytes, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        load_groups(content, "FILE")


def test_a_directory_is_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_bytes(b'{"reason": "why", "group_id": "b", "group": ' + G2 + b"}")
    (tmp_path / "a.jsonl").write_bytes(G1 + b"\n" + G1)
    (tmp_path / "batch_000001.json").write_bytes(b'{"batch":[' + G2 + b"]}")
    for beside in ("meta", "parts"):
        (tmp_path / f"batch_000001.{beside}.json").write_text("{}")
    (tmp_path / "note.txt").write_text("no")
    found = read_path(tmp_path)
    assert [(f.origin, f.recorded_reason, f.group.scores.tolist()) for f in found] == [
        ("a.jsonl line 1", None, [1.0]),
        ("a.jsonl line 2", None, [1.0]),
        ("b.json", "why", [2.0]),
        ("batch_000001.json group 0", None, [2.0]),
    ]


def packed(*raw: bytes) -> bytes:
    return b"".join(join_packed([pack_group(check_group(group)) for group in raw]))


def test_a_run_directory_is_its_journal_and_what_it_refused(tmp_path: Path) -> None:
    """Batches as the trainer journals them, packed by default; one is cut short. Before and after there is any."""
    journal, quarantine = BatchJournal(tmp_path / "journal", keep=1), QuarantineStore(tmp_path / "quarantine")
    (tmp_path / "metrics.jsonl").touch()
    for store in (journal.directory, quarantine.directory):
        store.mkdir()
    assert inspect(tmp_path) == (2, "")
    entries = [journal.record(body) for body in (packed(G1, G2), b'{"batch":[' + G2 + b"]}", packed(G2))]
    for entry in entries:
        journal.attach(entry, "ledger.msgpack", b"x")
    refused = quarantine.put(QuarantinedGroup(group=decode_group(NAN), reason="scores[0] = nan: must be finite"))
    assert load_groups(packed(G1), "FILE")[0].group.scores.tolist() == [1.0]
    journal.record(packed(G1)[:-9])
    found = read_path(tmp_path)
    assert [(f.origin, f.group.scores.tolist()) for f in found[:4]] == [
        ("journal/batch_000001.json group 0", [1.0]),
        ("journal/batch_000001.json group 1", [2.0]),
        ("journal/batch_000002.json group 0", [2.0]),
        ("journal/batch_000003.json group 0", [2.0]),
    ]
    assert [f.origin for f in found[4:]] == ["journal/batch_000004.json", f"quarantine/{refused.name}"]
    assert str(found[4].group.defect).startswith(f"{journal.directory}/batch_000004.json: ")
    assert found[5].recorded_reason == "scores[0] = nan: must be finite"
    code, text = inspect(tmp_path)
    assert code == 0 and "groups: 4 used, 2 refused" in text
    journal.change(entries[1], step=1)
    journal.discard_through(1)
    kept = ["batch_000001.json group 0", "batch_000001.json group 1", "batch_000003.json group 0", "batch_000004.json"]
    assert [f.origin for f in read_path(journal.directory)] == [*kept, "kept/batch_000002.json group 0"]


@pytest.mark.parametrize("backend", ["local", "ray"])
def test_a_run_directory_says_which_model_it_trains(tmp_path: Path, backend: str) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(demo_model_path(), model)
    settings = json.loads((model / "config.json").read_text())
    write(model / "config.json", {**settings, "vocab_size": C})
    run.mkdir()
    section = {"path": str(model), "tokenizer_path": None}
    content = {"model": section} if backend == "local" else {"actor_rollout_ref": {"model": section}}
    write(run / ("config.json" if backend == "local" else "config.yaml"), content)
    code, text = inspect(run, named=False)
    assert code == 2  # said on standard error
    (run / "quarantine").mkdir()
    path = write(run / "quarantine" / "1.json", GROUP)
    for source in (run, path):
        code, text = inspect(source, named=False)
        assert code == 0 and "refused: tokens[0][2] = 198: outside the vocabulary" in text
    assert "refused" not in inspect(path, "--vocab-size", "261", named=False)[1].partition("groups:")[0]
    shutil.rmtree(model)
    assert "groups: 1 used" in inspect(run, named=False)[1]


def test_a_run_without_a_batch_says_so(tmp_path: Path) -> None:
    write(tmp_path / "config.json", {"model": {"path": None}})
    with pytest.raises(ConfigError, match="no batch has come yet"):
        read_path(tmp_path)
    write(tmp_path / "metrics.jsonl", {"step": 1})
    with pytest.raises(ConfigError, match="the run refused no group"):
        read_path(tmp_path)
