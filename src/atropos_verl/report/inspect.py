"""``atropos-verl inspect``: options, and how an inspection is shown. What is found out: ``report.inspection``."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from atropos_verl.errors import AtroposAPIError, ConfigError, DataError
from atropos_verl.report.format import decimal
from atropos_verl.report.inspection import (
    Decoder,
    GroupView,
    Inspection,
    SequenceView,
    Spread,
    TokenView,
    inspect_groups,
    load_decoder,
)
from atropos_verl.report.sources import FoundGroup, is_url, read_path, read_url
from atropos_verl.training.advantages import ESTIMATORS, NORMALIZATIONS
from atropos_verl.types import SampleSettings

__all__ = ["add_arguments", "run"]

_SOURCE_HELP = (
    "a saved GET /batch body (run_dir/journal/*.json), JSON lines of groups (ENV process), a quarantine file or "
    "directory, or the URL of a trajectory API (shows its latest example)"
)
_DEFAULT_LIMIT = 8
_MOST_REFUSALS = 20
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters by which a trajectory could write to the terminal what is not in it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    add = parser.add_argument
    add("source", metavar="FILE|DIR|URL", help=_SOURCE_HELP)
    add("--take-batch", action="store_true", help="with a URL: GET /batch. The trainer will never see that batch")
    add("--save", metavar="FILE", type=Path, help="with a URL: keep the answer in FILE")
    add("--timeout", metavar="SECONDS", type=_positive, default=30.0, help="with a URL (default: %(default)g)")
    add("--tokenizer", metavar="PATH", help="directory or tokenizer.json (default: the demo model's where it fits)")
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
    """Inspect and show. Returns the exit code: 0; 1 content or API at fault; 2 the command is wrong."""
    console = console or Console()
    errors = Console(stderr=True)
    try:
        found = _read(options)
        settings = _settings(options)
        limit = options.limit if options.limit is not None or options.json else _DEFAULT_LIMIT
        inspection = inspect_groups(
            found,
            settings,
            decoder=_decoder(options.tokenizer, found),
            policy_version=options.policy_version,
            detailed=limit or None,
            with_tokens=options.tokens,
        )
    except ConfigError as error:
        _plain(errors, f"atropos-verl inspect: {error}")
        return 2
    except (DataError, AtroposAPIError) as error:
        _plain(errors, f"atropos-verl inspect: {error}")
        return 1
    if options.json:
        _plain(console, json.dumps(inspection.as_dict(), indent=2, allow_nan=False))
    else:
        _Renderer(console).show(inspection)
    return 0


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _read(options: argparse.Namespace) -> list[FoundGroup]:
    if options.limit is not None and options.limit < 0:
        raise ConfigError(f"{options.limit} must not be negative", "--limit")
    if not is_url(options.source):
        for option, given in (("--take-batch", options.take_batch), ("--save", options.save is not None)):
            if given:
                raise ConfigError(f"is for a URL; {options.source} is not one", option)
        return read_path(Path(options.source))
    return read_url(
        options.source,
        take_batch=options.take_batch,
        save=options.save,
        timeout=options.timeout,
        token=os.environ.get("ATROPOS_API_TOKEN"),
    )


def _settings(options: argparse.Namespace) -> SampleSettings:
    vocab_size = options.vocab_size
    if vocab_size is None and options.tokenizer is not None:
        vocab_size = _model_vocab_size(Path(options.tokenizer).expanduser())
    return SampleSettings(
        vocab_size=vocab_size,
        max_token_len=options.max_token_len,
        estimator=options.estimator,
        normalization=options.normalization,
        clipping=None if options.clipping is None else (options.clipping[0], options.clipping[1]),
        ignore_fields=tuple(options.ignore_field),
    )


def _model_vocab_size(directory: Path) -> int | None:
    """Of the model beside a tokenizer: what the trainer checks ids against. None where that is not known."""
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return None
    size = config.get("vocab_size") if isinstance(config, dict) else None
    return size if isinstance(size, int) else None


def _decoder(name: str | None, found: list[FoundGroup]) -> Decoder | None:
    if name is not None:
        return load_decoder(name)
    from atropos_verl.assets import demo_model_path

    try:
        demo = load_decoder(str(demo_model_path()))
    except FileNotFoundError:
        return None
    # Byte-level ids of another model would also fit: then the text is nonsense, and --tokenizer is the remedy.
    rows = [row for item in found for row in item.group.token_ids if row.size]
    return demo if all(row.min() >= 0 and row.max() < demo.vocab_size for row in rows) else None


def _plain(console: Console, text: str) -> None:
    """As it is: no markup, no wrapping, no colours."""
    text = text.encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


class _Renderer:
    """Shows an inspection. On a terminal trained tokens are reversed and coloured, elsewhere in ``[[ ]]``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._marks = not console.is_terminal or console.is_dumb_terminal

    def show(self, inspection: Inspection) -> None:
        groups = inspection.groups
        shown = [group for group in groups if group.sequences is not None]
        for group in shown:
            self._group(group)
        if len(shown) < len(groups):
            self._line(f"... {len(groups) - len(shown)} more groups (--limit 0 shows all)")
            refused = [group for group in groups[len(shown) :] if group.refused is not None]
            for group in refused[:_MOST_REFUSALS]:
                self._line(f"{group.origin}: refused: {group.refused}", "bold red")
            if len(refused) > _MOST_REFUSALS:
                self._line(f"... {len(refused) - _MOST_REFUSALS} more refused groups")
        if not groups:
            self._line("no group: the API has nothing yet, or the batch is empty")
            return
        self._line(
            f"groups: {len(groups) - inspection.refused} used, {inspection.refused} refused; "
            f"sequences: {inspection.sequences} trained, {inspection.dropped_overlong} dropped as overlong; "
            f"trained tokens: {inspection.trained_tokens}; mean score: {decimal(inspection.mean_score)}",
            "bold",
        )

    def _group(self, group: GroupView) -> None:
        env = "" if group.env_id is None else f", env_id {group.env_id}"
        self._line(f"{group.origin}: id {group.group_id}{env}, sequences: {len(group.sequences or ())}", "bold")
        if group.recorded_reason is not None:
            self._line(f"  quarantined by the run: {group.recorded_reason}", "bold red")
        if group.refused is not None:
            kind = "would stop the run" if group.stops_run else "refused"
            self._line(f"  {kind}: {group.refused}", "bold red")
        elif group.recorded_reason is not None:
            self._line("  with the settings of this inspection it would be trained on")
        for sequence in group.sequences or ():
            self._sequence(sequence)
        self._line("")

    def _sequence(self, view: SequenceView) -> None:
        fate = "trained" if view.temperature is not None else "marked as trained"
        facts = [f"score {decimal(view.score)}", f"{view.trained_tokens} of {view.length} tokens {fate}"]
        if view.advantage is not None:
            facts.append(f"advantage {_spread(view.advantage)}")
        if view.logprob is not None:
            facts.append(f"logprob {_spread(view.logprob)}")
        if view.temperature is not None:
            facts.append(f"temperature {view.temperature:g}")
        if view.policy_version is not None:
            stale = "" if view.staleness is None else f" ({view.staleness} behind)"
            facts.append(f"policy version {view.policy_version}{stale}")
        if view.truncated:
            facts.append("truncated")
        self._line(f"  sequence {view.index}: {', '.join(facts)}")
        if view.excluded is not None:
            self._line(f"    not trained: {view.excluded}", "yellow")
        self._console.print(self._marked(view), soft_wrap=True)
        if view.tokens is not None:
            self._tokens(view.tokens)

    def _marked(self, view: SequenceView) -> Text:
        colour = "yellow"
        if view.advantage is not None and view.advantage.mean != 0:
            colour = "green" if view.advantage.mean > 0 else "red"
        text = Text("    ")
        for piece in view.pieces:
            words = _visible(piece.text).replace("\n", "\n    ")
            words = self._encodable(words)
            if piece.trained:
                text.append(f"[[{words}]]" if self._marks else words, style=f"reverse {colour}")
            else:
                text.append(words)
        return text

    def _tokens(self, tokens: list[TokenView]) -> None:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column("    position", justify="right")
        table.add_column("id", justify="right")
        table.add_column("text", no_wrap=True)
        table.add_column("trained")
        table.add_column("advantage", justify="right")
        table.add_column("logprob", justify="right")
        for token in tokens:
            words = Text(self._encodable(_visible(repr(token.text))))
            trained = "yes" if token.trained else ""
            numbers = [decimal(v, 4) if v is not None else "" for v in (token.advantage, token.logprob)]
            table.add_row(str(token.position), str(token.id), words, trained, *numbers)
        self._console.print(table)

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(Text(self._encodable(_visible(text)), style=style), soft_wrap=True)

    def _encodable(self, text: str) -> str:
        return text.encode(self._console.encoding, "backslashreplace").decode(self._console.encoding)


def _spread(spread: Spread) -> str:
    if spread.min == spread.max:
        return decimal(spread.mean)
    return f"{decimal(spread.mean)} [{decimal(spread.min)} .. {decimal(spread.max)}]"


def _visible(text: str) -> str:
    return _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)
