"""``atropos-verl inspect``: shows what the trainer would see in groups: samples, advantages and refusals."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from atropos_verl.config.model_checks import embedded_ids, read_json
from atropos_verl.errors import AtroposProtocolError, ConfigError, DataError, UnsupportedFieldError
from atropos_verl.protocol.wire import MAGIC, decode_batch, decode_group
from atropos_verl.report.console import decimal
from atropos_verl.report.trace_reader import NO_DECODER, Decoder, load_decoder, model_of_run, settings_of_run
from atropos_verl.training.advantages import ESTIMATORS, NORMALIZATIONS
from atropos_verl.training.quarantine import parse_quarantine_file
from atropos_verl.training.samples import build_samples
from atropos_verl.types import NOT_TRAINED, FloatArray, SampleSettings, ScoredGroup, TrainingSample

_SOURCE_HELP = (
    "a run directory (its journal and quarantine), one of these two, a file of them, a saved GET /batch or GET "
    "/latest_example body, or JSON lines of groups (ENV process)"
)
_MOST_REFUSALS = 20
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters by which a trajectory could write to the terminal what is not in it."""
_BESIDE_BATCH = re.compile(r"batch_\d+\.[\w.]+\.json")
"""What a journal keeps beside a batch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="FILE|DIR", help=_SOURCE_HELP)
    add("--tokenizer", metavar="PATH", help="directory or tokenizer.json (default: the run's; without one: ids)")
    add("--estimator", choices=ESTIMATORS, default="grpo", help="group baseline (default: %(default)s)")
    add("--normalization", choices=NORMALIZATIONS, default="none", help="of advantages (default: %(default)s)")
    add("--clipping", nargs=2, metavar=("LOW", "HIGH"), type=float, help="of advantages")
    add("--max-token-len", metavar="N", type=int, help="longest sequence that is trained")
    add("--vocab-size", metavar="N", type=int, help="refuse larger ids (default: that of --tokenizer's model)")
    add("--ignore-field", metavar="NAME", action="append", default=[], help="as data.ignore_fields; may be repeated")
    add("--policy-version", metavar="N", type=int, help="the current one, to show how stale sequences are")
    add("--limit", metavar="N", type=int, default=8, help="groups to show, 0 for all (default: %(default)s)")


def run(options: argparse.Namespace, console: Console | None = None) -> int:
    """Inspects and shows. Returns the exit code: 0; 1 the content is at fault; 2 the command is wrong."""
    logging.basicConfig(level=logging.ERROR)  # what the pipeline logs about the groups is shown in place, once
    try:
        _inspect(options, console or Console())
    except (ConfigError, DataError) as error:
        _line(Console(stderr=True), f"atropos-verl inspect: {error}")
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _inspect(options: argparse.Namespace, console: Console) -> None:
    if options.limit < 0:
        raise ConfigError(f"{options.limit} must not be negative", "--limit")
    found = read_path(Path(options.source))
    tokenizer, model = options.tokenizer, options.tokenizer
    if tokenizer is None and (of_run := model_of_run(Path(options.source))) is not None:
        tokenizer, model = of_run
    vocab_size = options.vocab_size
    if vocab_size is None and model is not None:
        vocab_size = embedded_ids(read_json(Path(model).expanduser() / "config.json")[0])
    settings = SampleSettings(
        vocab_size=vocab_size,
        max_token_len=options.max_token_len,
        estimator=options.estimator,
        normalization=options.normalization,
        clipping=options.clipping and tuple(options.clipping),
        ignore_fields=tuple(options.ignore_field),
    )
    decoder = NO_DECODER if tokenizer is None else load_decoder(tokenizer)
    _show(console, found, settings, decoder, options.policy_version, options.limit or len(found))


@dataclass(frozen=True, slots=True)
class FoundGroup:
    """A group and where it was found."""

    group: ScoredGroup
    origin: str  # for people: ``group 0``, ``line 3``, ``1f2e3d.json``
    recorded_reason: str | None = None  # the run's for refusing it, in a quarantine file


def read_path(path: Path) -> list[FoundGroup]:
    """Reads the groups of a file; of a directory, those of its ``*.json`` and ``*.jsonl`` files by name; of a run
    directory, the batches of its journal and what it refused. A damaged file of a directory is a group with a defect.
    Raises ``ConfigError`` for a file that cannot be read, and what ``load_groups`` raises."""
    try:
        if not path.is_dir():
            return load_groups(path.read_bytes(), str(path))
        of_run = [path / name for name in ("journal", "quarantine") if (path / name).is_dir()]
        if (path / "kept").is_dir():  # a journal
            of_run = [path]
        there = [file for place in of_run for file in sorted(place.rglob("*"))] if of_run else sorted(path.iterdir())
        files = [file for file in there if file.suffix in (".json", ".jsonl") and not _BESIDE_BATCH.match(file.name)]
        is_run = bool(of_run) or settings_of_run(path) is not None
        if not files or (is_run and not of_run):
            why = "no batch has come yet"
            if (path / "metrics.jsonl").exists() or of_run == [path]:
                why = "the run refused no group; of batches that a checkpoint covers it keeps what journal.keep says"
            raise ConfigError(f"{path}: {why if is_run else 'the directory holds no .json or .jsonl file'}")
        return [found for file in files for found in _of_directory(file, str(file.relative_to(path)))]
    except OSError as error:
        raise ConfigError(f"{error.filename or path}: {error.strerror or error}") from error


def _of_directory(file: Path, name: str) -> list[FoundGroup]:
    try:
        return load_groups(file.read_bytes(), str(file), prefix=name)
    except DataError as error:  # one damaged file does not hide the others
        damaged = ScoredGroup(token_ids=(), masks=(), scores=np.zeros(0), group_id=file.stem, defect=str(error))
        return [FoundGroup(damaged, name)]


def load_groups(content: bytes, name: str, prefix: str = "") -> list[FoundGroup]:
    """Reads a body of ``GET /batch``, JSON or packed; a ``ScoredData`` object, a list of them, or one per line (what an
    environment's ``process`` writes); a quarantine file. ``prefix`` is put before every origin. Raises ``DataError``
    for any other content. A single bad group in a list is not an error: it has a ``defect``."""
    if not content.strip():
        raise DataError(f"{name} is empty")
    try:
        if content.startswith(MAGIC):
            return _batch(content, prefix)
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            return _lines(content, prefix)
        match value:
            case {"batch": _}:
                return _batch(content, prefix)
            case list():
                return _batch(b'{"batch":' + content + b"}", prefix)
            case {"tokens": _} | {"masks": _} | {"scores": _}:
                return [FoundGroup(decode_group(content.strip()), prefix or "group 0")]
            case {"reason": _}:
                reason, raw = parse_quarantine_file(content)
                return [FoundGroup(decode_group(raw), prefix or "quarantined group", reason)]
    except AtroposProtocolError as error:
        raise DataError(f"{name}: {error.reason}") from error
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    raise DataError(f"{name}: neither a batch, a group nor a quarantine file; it begins {content[:80]!r}")


def _batch(body: bytes, prefix: str = "") -> list[FoundGroup]:
    return [FoundGroup(group, f"{prefix} group {i}".strip()) for i, group in enumerate(decode_batch(body))]


def _lines(content: bytes, prefix: str) -> list[FoundGroup]:
    lines = [(number, line.strip()) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    found = [FoundGroup(decode_group(line), f"{prefix} line {number}".strip()) for number, line in lines]
    if all(item.group.defect is not None for item in found) and b'"tokens"' not in content:
        raise DataError(f"neither JSON nor JSON lines ({found[0].origin}: {found[0].group.defect})")
    return found


def _show(
    console: Console,
    found: Sequence[FoundGroup],
    settings: SampleSettings,
    decoder: Decoder,
    policy_version: int | None,
    detailed: int,
) -> None:
    """Does what the trainer does with one global batch, and shows the first ``detailed`` groups with their sequences,
    trained tokens in ``[[ ]]`` (on a terminal reversed and coloured). Raises ``ConfigError``."""
    if not found:
        _line(console, "no group: the API has nothing yet, or the batch is empty")
        return
    refusals = [_refusal(item.group, settings) for item in found]
    report = build_samples([item.group for item, refusal in zip(found, refusals, strict=True) if not refusal], settings)
    samples, limit = iter(report.samples), settings.max_token_len
    for number, (item, refusal) in enumerate(zip(found, refusals, strict=True)):
        # Samples come in the order of groups and sequences, those left out missing.
        is_kept = [not refusal and (limit is None or len(ids) <= limit) for ids in item.group.token_ids]
        own = [next(samples) if kept else None for kept in is_kept]
        if number < detailed:
            _show_group(console, item, refusal)
            for i, sample in enumerate(own):
                excluded = f"more than max_token_len = {limit}" if sample is None and not refusal else ""
                _show_sequence(console, item.group, i, sample, excluded, policy_version, decoder)
            _line(console, "")
    if len(found) > detailed:
        _line(console, f"... {len(found) - detailed} more groups (--limit 0 shows all)")
        hidden = zip(found[detailed:], refusals[detailed:], strict=True)
        for origin, refusal in [(item.origin, refusal) for item, refusal in hidden if refusal][:_MOST_REFUSALS]:
            _line(console, f"{origin}: {refusal}", "bold red")
    refused = sum(map(bool, refusals))
    mean = float(np.mean([score for _, score in report.scores])) if report.scores else None
    _line(
        console,
        f"groups: {len(found) - refused} used, {refused} refused; sequences: {len(report.samples)} trained, "
        f"{report.dropped_overlong} dropped as overlong; "
        f"trained tokens: {sum(int(s.loss_mask.sum()) for s in report.samples)}; mean score: {decimal(mean)}",
        "bold",
    )


def _refusal(group: ScoredGroup, settings: SampleSettings) -> str:
    """Why the group is not trained on; "": it is."""
    try:
        report = build_samples([group], settings)
    except UnsupportedFieldError as error:
        return f"would stop the run: {error}"
    return f"refused: {report.quarantined[0].reason}" if report.quarantined else ""


def _show_group(console: Console, item: FoundGroup, refusal: str) -> None:
    group = item.group
    env = "" if group.env_id is None else f", env_id {group.env_id}"
    rollouts = len(set(group.rollouts.tolist()))
    rows = "" if rollouts == len(group) else f" of {rollouts} rollouts"
    _line(console, f"{item.origin}: id {group.group_id}{env}, sequences: {len(group)}{rows}", "bold")
    if item.recorded_reason is not None:
        _line(console, f"  quarantined by the run: {item.recorded_reason}", "bold red")
    if refusal:
        _line(console, f"  {refusal}", "bold red")
    elif item.recorded_reason is not None:
        _line(console, "  with the settings of this inspection it would be trained on")


def _show_sequence(
    console: Console,
    group: ScoredGroup,
    i: int,
    sample: TrainingSample | None,
    excluded: str,
    current: int | None,
    decoder: Decoder,
) -> None:
    """Without a sample as far as it can be shown, since the arrays of a group that is refused need not fit."""
    ids = group.token_ids[i].tolist()
    trained = np.zeros(len(ids), dtype=bool)
    if sample is not None:
        trained = sample.loss_mask
    elif i < len(group.masks):
        marks = group.masks[i][: len(ids)] != NOT_TRAINED
        trained[1 : len(marks)] = marks[1:]  # nothing predicts the first token
    score = float(group.scores[i]) if i < len(group.scores) and math.isfinite(group.scores[i]) else None
    fate = "marked as trained" if sample is None else "trained"
    facts = [f"score {decimal(score)}", f"{trained.sum()} of {len(ids)} tokens {fate}"]
    if group.rollouts[i] != i:
        facts.insert(0, f"of rollout {group.rollouts[i]}")
    if group.weights is not None and group.weights[i] != 1:
        facts.append(f"weight {group.weights[i]:g}")
    mean = 0.0
    if sample is not None:
        mean = float(sample.advantages[trained].mean()) if trained.any() else 0.0
        for name, values in (("advantage", sample.advantages), ("logprob", sample.rollout_logprobs)):
            if values is not None and (spread := _spread(values[trained])):
                facts.append(f"{name} {spread}")
        facts.append(f"temperature {sample.temperature:g}")
        if (version := sample.policy_version) is not None:
            facts.append(f"policy version {version}" + ("" if current is None else f" ({current - version} behind)"))
    _line(console, f"  sequence {i}: {', '.join(facts)}")
    if excluded:
        _line(console, f"    not trained: {len(ids)} tokens, {excluded}", "yellow")
    marks_text = not console.is_terminal or console.is_dumb_terminal
    style = f"reverse {'green' if mean > 0 else 'red' if mean < 0 else 'yellow'}"
    text = Text("    ")
    edges = [*np.flatnonzero(np.diff(trained, prepend=not trained[:1].any())).tolist(), len(ids)]
    for start, end in itertools.pairwise(edges):
        words = _encodable(console, _text(ids, start, end, decoder)).replace("\n", "\n    ")
        if trained[start]:
            text.append(f"[[{words}]]" if marks_text else words, style=style)
        else:
            text.append(words)
    console.print(text, soft_wrap=True)


def _spread(values: FloatArray) -> str:
    values = values[~np.isnan(values)]
    if not values.size:
        return ""
    low, high = values.min(), values.max()
    return decimal(values.mean()) + ("" if low == high else f" [{decimal(low)} .. {decimal(high)}]")


def _text(ids: list[int], start: int, end: int, decoder: Decoder) -> str:
    """Decodes ``ids[start:end]`` in its context: many tokenizers decode a leading space only after something."""
    if not decoder.knows(ids[:end]):
        return decoder.text(ids[start:end])
    before = decoder.decode(ids[:start]) if start else ""
    text = decoder.decode(ids[:end])
    return text[len(before) :] if text.startswith(before) else decoder.decode(ids[start:end])


def _line(console: Console, text: str, style: str = "") -> None:
    """Text as it is: no markup, no wrapping."""
    console.print(Text(_encodable(console, text), style=style), soft_wrap=True)


def _encodable(console: Console, text: str) -> str:
    """Escapes control characters, and characters that the console cannot show."""
    text = _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)
    return text.encode(console.encoding, "backslashreplace").decode(console.encoding)
