"""``atropos-verl inspect``: shows what the trainer would see in groups: samples, advantages and refusals."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from atropos_verl.config.model_checks import embedded_ids, read_json
from atropos_verl.errors import AtroposAPIError, AtroposProtocolError, ConfigError, DataError, UnsupportedFieldError
from atropos_verl.protocol.wire import MAGIC, decode_batch, decode_group
from atropos_verl.report.format import decimal
from atropos_verl.report.trace_reader import NO_DECODER, Decoder, load_decoder, model_of_run, settings_of_run
from atropos_verl.training.advantages import ESTIMATORS, NORMALIZATIONS
from atropos_verl.training.quarantine import parse_quarantine_file
from atropos_verl.training.samples import build_samples
from atropos_verl.types import NOT_TRAINED, FloatArray, SampleSettings, ScoredGroup, TrainingSample

_SOURCE_HELP = (
    "a run directory (its journal and quarantine), one of these two, a file of them, a saved GET /batch body, JSON "
    "lines of groups (ENV process), or the URL of a trajectory API (shows its latest example)"
)
_DEFAULT_LIMIT = 8
_MOST_REFUSALS = 20
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters by which a trajectory could write to the terminal what is not in it."""
_BESIDE_BATCH = re.compile(r"batch_\d+\.[\w.]+\.json")
"""What a journal keeps beside a batch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="FILE|DIR|URL", help=_SOURCE_HELP)
    add("--timeout", metavar="SECONDS", type=float, default=30.0, help="with a URL (default: %(default)g)")
    add(
        "--tokenizer",
        metavar="PATH",
        help="directory or tokenizer.json (default: the run's, or the demo model's where it fits)",
    )
    add("--estimator", choices=ESTIMATORS, default="grpo", help="group baseline (default: %(default)s)")
    add("--normalization", choices=NORMALIZATIONS, default="none", help="of advantages (default: %(default)s)")
    add("--clipping", nargs=2, metavar=("LOW", "HIGH"), type=float, help="of advantages")
    add("--max-token-len", metavar="N", type=int, help="longest sequence that is trained")
    add("--vocab-size", metavar="N", type=int, help="refuse larger ids (default: that of --tokenizer's model)")
    add("--ignore-field", metavar="NAME", action="append", default=[], help="as data.ignore_fields; may be repeated")
    add("--policy-version", metavar="N", type=int, help="the current one, to show how stale sequences are")
    add("--tokens", action="store_true", help="a table of every token with its advantage and logprob")
    add("--limit", metavar="N", type=int, help=f"groups to show, 0 for all (default: {_DEFAULT_LIMIT}, --json all)")
    add("--json", action="store_true", help="one JSON object on standard output")


def run(options: argparse.Namespace, console: Console | None = None) -> int:
    """Inspects and shows. Returns the exit code: 0; 1 content or API at fault; 2 the command is wrong."""
    screen = _Screen(console or Console())
    try:
        inspection = _inspect(options)
    except (ConfigError, DataError, AtroposAPIError) as error:
        _Screen(Console(stderr=True)).line(f"atropos-verl inspect: {error}")
        return 2 if isinstance(error, ConfigError) else 1
    if options.json:
        screen.line(json.dumps(inspection, indent=2, allow_nan=False))
    else:
        screen.show(inspection)
    return 0


def _inspect(options: argparse.Namespace) -> dict[str, Any]:
    if options.limit is not None and options.limit < 0:
        raise ConfigError(f"{options.limit} must not be negative", "--limit")
    if options.source.startswith(("http://", "https://")):
        found = read_url(options.source, options.timeout, os.environ.get("ATROPOS_API_TOKEN"))
    else:
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
    limit = options.limit if options.limit is not None or options.json else _DEFAULT_LIMIT
    decoder = _demo_decoder(found) if tokenizer is None else load_decoder(tokenizer)
    return _inspect_groups(found, settings, decoder, options.policy_version, limit or len(found), options.tokens)


@dataclass(frozen=True, slots=True)
class FoundGroup:
    """A group and where it was found."""

    group: ScoredGroup
    origin: str
    """For people: ``group 0``, ``line 3``, ``1f2e3d.json``."""
    recorded_reason: str | None = None
    """The run's reason for refusing it, when it comes from a quarantine file."""


