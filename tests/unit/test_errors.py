"""The error tree: parents that callers catch, messages, and pickling (errors cross processes under Ray)."""

import inspect
import pickle
from typing import Any

from atropos_verl import errors

URL = "http://localhost:9001"
KINDS = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, Exception)]
GONE = f"""ATROPOS API ERROR: gone

Ensure that:
1. Atropos server is running on {URL}
2. The API endpoints are accessible
3. Network connectivity is available"""


def test_pickle_keeps_class_message_and_attributes() -> None:
    died = {"service": "env", "returncode": -9, "log_tail": "boom"}
    of_api = {"reason": "gone", "base_url": URL}
    said: list[tuple[Exception, str, dict[str, Any]]] = [
        (errors.ConfigError("must be positive", "optim.lr"), "optim.lr: must be positive", {"key": "optim.lr"}),
        (errors.ConfigError("nothing fits"), "nothing fits", {"key": ""}),
        (errors.AtroposAPIError("gone"), "ATROPOS API ERROR: gone", {"reason": "gone", "base_url": ""}),
        *((kind("gone", URL), GONE, of_api) for kind in (errors.AtroposConnectionError, errors.AtroposProtocolError)),
        (errors.AtroposHTTPStatusError("gone", URL, 503, "b"), GONE, {**of_api, "status_code": 503, "body": "b"}),
        (errors.GenerationRequestError("too long", "max_tokens"), "too long", {"param": "max_tokens"}),
        (errors.ServiceError("died", *died.values()), "died\n--- last lines of env ---\nboom", died),
        (errors.ServiceError("died"), "died", {"service": "", "returncode": None, "log_tail": ""}),
    ]
    assert str(errors.AtroposHTTPStatusError("gone", URL, 422)) == "ATROPOS API ERROR: gone", "it has read the request"
    for error, message, attributes in said:
        assert (str(error), vars(error)) == (message, attributes)
    for error in [*(error for error, _, _ in said), *(kind("said") for kind in KINDS)]:
        restored = pickle.loads(pickle.dumps(error))
        assert (type(restored), restored.args) == (type(error), error.args)
        assert (str(restored), vars(restored)) == (str(error), vars(error))


def test_an_error_is_caught_by_its_families() -> None:
    api, engine = errors.AtroposAPIError, errors.EngineError
    parents = {
        errors.AtroposConnectionError: (api, ConnectionError),
        errors.AtroposTimeoutError: (api, TimeoutError),
        errors.AtroposProtocolError: (api, ValueError),
        errors.AtroposHTTPStatusError: (api,),
        errors.ConfigError: (ValueError,),
        errors.UnsupportedFieldError: (errors.DataError, ValueError),
        errors.GenerationRequestError: (engine, ValueError),
        errors.EngineStoppedError: (engine,),
    }
    assert all(issubclass(kind, errors.AtroposVerlError) for kind in KINDS)
    assert all(issubclass(kind, parent) for kind, found in parents.items() for parent in found)
