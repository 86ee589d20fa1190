"""``TraceReader``: the one reader of a run directory, for ``report``, ``inspect`` and the page of ``view``.

Everything it returns is made of dicts, lists, strings and numbers that JSON holds. It changes nothing in the directory,
and may read while the run writes.
"""

import bisect
import contextlib
import itertools
import json
import logging
import math
import re
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from atropos_verl.config.model_checks import read_json
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.training.step import parse_step
from atropos_verl.training.trace import BITS, NAME, TRAINED, UNMATCHED, VERSION, GroupData
from atropos_verl.types import UNKNOWN_VERSION, FloatArray

logger = logging.getLogger(__name__)

_MOST_ROWS = 1000
_IN_GROUP = (1 << BITS) - 1
_EXCERPT = 200
_ROLLOUTS = f"SELECT *, id >> {BITS} AS 'group', id & {_IN_GROUP} AS position FROM sequences WHERE"
_LATENCIES = "SELECT sequence, max(begun + seconds) - min(begun) AS latency, max(session) AS session FROM requests"
_HEADER = re.compile(
    r"<\|im_start\|>(\w+)\n?|<\|start_header_id\|>(\w+)<\|end_header_id\|>\s*|<start_of_turn>(\w+)\n?"
    r"|<\|(system|user|assistant|tool|observation)\|>\n?|<\uff5c(User|Assistant)\uff5c>|\[(INST)\]|\[(/INST)\]"
)
"""Headers of turns in the templates of common models."""
_ROLES = {"inst": "user", "/inst": "assistant", "model": "assistant"}
_SURVIVAL_BINS = 20
_LIVE_SECONDS = 10.0  # a launcher writes its state five times a second
_VERSIONS_UNDER_WAY = 8
"""A request of older weights than these, before the newest that were trained on, will not come any more."""
_TRACKED_EVERY = 10
_TRACKED = 4
_TRACKED_COLUMNS = ("step", "id", "environment", "reward", "tokens", "prompt", "answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutFilter:
    """What rollouts are asked for; None: any. Bounds are inclusive."""

    step: int | None = None
    environment: int | None = None
    state: str | None = None
    reason: str | None = None  # a part of it
    reward_min: float | None = None
    reward_max: float | None = None
    length_min: int | None = None  # in tokens, prompt included
    length_max: int | None = None
    version: int | None = None  # between the oldest and the newest of its trained tokens
    text: str | None = None  # a part of it, in capitals or not
    session: str | None = None

    def where(self) -> tuple[str, list[Any]]:
        """The condition on ``sequences`` in SQL, and its values; without ``text``."""
        conditions = {
            "step = ?": self.step,
            "environment = ?": self.environment,
            "state = ?": self.state,
            "instr(lower(reason), lower(?))": self.reason,
            "reward >= ?": self.reward_min,
            "reward <= ?": self.reward_max,
            "tokens >= ?": self.length_min,
            "tokens <= ?": self.length_max,
            "first_version <= ?": self.version,
            "last_version >= ?": self.version,
            "id IN (SELECT sequence FROM requests WHERE session = ?)": self.session,
        }
        given = {condition: value for condition, value in conditions.items() if value is not None}
        return " AND ".join(given) or "1", list(given.values())


class TraceReader:
    """One run. Methods may be called from any thread. A run without an index (of an older version, or one that has
    fetched nothing yet) has no rollouts. Raises ``ConfigError`` when ``run_dir`` is no directory."""

    def __init__(self, run_dir: Path) -> None:
        if not run_dir.is_dir():
            raise ConfigError(f"{run_dir} is no directory")
        self.run_dir = run_dir
        self._local = threading.local()
        self._searched = 0
        self._texts: dict[int, str] = {}
        """Of sequences of the file with that number that a search has seen, in small letters."""

    @property
    def has_index(self) -> bool:
        return (self.run_dir / NAME).exists()

    def _read(self, sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        if not self.has_index:
            return []
        path = self.run_dir / NAME
        try:
            status = path.stat()
            # Without that file nobody writes, and the directory may be one where this process cannot write either.
            is_over = not path.with_name(f"{NAME}-wal").exists()
            identity = status.st_ino, status.st_mtime_ns if is_over else None
            if getattr(self._local, "identity", None) != identity:  # a new run may have begun in this directory
                how = "mode=ro&immutable=1" if is_over else "mode=ro"
                self._local.db = sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True)
                self._local.db.row_factory = sqlite3.Row
                if (version := self._local.db.execute("PRAGMA user_version").fetchone()[0]) != VERSION:
                    raise sqlite3.DatabaseError(f"it is of version {version}, this program reads {VERSION}")
                self._local.identity = identity
                if status.st_ino != self._searched:
                    self._searched, self._texts = status.st_ino, {}
            return [dict(row) for row in self._local.db.execute(sql, values)]
        except OverflowError:  # no row has such a number
            return []
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error

    def rollouts(
        self, wanted: RolloutFilter | None = None, limit: int = 100, before: int | None = None
    ) -> list[dict[str, Any]]:
        """Sequences, the newest first; ``before``: the ``id`` of the last one that was read. Each has the columns of
        ``sequences``, ``group`` (an id for ``group``), ``position`` in it, ``latency`` (seconds from its first request
        to its last answer), ``session`` and ``excerpt``, the end of its text. ``arrived`` is in seconds since the
        epoch, ``weight`` the rollouts that it stands for, since others were removed; None: unknown."""
        wanted, limit = wanted or RolloutFilter(), min(limit, _MOST_ROWS)
        condition, values = wanted.where()
        if before is not None:
            condition, values = f"({condition}) AND id < ?", [*values, before]
        if wanted.text:
            ids = f"SELECT id FROM sequences WHERE {condition} ORDER BY id DESC"
            rows = self._read(f"SELECT json_group_array(id) AS ids FROM ({ids})", values)
            found = self._saying(wanted.text.lower(), json.loads(rows[0]["ids"]) if rows else ())
            condition = "id IN (SELECT value FROM json_each(?))"
            values = [json.dumps(list(itertools.islice(found, limit)))]
        return self._rows(f"{condition} ORDER BY id DESC LIMIT ?", [*values, limit])

    def _rows(self, condition: str, values: Sequence[Any]) -> list[dict[str, Any]]:
        rows = self._read(f"{_ROLLOUTS} {condition}", values)
        ids = json.dumps([row["id"] for row in rows])
        asked = self._read(f"{_LATENCIES} WHERE sequence IN (SELECT value FROM json_each(?)) GROUP BY 1", [ids])
        requests = {one.pop("sequence"): one for one in asked}
        groups = {group: self._group_data(group) for group in {row["group"] for row in rows}}
        for row in rows:
            row |= requests.get(row["id"], {"latency": None, "session": None})
            data = groups[row["group"]]
            row["excerpt"] = data and self.decoder.text(_ids(data, row["position"])[-_EXCERPT:])[-_EXCERPT:]
        return rows

    def _group_data(self, group: int) -> GroupData | None:
        found = self._read("SELECT data FROM data WHERE id = ?", [group])
        return msgspec.msgpack.decode(found[0]["data"], type=GroupData) if found else None

    def _saying(self, text: str, sequences: Iterable[int]) -> Iterator[int]:
        """Those whose text holds ``text``. Looks at no more of them than is asked for."""
        for id_ in sequences:
            if id_ not in self._texts and (data := self._group_data(id_ >> BITS)) is not None:
                for i in range(len(data.sizes)):
                    ids = _ids(data, i)
                    # Token by token is ten times as fast; where characters have several tokens it is not their text.
                    found = "".join(map(self._token, ids))
                    found = self.decoder.text(ids) if "\ufffd" in found else found
                    self._texts[id_ & ~_IN_GROUP | i] = found.lower()
            if text in self._texts.get(id_, ""):
                yield id_

    def group(self, id_: int) -> dict[str, Any]:
        """The columns of one of ``groups`` (``hash``: name of its file in ``quarantine/``), and ``sequences`` as
        ``rollouts`` lists them. Raises ``KeyError``: there is none, or ``trace.bytes`` was full; ``sequence`` too."""
        found = self._read("SELECT * FROM groups WHERE id = ?", [id_])
        if not found:
            raise KeyError(id_)
        rows = self._rows("id >= ? AND id < ? ORDER BY id", [id_ << BITS, id_ + 1 << BITS])
        return {**found[0], "sequences": rows}

    def sequence(self, id_: int) -> dict[str, Any]:
        """One sequence: what ``rollouts`` says of it, and

        - ``turns``: ``role``, ``text`` without its header, ``start``, ``stop`` (tokens, header included), ``trained``;
        - ``items``, one of each token: ``mismatch`` is the trainer's logprob before the update less ``logprob``.
        """
        rows = self._rows("id = ?", [id_])
        if not rows:
            raise KeyError(id_)
        if (data := self._group_data(rows[0]["group"])) is None:
            return {**rows[0], "turns": None, "items": None}
        items = _items(data, rows[0]["position"], self.decoder)
        return {**rows[0], "turns": _turns(items, self.decoder), "items": items}

    def counts(self) -> dict[str, dict[str, int]]:
        """``groups`` and ``sequences`` by state, removed ones included."""
        rows = self._read(
            "SELECT state, sum(g) AS groups, sum(s) AS sequences FROM ("
            "SELECT state, count(*) AS g, 0 AS s FROM groups GROUP BY 1 UNION ALL "
            "SELECT state, 0, count(*) FROM sequences GROUP BY 1 UNION ALL "
            "SELECT state, 0, size FROM groups AS g WHERE state = 'under_way' "
            f"AND NOT EXISTS (SELECT 1 FROM sequences AS s WHERE s.id = g.id << {BITS}) UNION ALL "
            "SELECT state, groups, sequences FROM thinned) GROUP BY 1"
        )
        return {kind: {row["state"]: row[kind] for row in rows if row[kind]} for kind in ("groups", "sequences")}

    def survivors(self) -> dict[str, Any]:
        """Rollouts that were begun against those that were trained on. A rollout is a sequence that came, or what no
        group brought: a request, or all those of a session. ``ends``: how many by state; ``begun`` and ``trained``
        leave out those under way. ``by`` length (generated tokens), latency (seconds) and reward: ``edges`` of bins,
        ``begun`` and ``trained`` in each, their means, and Kolmogorov-Smirnov ``distance``; by environment: both
        counts, and the largest difference of a share."""
        posted = self._read(
            "SELECT environment, state, reward, tokens - prompt_tokens AS length, latency, weight FROM sequences "
            f"LEFT JOIN ({_LATENCIES} GROUP BY 1) AS asked ON asked.sequence = id"
        )
        rollouts = [*posted, *self._not_posted()]
        begun = [one for one in rollouts if one["state"] != "under_way"]
        trained = [one for one in begun if one["state"] == "trained"]
        by: dict[str, Any] = {name: _compared(begun, trained, name) for name in ("length", "latency", "reward")}
        shares = [_weighed(group, "environment") for group in (begun, trained)]
        names = sorted(set(shares[0]) - {"none"})
        totals = [sum(group.get(name, 0) for name in names) or 1 for group in shares]
        gaps = [abs(shares[0][name] / totals[0] - shares[1].get(name, 0) / totals[1]) for name in names]
        largest = max(gaps) if trained and gaps else None
        by["environment"] = {"begun": shares[0], "trained": shares[1], "distance": largest}
        ends = _weighed(rollouts, "state")
        return {
            "begun": sum(ends.values()) - ends.get("under_way", 0),
            "trained": ends.get("trained", 0),
            "ends": ends,
            "by": by,
        }

    def _not_posted(self) -> Iterator[dict[str, Any]]:
        newest = self._read("SELECT max(last_version) AS version FROM sequences WHERE state = 'trained'")
        oldest = (newest[0]["version"] or 0) - _VERSIONS_UNDER_WAY if newest else 0
        is_over = (self.run_dir / "summary.json").exists()
        rows = self._read(
            "WITH known AS (SELECT p.prompt, max(q.environment) AS environment FROM requests AS p "
            "JOIN sequences AS q ON q.id = p.sequence GROUP BY p.prompt) "
            "SELECT coalesce(r.session, r.id) AS unit, max(r.weight) AS weight, sum(r.tokens) AS length, "
            "max(r.begun + r.seconds) - min(r.begun) AS latency, max(r.version) AS version, max(r.reason) AS reason, "
            "max(s.state) AS session, max(r.session) AS name, max(known.environment) AS environment "
            "FROM requests AS r LEFT JOIN sessions AS s ON s.id = r.session "
            "LEFT JOIN known ON known.prompt = r.prompt WHERE r.sequence IS NULL "
            "AND (r.session IS NULL OR r.session NOT IN "
            "(SELECT session FROM requests WHERE sequence IS NOT NULL AND session IS NOT NULL)) "
            "GROUP BY unit"
        )
        for row in rows:
            may_come = not is_over and (row["version"] is None or row["version"] >= oldest)
            state = "under_way" if may_come else "given_up"
            if row["name"] is not None:
                state = {"aborted": "given_up", "expired": "expired"}.get(row["session"] or "", state)
            elif row["reason"] is not None:
                state = "failed"
            yield {**row, "state": state, "reward": None}

    def session(self, id_: str) -> dict[str, Any]:
        """A session as the gateway's ``GET /sessions/ID`` describes it, and the ``sequences`` that came of it. Raises
        ``KeyError`` and ``ConfigError``."""
        from atropos_verl.gateway.sessions import stored_session

        directory = self.run_dir / "gateway"
        found = stored_session(directory, id_) if (directory / "sessions.sqlite").exists() else None
        if found is None:
            raise KeyError(id_)
        return {**found, "sequences": self.rollouts(RolloutFilter(session=id_), _MOST_ROWS)}

    @cached_property
    def decoder(self) -> "Decoder":
        """Of the run's tokenizer; one that knows no token where that is not here any more."""
        found = model_of_run(self.run_dir)
        with contextlib.suppress(ConfigError):
            return NO_DECODER if found is None else load_decoder(found[0])
        return NO_DECODER

    @cached_property
    def _token(self) -> Callable[[int], str]:
        return cache(self.decoder.token)

    def live(self) -> dict[str, Any]:
        """``state.json`` of the launcher as ``state`` (None: there is none), its ``age`` in seconds, whether the launch
        ``ended`` in order, and whether it is ``running``."""
        state, problem = read_json(self.run_dir / "state.json")
        if problem:
            return {"state": None, "age": None, "ended": False, "running": False}
        for name in ("api_url", "gateway_url"):  # a password may stand in it, and a view on this machine asks for none
            if isinstance(url := state.get(name), str):
                state[name] = re.sub(r"//[^/]*@", "//", url)
        age = max(0.0, time.time() - float(state.get("time", 0.0)))
        ended = all(one.get("state") in ("ended", "stopped", "failed") for one in state.get("services", []))
        return {"state": state, "age": age, "ended": ended, "running": age <= _LIVE_SECONDS and not ended}


def read_steps(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, without the last one where it is cut short. Raises ``OSError``, and
    ``ConfigError``, with file and line, for one that is no step."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if (value := parse_step(line)) is not None:
            yield value
        elif number < len(lines):  # the last one is being written, or the machine stopped in the middle of it
            raise ConfigError(f"{path}:{number} is no step: {line[:80]!r}")


def _weighed(rollouts: Iterable[Mapping[str, Any]], column: str) -> dict[str, int]:
    """How many there are of each value, as text."""
    found: dict[str, int] = defaultdict(int)
    for one in rollouts:
        found["none" if one[column] is None else str(one[column])] += one["weight"]
    return dict(found)


def _compared(begun: Iterable[Mapping[str, Any]], trained: Iterable[Mapping[str, Any]], name: str) -> dict[str, Any]:
    columns = [
        np.array([(one[name], one["weight"]) for one in group if one[name] is not None], float).reshape(-1, 2).T
        for group in (begun, trained)
    ]
    is_known = [values.size > 0 for values, _ in columns]
    edges = np.histogram_bin_edges(columns[0][0], _SURVIVAL_BINS) if is_known[0] else np.zeros(0)
    counts = [np.histogram(v, edges, weights=w)[0].tolist() if edges.size else [] for v, w in columns]
    means = [float(np.average(v, weights=w)) if v.size else None for v, w in columns]
    return {
        "edges": edges.tolist(),
        "begun": counts[0],
        "trained": counts[1],
        "begun_mean": means[0],
        "trained_mean": means[1],
        "distance": distance(columns[0][0], columns[1][0], columns[0][1], columns[1][1]) if is_known[1] else None,
    }


def distance(a: FloatArray, b: FloatArray, a_weights: FloatArray, b_weights: FloatArray) -> float:
    """The Kolmogorov-Smirnov distance of two samples, [N] and [M] (at least one each), with weights of their values."""
    points = np.unique(np.concatenate([a, b]))
    found = []
    for values, weights in ((a, a_weights), (b, b_weights)):
        order = np.argsort(values)
        sums = np.concatenate([[0.0], np.cumsum(weights[order])])
        found.append(sums[np.searchsorted(values[order], points, side="right")] / sums[-1])
    return float(np.abs(found[0] - found[1]).max())


@dataclass(frozen=True, slots=True)
class Decoder:
    """Token ids → text, special tokens shown."""

    tokenizer: Any
    """Of the tokenizers package; None: it knows no token."""
    size: int = 0
    """Of its vocabulary. Asking for it copies the vocabulary, so it is asked once."""

    def knows(self, ids: Sequence[int]) -> bool:
        return not ids or 0 <= min(ids) <= max(ids) < self.size

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False)) if ids else ""

    def token(self, id_: int) -> str:
        """One token alone; the space that decoders leave out at the start of a text is kept."""
        if not self.knows([id_]):
            return ""
        text, piece = self.decode([id_]), self.tokenizer.id_to_token(id_) or ""
        return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text

    def text(self, ids: Sequence[int]) -> str:
        """The ids themselves, where they are of another vocabulary."""
        return self.decode(ids) if self.knows(ids) else " ".join(map(str, ids))