def read_path(path: Path) -> list[FoundGroup]:
    """Reads the groups of a file; of a directory, those of its ``*.json`` and ``*.jsonl`` files by name; of a run
    directory, the batches of its journal and what it refused. A damaged file of a directory is a group with a defect.

    Raises ``ConfigError`` for a file that cannot be read, and what ``load_groups`` raises.
    """
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
    environment's ``process`` writes); a quarantine file. ``prefix`` is put before every origin.

    Raises ``DataError`` for any other content. A single bad group in a list is not an error: it has a ``defect``.
    """
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


def read_url(url: str, timeout: float = 30.0, token: str | None = None) -> list[FoundGroup]:
    """Asks a trajectory API for its latest example, for at most ``timeout`` seconds; no groups: it has nothing yet.

    Raises ``AtroposAPIError`` without a usable answer, ``ConfigError`` for a wrong URL.
    """
    from atropos_verl.protocol.client import AtroposClient

    base = url.rstrip("/").removesuffix("/latest_example")
    if base.endswith("/batch"):
        raise ConfigError(
            f"GET {url} takes the batch away from the trainer; if that is meant, save it with curl and inspect the file"
        )
    with AtroposClient(base, timeout=timeout, token=token) as client:
        client.check()
        group = decode_group(client.latest_example())
    return [FoundGroup(group, "latest example")] if group.defect is not None or len(group) else []


def _demo_decoder(found: list[FoundGroup]) -> Decoder:
    from atropos_verl.assets import demo_model_path

    demo = load_decoder(str(demo_model_path()))
    # Byte-level ids of another model would also fit: then the text is nonsense, and --tokenizer is the remedy.
    fits = all(demo.knows(row.tolist()) for item in found for row in item.group.token_ids)
    return demo if fits else NO_DECODER


def _inspect_groups(
    found: Sequence[FoundGroup],
    settings: SampleSettings,
    decoder: Decoder,
    policy_version: int | None,
    detailed: int,
    with_tokens: bool,
) -> dict[str, Any]:
    """Does what the trainer does with one global batch, and keeps what it would throw away. Raises ``ConfigError``.

    The JSON is in docs/internals.md; the first ``detailed`` groups are described with their sequences.
    """
    refusals = [_refusal(item.group, settings) for item in found]
    used = [item.group for item, (reason, _) in zip(found, refusals, strict=True) if reason is None]
    report = build_samples(used, settings)
    samples = iter(report.samples)
    views = []
    for number, (item, (reason, stops_run)) in enumerate(zip(found, refusals, strict=True)):
        group, sequences = item.group, []
        for i, ids in enumerate(group.token_ids):
            excluded, limit = None, settings.max_token_len
            if reason is None and limit is not None and len(ids) > limit:
                excluded = f"{len(ids)} tokens, more than max_token_len = {limit}"
            # Samples come in the order of groups and sequences, those left out missing.
            sample = next(samples) if reason is None and excluded is None else None
            if number < detailed:
                view = _sequence(group, i, sample, policy_version, decoder, with_tokens)
                sequences.append({**view, "excluded": excluded})
        views.append(
            {
                "origin": item.origin,
                "group_id": group.group_id,
                "env_id": group.env_id,
                "refused": reason,
                "stops_run": stops_run,
                "recorded_reason": item.recorded_reason,
                "sequences": sequences if number < detailed else None,
            }
        )
    return {
        "groups": views,
        "sequences": len(report.samples),
        "trained_tokens": sum(int(sample.loss_mask.sum()) for sample in report.samples),
        "rollouts": report.scores.size,
        "mean_score": float(report.scores.mean()) if report.scores.size else None,
        "refused": len(found) - len(used),
        "dropped_overlong": report.dropped_overlong,
    }


def _refusal(group: ScoredGroup, settings: SampleSettings) -> tuple[str | None, bool]:
    """Returns the reason, or None, and whether it stops the run."""
    try:
        report = build_samples([group], settings)
    except UnsupportedFieldError as error:
        return str(error), True
    return (report.quarantined[0].reason if report.quarantined else None), False


def _sequence(
    group: ScoredGroup,
    i: int,
    sample: TrainingSample | None,
    current: int | None,
    decoder: Decoder,
    with_tokens: bool,
) -> dict[str, Any]:
    """Describes a sequence; without a sample as far as it can be shown, since its arrays need not fit each other."""
    ids = group.token_ids[i].tolist()
    score = float(group.scores[i]) if i < len(group.scores) else math.nan
    advantages = logprobs = np.full(len(ids), np.nan)
    trained, version = np.zeros(len(ids), dtype=bool), None
    if sample is not None:
        trained, version = sample.loss_mask, sample.policy_version
        advantages = np.where(trained, sample.advantages, np.nan)
        logprobs = logprobs if sample.rollout_logprobs is None else sample.rollout_logprobs
    elif i < len(group.masks):
        marks = group.masks[i][: len(ids)] != NOT_TRAINED
        trained[1 : len(marks)] = marks[1:]  # nothing predicts the first token
    edges = [*np.flatnonzero(np.diff(trained, prepend=not trained[:1].any())).tolist(), len(ids)]
    pieces = [
        {"text": _text(ids, start, end, decoder), "trained": bool(trained[start])}
        for start, end in itertools.pairwise(edges)
    ]
    tokens = [
        {
            "position": position,
            "id": token,
            "text": decoder.decode([token]) if decoder.knows([token]) else "",
            "trained": bool(trained[position]),
            "advantage": _number(advantages[position]),
            "logprob": _number(logprobs[position]),
        }
        for position, token in enumerate(ids if with_tokens else ())
    ]
    return {
        "index": i,
        "rollout": int(group.rollouts[i]),
        "weight": 1.0 if group.weights is None else float(group.weights[i]),
        "length": len(ids),
        "trained_tokens": int(trained.sum()),
        "score": score if math.isfinite(score) else None,
        "advantage": _spread(advantages[trained]),
        "logprob": _spread(logprobs[trained]),
        "temperature": None if sample is None else sample.temperature,
        "policy_version": version,
        "staleness": None if version is None or current is None else current - version,
        "truncated": sample is not None and sample.truncated,
        "pieces": pieces,
        "tokens": tokens if with_tokens else None,
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _spread(values: FloatArray) -> dict[str, Any] | None:
    values = values[~np.isnan(values)]
    if not values.size:
        return None
    return {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max()), "count": values.size}


def _text(ids: list[int], start: int, end: int, decoder: Decoder) -> str:
    """Decodes ``ids[start:end]`` in its context: many tokenizers decode a leading space only after something."""
    if not decoder.knows(ids[:end]):
        return decoder.text(ids[start:end])
    before = decoder.decode(ids[:start]) if start else ""
    text = decoder.decode(ids[:end])
    return text[len(before) :] if text.startswith(before) else decoder.decode(ids[start:end])


class _Screen:
    """Shows an inspection. On a terminal trained tokens are reversed and coloured, elsewhere in ``[[ ]]``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._marks = not console.is_terminal or console.is_dumb_terminal

    def show(self, inspection: dict[str, Any]) -> None:
        groups = inspection["groups"]
        shown = [group for group in groups if group["sequences"] is not None]
        for group in shown:
            self._group(group)
        if len(shown) < len(groups):
            self.line(f"... {len(groups) - len(shown)} more groups (--limit 0 shows all)")
            refused = [group for group in groups[len(shown) :] if group["refused"] is not None]
            for group in refused[:_MOST_REFUSALS]:
                self.line(f"{group['origin']}: refused: {group['refused']}", "bold red")
        if not groups:
            self.line("no group: the API has nothing yet, or the batch is empty")
            return
        self.line(
            f"groups: {len(groups) - inspection['refused']} used, {inspection['refused']} refused; "
            f"sequences: {inspection['sequences']} trained, {inspection['dropped_overlong']} dropped as overlong; "
            f"trained tokens: {inspection['trained_tokens']}; mean score: {decimal(inspection['mean_score'])}",
            "bold",
        )

    def _group(self, group: dict[str, Any]) -> None:
        env = "" if group["env_id"] is None else f", env_id {group['env_id']}"
        count, rollouts = len(group["sequences"]), len({sequence["rollout"] for sequence in group["sequences"]})
        rows = "" if rollouts == count else f" of {rollouts} rollouts"
        self.line(f"{group['origin']}: id {group['group_id']}{env}, sequences: {count}{rows}", "bold")
        if group["recorded_reason"] is not None:
            self.line(f"  quarantined by the run: {group['recorded_reason']}", "bold red")
        if group["refused"] is not None:
            kind = "would stop the run" if group["stops_run"] else "refused"
            self.line(f"  {kind}: {group['refused']}", "bold red")
        elif group["recorded_reason"] is not None:
            self.line("  with the settings of this inspection it would be trained on")
        for sequence in group["sequences"]:
            self._sequence(sequence)
        self.line("")

    def _sequence(self, view: dict[str, Any]) -> None:
        is_sample = view["temperature"] is not None
        fate = "trained" if is_sample else "marked as trained"
        stale = "" if view["staleness"] is None else f" ({view['staleness']} behind)"
        facts = [
            f"of rollout {view['rollout']}" if view["rollout"] != view["index"] else "",
            f"score {decimal(view['score'])}",
            f"{view['trained_tokens']} of {view['length']} tokens {fate}",
            f"weight {view['weight']:g}" if view["weight"] != 1 else "",
            *(f"{name} {_shown(view[name])}" for name in ("advantage", "logprob") if view[name] is not None),
            f"temperature {view['temperature']:g}" if is_sample else "",
            f"policy version {view['policy_version']}{stale}" if view["policy_version"] is not None else "",
            "truncated" if view["truncated"] else "",
        ]
        self.line(f"  sequence {view['index']}: {', '.join(filter(None, facts))}")
        if view["excluded"] is not None:
            self.line(f"    not trained: {view['excluded']}", "yellow")
        mean = view["advantage"]["mean"] if view["advantage"] is not None else 0
        colour = "green" if mean > 0 else "red" if mean < 0 else "yellow"
        text = Text("    ")
        for piece in view["pieces"]:
            words = self._encodable(piece["text"]).replace("\n", "\n    ")
            if piece["trained"]:
                text.append(f"[[{words}]]" if self._marks else words, style=f"reverse {colour}")
            else:
                text.append(words)
        self._console.print(text, soft_wrap=True)
        if view["tokens"] is None:
            return
        form = "{:>12}  {:>7}  {:16}  {:7}  {:>9}  {:>9}"
        self.line(form.format("position", "id", "text", "trained", "advantage", "logprob"))
        for token in view["tokens"]:
            numbers = ("" if token[name] is None else decimal(token[name], 4) for name in ("advantage", "logprob"))
            trained = "yes" if token["trained"] else ""
            self.line(form.format(token["position"], token["id"], repr(token["text"]), trained, *numbers))

    def line(self, text: str, style: str = "") -> None:
        """Text as it is: no markup, no wrapping."""
        self._console.print(Text(self._encodable(text), style=style), soft_wrap=True)

    def _encodable(self, text: str) -> str:
        """Escapes control characters, and characters that the console cannot show."""
        text = _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)
        return text.encode(self._console.encoding, "backslashreplace").decode(self._console.encoding)


def _shown(spread: dict[str, Any]) -> str:
    if spread["min"] == spread["max"]:
        return decimal(spread["mean"])
    return f"{decimal(spread['mean'])} [{decimal(spread['min'])} .. {decimal(spread['max'])}]"
