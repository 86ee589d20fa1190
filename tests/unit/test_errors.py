"""The error tree: parents that callers catch, messages, and pickling (errors cross processes under Ray)."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from atropos_verl import errors

URL = "http://localhost:9001"
SAMPLES: list[tuple[errors.AtroposVerlError, dict[str, object]]] = [
    (errors.AtroposVerlError("base"), {}),
    (errors.ConfigError("must be positive", "optim.lr"), {"key": "optim.lr"}),
    (errors.AtroposAPIError("reason", URL), {"reason": "reason", "base_url": URL}),
    (errors.AtroposConnectionError("refused", URL), {"reason": "refused", "base_url": URL}),
    (errors.AtroposTimeoutError("no answer", URL), {"reason": "no answer", "base_url": URL}),
    (
        errors.AtroposHTTPStatusError("HTTP 503", URL, 503, "busy"),
        {"reason": "HTTP 503", "base_url": URL, "status_code": 503, "body": "busy"},
    ),
    (errors.AtroposProtocolError("not Atropos", URL), {"reason": "not Atropos", "base_url": URL}),
    (errors.DataError("scores[1] = nan"), {}),
    (errors.UnsupportedFieldError("images"), {}),
    (errors.EngineError("failed"), {}),
    (errors.GenerationRequestError("too long", "max_tokens"), {"param": "max_tokens"}),
    (errors.EngineStoppedError("closed"), {}),
    (errors.WeightSyncError("canary"), {}),
    (errors.TrainingDivergedError("loss = nan"), {}),
    (errors.CheckpointError("disk full"), {}),
    (errors.StorageError("cannot be read"), {}),
    (errors.StorageWriteError("disk full"), {}),
    (errors.StorageDamagedError("torn"), {}),
    (errors.StorageInUseError("in use"), {}),
    (
        errors.ServiceError("environment died", "environment", -9, "last line"),
        {"service": "environment", "returncode": -9, "log_tail": "last line"},
    ),
]
IDS = [type(error).__name__ for error, _ in SAMPLES]


def test_every_class_of_the_tree_is_tried_here() -> None:
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert set(IDS) == defined


@pytest.mark.parametrize(("error", "attributes"), SAMPLES, ids=IDS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_keeps_class_message_and_attributes(
    error: errors.AtroposVerlError, attributes: dict[str, object], protocol: int
) -> None:
    restored = pickle.loads(pickle.dumps(error, protocol))
    assert type(restored) is type(error)
    assert str(restored) == str(error)
    assert restored.args == error.args
    assert vars(restored) == attributes


@pytest.mark.parametrize(("error", "attributes"), SAMPLES, ids=IDS)
def test_a_note_and_a_copy_survive(error: errors.AtroposVerlError, attributes: dict[str, object]) -> None:
    noted = copy.copy(error)
    noted.add_note("saved up to step 7")
    restored = pickle.loads(pickle.dumps(noted))
    assert restored.__notes__ == ["saved up to step 7"]
    assert vars(error) == attributes  # the original has no note


@pytest.mark.parametrize(
    ("kind", "parents"),
    [
        (errors.ConfigError, (ValueError,)),
        (errors.AtroposConnectionError, (errors.AtroposAPIError, ConnectionError)),
        (errors.AtroposTimeoutError, (errors.AtroposAPIError, TimeoutError)),
        (errors.AtroposHTTPStatusError, (errors.AtroposAPIError,)),
        (errors.AtroposProtocolError, (errors.AtroposAPIError, ValueError)),
        (errors.DataError, (ValueError,)),
        (errors.UnsupportedFieldError, (errors.DataError,)),
        (errors.GenerationRequestError, (errors.EngineError, ValueError)),
        (errors.EngineStoppedError, (errors.EngineError,)),
    ],
)
def test_the_builtin_family_of_an_error_catches_it(kind: type[Exception], parents: tuple[type[Exception], ...]) -> None:
    assert issubclass(kind, errors.AtroposVerlError)
    for parent in parents:
        assert issubclass(kind, parent)


def test_messages() -> None:
    assert str(errors.ConfigError("must be positive", "optim.lr")) == "optim.lr: must be positive"
    assert str(errors.ConfigError("nothing fits")) == "nothing fits"
    assert str(errors.AtroposAPIError("gone")) == "ATROPOS API ERROR: gone"
    assert str(errors.AtroposConnectionError("gone", URL)) == (
        "ATROPOS API ERROR: gone\n\nEnsure that:\n1. Atropos server is running on http://localhost:9001\n"
        "2. The API endpoints are accessible\n3. Network connectivity is available"
    )
    assert str(errors.ServiceError("died")) == "died"
    assert str(errors.ServiceError("died", "env", 1, "boom")) == "died\n--- last lines of env ---\nboom"