NO_DECODER = Decoder(None)


def load_decoder(name: str) -> Decoder:
    """Loads a directory or ``tokenizer.json``, or a name that transformers can find. Raises ``ConfigError``."""
    path = Path(name).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.is_file():  # read without transformers, whose import takes seconds
            from tokenizers import Tokenizer  # type: ignore[import-untyped]

            tokenizer = Tokenizer.from_file(str(file))
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(name).backend_tokenizer
        return Decoder(tokenizer, tokenizer.get_vocab_size())
    except Exception as error:  # the tokenizers package raises a bare one for a file that it cannot read
        why = str(error).partition("\n")[0]
        raise ConfigError(f"no tokenizer at {name}: {why}", "--tokenizer") from error


def model_of_run(path: Path) -> tuple[str, Path] | None:
    """Directories of the tokenizer and the model of the run that ``path`` is, or is in; None: of none that is known."""
    settings = next(filter(None, map(settings_of_run, (path, *path.absolute().parents[:3]))), None)
    if settings is not None:
        with contextlib.suppress(ConfigError):  # the model is not here any more
            model = RunConfig.from_mapping({"model": settings}).resolve_model_path()
            return str(settings["tokenizer_path"] or model), model
    return None


def settings_of_run(directory: Path) -> dict[str, Any] | None:
    """``path`` and ``tokenizer_path`` of the run's model; None: ``directory`` is no run directory."""
    import yaml

    try:
        if (file := directory / "config.json").is_file():
            settings = json.loads(file.read_bytes())["model"]
        else:
            settings = yaml.safe_load((directory / "config.yaml").read_bytes())["actor_rollout_ref"]["model"]
        return {name: settings.get(name) for name in ("path", "tokenizer_path")}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError):
        return None


