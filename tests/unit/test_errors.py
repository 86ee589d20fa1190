"""The error tree: parents that callers catch, messages, and pickling (errors cross processes under Ray)."""

import inspect
import pickle

import pytest

from atropos_verl import errors

URL = "http://localhost:9001"
CLASSES = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, Exception)]
OF_API = [kind for kind in CLASSES if issubclass(kind, errors.AtroposAPIError)]
HTTP_503 = {"reason": "HTTP 503", "base_url": URL, "status_code": 503, "body": "busy"}
DIED = {"service": "environment", "returncode": -9, "log_tail": "last line"}
WITH_ATTRIBUTES: list[tuple[errors.AtroposVerlError, dict[str, object]]] = [
    *((kind("refused", URL), {"reason": "refused", "base_url": URL}) for kind in OF_API if "Status" not in str(kind)),
    (errors.AtroposHTTPStatusError(*HTTP_503.values()), HTTP_503),
    (errors.ConfigError("must be positive", "optim.lr"), {"key": "optim.lr"}),
    (errors.GenerationRequestError("too long", "max_tokens"), {"param": "max_tokens"}),
    (errors.ServiceError("environment died", *DIED.values()), DIED),
]
PLAIN = set(CLASSES) - {type(error) for error, _ in WITH_ATTRIBUTES}
SAMPLES = WITH_ATTRIBUTES + [(kind("what happened"), {}) for kind in CLASSES if kind in PLAIN]
IDS = [type(error).__name__ for error, _ in SAMPLES]


@pytest.mark.parametrize(("error", "attributes"), SAMPLES, ids=IDS)
def test_pickle_keeps_class_message_and_attributes(
    error: errors.AtroposVerlError, attributes: dict[str, object]
) -> None:
    restored = pickle.loads(pickle.dumps(error))
    assert type(restored) is type(error)
    assert str(restored) == str(error)
    assert restored.args == error.args
    assert vars(restored) == attributes


@pytest.mark.parametrize(
    ("parent", "kinds"),
    [
        (errors.AtroposVerlError, CLASSES),
        (errors.AtroposAPIError, [errors.AtroposConnectionError, errors.AtroposHTTPStatusError]),
        (errors.AtroposAPIError, [errors.AtroposTimeoutError, errors.AtroposProtocolError]),
        (ConnectionError, [errors.AtroposConnectionError]),
        (TimeoutError, [errors.AtroposTimeoutError]),
        (ValueError, [errors.ConfigError, errors.DataError, errors.AtroposProtocolError]),
        (errors.DataError, [errors.UnsupportedFieldError]),
        (errors.EngineError, [errors.GenerationRequestError, errors.EngineStoppedError]),
        (ValueError, [errors.GenerationRequestError]),
    ],
)
def test_an_error_is_caught_by_its_families(parent: type[Exception], kinds: list[type[Exception]]) -> None:
    assert all(issubclass(kind, parent) for kind in kinds)


def test_messages() -> None:
    assert str(errors.ConfigError("must be positive", "optim.lr")) == "optim.lr: must be positive"
    assert str(errors.ConfigError("nothing fits")) == "nothing fits"
    assert str(errors.AtroposAPIError("gone")) == "ATROPOS API ERROR: gone"
    assert str(errors.AtroposHTTPStatusError("HTTP 422", "http://a:1", 422)) == "ATROPOS API ERROR: HTTP 422"
    assert str(errors.AtroposConnectionError("gone", URL)) == (
        "ATROPOS API ERROR: gone\n\nEnsure that:\n1. Atropos server is running on http://localhost:9001\n"
        "2. The API endpoints are accessible\n3. Network connectivity is available"
    )
    assert str(errors.ServiceError("died")) == "died"
    assert str(errors.ServiceError("died", "env", 1, "boom")) == "died\n--- last lines of env ---\nboom"