def _ids(data: GroupData, i: int) -> list[int]:
    """Of sequence ``i``."""
    start = sum(data.sizes[:i])
    return np.frombuffer(data.ids, "<i4")[start : start + data.sizes[i]].tolist() if i < len(data.sizes) else []


def _items(data: GroupData, i: int, decoder: Decoder) -> list[dict[str, Any]]:
    start, ids = sum(data.sizes[:i]), _ids(data, i)
    marks = np.frombuffer(data.marks, np.uint8)
    is_trained = marks & TRAINED > 0
    trained, unmatched = is_trained[start : start + len(ids)], marks[start : start + len(ids)] & UNMATCHED > 0
    first = int(np.count_nonzero(is_trained[:start]))

    def whole(values: Any, nothing: Any) -> Any:
        found = np.full(len(ids), nothing)
        if len(values):
            found[trained] = values[first : first + np.count_nonzero(trained)]
        return found

    logprobs, own = (whole(np.frombuffer(values, "<f4"), math.nan) for values in (data.logprobs, data.trainer_logprobs))
    advantages = whole([value for value, count in data.advantages for _ in range(count)], math.nan)
    versions = whole([version for version, count in data.versions for _ in range(count)], UNKNOWN_VERSION)
    texts = {id_: decoder.token(id_) for id_ in set(ids)}
    columns = {
        "id": ids,
        "text": [texts[id_] for id_ in ids],
        "trained": trained.tolist(),
        "unmatched": unmatched.tolist(),
        "advantage": map(_number, advantages),
        "logprob": map(_number, logprobs),
        "mismatch": map(_number, own - logprobs),
        "version": [None if version == UNKNOWN_VERSION else version for version in versions.tolist()],
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _turns(items: Sequence[Mapping[str, Any]], decoder: Decoder) -> list[dict[str, Any]]:
    """The turns of a sequence by the headers of its template; where there are none, by what the policy wrote."""
    ends = list(itertools.accumulate(len(item["text"]) for item in items))
    headers = []
    for match in _HEADER.finditer("".join(item["text"] for item in items)):
        name = next(group for group in match.groups() if group).lower()
        start, stop = bisect.bisect_right(ends, match.start()), bisect.bisect_left(ends, match.end()) + 1
        headers.append((start, stop, _ROLES.get(name, name)))
    if not headers:
        marks = [item["trained"] for item in items]
        edges = [i for i in range(len(items)) if i == 0 or marks[i] != marks[i - 1]]
        headers = [(i, i, "policy" if marks[i] else "prompt") for i in edges]
    elif headers[0][0] > 0:
        headers.insert(0, (0, 0, "text"))
    turns = []
    for (start, begin, role), following in itertools.zip_longest(headers, headers[1:]):
        stop = len(items) if following is None else following[0]
        part = items[start:stop]
        ids = [item["id"] for item in items[begin:stop]]
        is_trained = any(item["trained"] for item in part)
        turns.append({"role": role, "text": decoder.text(ids), "start": start, "stop": stop, "trained": is_trained})
    return turns


def send_rollouts(tracking: Any, reader: TraceReader, step: int) -> None:
    """After step 2 and every tenth step from there on, sends the newest rollouts that were trained and are written as
    ``rollouts`` to wandb and trackio. ``tracking``: verl's ``Tracking``, which takes them there."""
    names = [name for name in ("wandb", "trackio") if name in tracking.logger]
    if step % _TRACKED_EVERY != 2 or not names:
        return
    try:
        found = [reader.sequence(one["id"]) for one in reader.rollouts(RolloutFilter(state="trained"), _TRACKED)]
    except (ConfigError, KeyError) as error:  # KeyError: it was removed meanwhile
        logger.warning("no rollouts for trackers: %s", error)
        return
    for one in found:
        turns = one["turns"] or []
        first = next((number for number, turn in enumerate(turns) if turn["trained"]), len(turns))
        one["prompt"], one["answer"] = ("".join(t["text"] for t in part) for part in (turns[:first], turns[first:]))
    rows = [[one[name] for name in _TRACKED_COLUMNS] for one in found]
    for name in names if rows else ():
        if name == "wandb":
            shown: Any = tracking.logger[name].Table(columns=list(_TRACKED_COLUMNS), data=rows)
        else:
            from trackio import Trace  # type: ignore[import-not-found]

            said = [[{"role": t["role"], "content": t["text"]} for t in one["turns"] or []] for one in found]
            facts = [dict(zip(_TRACKED_COLUMNS[:5], row, strict=False)) for row in rows]
            shown = [Trace(messages=m, metadata=f) for m, f in zip(said, facts, strict=True)]
        tracking.log(data={"rollouts": shown}, step=step, backend=[name])
