"""Reads a JSON body field by field, typed and bounded, and answers what cannot be served with an ``ApiError``.

``parse_sampling`` reads the sampling parameters, which all dialects share.

Every reader marks its field as seen; ``Fields.unread`` names what nobody asked for. JSON null means absent, as in the
APIs that are imitated here.
"""

import gc
import itertools
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeVar

import msgspec

from atropos_verl.errors import EngineError, EngineStoppedError, GenerationRequestError
from atropos_verl.types import GenerationRequest

T = TypeVar("T", bool, str, dict[str, Any])
D = TypeVar("D", int, None)

_EXPECTED = {bool: "true or false", str: "a string", dict: "an object"}
_TYPE_OF_STATUS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "internal_server_error",
    **dict.fromkeys((503, 507), "service_unavailable_error"),
    504: "timeout_error",
}
_ANTHROPIC_TYPE_OF_STATUS = {
    403: "permission_error",
    413: "request_too_large",
    **dict.fromkeys((500, 507), "api_error"),
    503: "overloaded_error",
}

_MAX_N = 1024
"""Completions of one prompt in one request, at most: a typing error should not queue a million sequences."""
_MAX_STOPS, _MAX_STOP_LENGTH = 256, 4096
_MAX_TOKEN_ID = (1 << 31) - 1
_TokenId = Annotated[int, msgspec.Meta(ge=0, le=_MAX_TOKEN_ID)]
_MAX_BRACKETS = 1 << 18
"""Opening ones, those in texts included: two million empty lists took seconds, in which no other thread ran."""

_TOP_K_OFF = 1 << 30
"""SGLang's own "no top-k"."""

# Field → values that change nothing. Everything here would change the distribution that is sampled from (or what the
# answer means), and the engine does not do it: training on such tokens with our logprobs would be wrong in silence.
_REFUSED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("repetition_penalty", "length_penalty", "typical_p"), (1,)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_tokens", "min_new_tokens"), (0,)),
    **dict.fromkeys(("use_beam_search", "early_stopping", "echo", "background"), (False,)),
    **dict.fromkeys(("bad_words", "allowed_token_ids", "logits_processors", "guided_choice"), ([],)),
    **dict.fromkeys(("image_data", "video_data", "audio_data"), ([],)),
    **dict.fromkeys(("logit_bias", "custom_params", "structured_outputs", "multi_modal_data"), ({},)),
    **dict.fromkeys(("mm_processor_kwargs", "session_params"), ({},)),
    **dict.fromkeys(("guided_regex", "guided_grammar", "guided_decoding_regex", "regex", "ebnf", "suffix"), ("",)),
    **dict.fromkeys(("custom_logit_processor", "guided_json", "structural_tag", "json_schema"), ()),
    **dict.fromkeys(("prompt_embeds", "input_embeds", "lora_path"), ()),
    "no_repeat_ngram_size": (0,),
    "spaces_between_special_tokens": (True,),
    "response_format": ({"type": "text"}, {}),
    "truncate_prompt_tokens": (-1,),
}

# Fields of OpenAI's APIs, and of vLLM's and SGLang's, that change neither tokens, logprobs nor text here.
_HARMLESS_OPENAI = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_HARMLESS_NATIVE = ("cache_salt", "priority", "guided_decoding_backend")


class ApiError(Exception):
    """A request that is answered with an error status. ``param``: the field of the body that is to blame; ``code``: a
    short reason for machines."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self, path: str = "", *, streamed: bool = False) -> bytes:
        """The JSON body, UTF-8, in the form of the API at ``path``; ``streamed``: as the last event of a stream."""
        kind = _TYPE_OF_STATUS.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        body: dict[str, Any] = {"error": error}
        if "/messages" in path:
            kind = _ANTHROPIC_TYPE_OF_STATUS.get(self.status, kind)
            body = {"type": "error", "error": {"type": kind, "message": self.message}, "request_id": None}
        elif streamed and path.endswith("/responses"):
            # The documented event, and what makes OpenAI's SDK raise.
            body = {"type": "error", "sequence_number": 0, **error, "code": self.code or kind, "error": error}
        return sent_event(body, "error" if "type" in body else "") if streamed else msgspec.json.encode(body)


def sent_event(data: Any, kind: str = "") -> bytes:
    """A server-sent event with ``data`` as JSON."""
    return (f"event: {kind}\n" if kind else "").encode() + b"data: " + msgspec.json.encode(data) + b"\n\n"


def to_api_error(error: Exception) -> ApiError:
    """The engine's own errors keep their text. Of anything else, a fault of this server, the client learns the type."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, GenerationRequestError):
        return ApiError(400, str(error), param=error.param)
    if isinstance(error, EngineStoppedError):
        return ApiError(503, f"the inference engine has stopped: {error}", code="engine_stopped")
    if isinstance(error, EngineError):
        return ApiError(500, f"the inference engine failed: {error}", code="engine_error")
    if isinstance(error, TimeoutError):
        return ApiError(504, f"the request timed out: {error}", code="timeout")
    return ApiError(500, f"internal error ({type(error).__name__}); the gateway's log has the traceback")


class Fields:
    """One JSON object of a request, called ``prefix``. Its readers raise ``ApiError`` 400 naming field and value."""

    def __init__(self, data: Mapping[str, Any], prefix: str = "", abandoned: threading.Event | None = None) -> None:
        self._data, self._prefix = data, prefix
        self._seen: set[str] = set()
        self.abandoned = abandoned or threading.Event()
        """Set when the client has left: who reads the fields may give up."""

    def __contains__(self, name: str) -> bool:
        return self._data.get(name) is not None

    def raw(self, name: str) -> Any:
        """The value as decoded, or None."""
        self._seen.add(name)
        return self._data.get(name)

    def error(self, name: str, message: str, code: str | None = None) -> ApiError:
        """A 400 about field ``name`` (to be raised by the caller)."""
        return ApiError(400, f"{self._prefix}{name}: {message}", param=self._prefix + name, code=code)

    def integer(self, name: str, default: D, *, minimum: int | None = None, maximum: int | None = None) -> int | D:
        value = self.raw(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # some clients send 16.0 for 16
        if value is not None and type(value) is not int:
            raise self.error(name, f"expected an integer, got {_show(value)}")
        return default if value is None else self._within(name, value, minimum, maximum)

    def number(self, name: str, default: float, *, minimum: float | None = None, maximum: float | None = None) -> float:
        value = self.raw(name)
        if value is not None and (type(value) not in (int, float) or not abs(value) <= sys.float_info.max):
            raise self.error(name, f"expected a finite number, got {_show(value)}")
        return default if value is None else float(self._within(name, value, minimum, maximum))

    def _within(self, name: str, value: Any, minimum: float | None, maximum: float | None) -> Any:
        if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
            allowed = f"at least {minimum}" if maximum is None else f"{minimum} to {maximum}"
            raise self.error(name, f"{_show(value)} is out of range, allowed: {allowed}")
        return value

    def get(self, name: str, default: T) -> T:
        """A boolean, a string or an object, as ``default`` is."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, type(default)):
            raise self.error(name, f"expected {_EXPECTED[type(default)]}, got {_show(value)}")
        return value

    def child(self, name: str) -> Self:
        """The object under ``name`` (empty when absent), with its own record of what was read."""
        return type(self)(self.get(name, dict[str, Any]()), prefix=f"{self._prefix}{name}.")

    def stops(self, name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Stop strings and stop token ids: a string, an id, or a list of them. (Environments send the id of an end.)"""
        value = self.raw(name)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if len(items) > _MAX_STOPS:
            raise self.error(name, f"{len(items)} items; send {_MAX_STOPS} at most")
        for index, item in enumerate(items):
            if not (isinstance(item, str) and 0 < len(item) <= _MAX_STOP_LENGTH) and type(item) is not int:
                text = f"must be a string of 1 to {_MAX_STOP_LENGTH} characters or a token id, got {_show(item)}"
                raise self.error(name, f"item {index} {text}")
        ids = [item for item in items if isinstance(item, int)]
        return tuple(item for item in items if isinstance(item, str)), self.check_token_ids(name, ids)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A list of token ids (empty when absent)."""
        value = self.raw(name)
        return () if value is None else self.check_token_ids(name, value)

    def check_token_ids(self, name: str, value: Any) -> tuple[int, ...]:
        """``value`` as token ids: a list of integers ≥ 0."""
        if not isinstance(value, list):
            raise self.error(name, f"expected a list of token ids, got {_show(value)}")
        try:  # not one by one: other threads wait while a long prompt is looked through
            return tuple(msgspec.convert(value, list[_TokenId]))
        except (msgspec.ValidationError, OverflowError):
            index = next(i for i, item in enumerate(value) if type(item) is not int or not 0 <= item <= _MAX_TOKEN_ID)
            text = f"item {index} must be a token id (an integer from 0 to {_MAX_TOKEN_ID}), got {_show(value[index])}"
            raise self.error(name, text) from None

    def require_neutral(self, refused: Mapping[str, Sequence[Any]]) -> None:
        """``refused``: fields that are not implemented → values at which they change nothing, as null always does."""
        for name, neutral in refused.items():
            value = self.raw(name)
            if value is None or any(value == item for item in neutral):
                continue
            allowed = " or ".join(msgspec.json.encode(item).decode() for item in neutral)
            advice = f"leave it out or send {allowed}" if allowed else "leave it out"
            raise self.error(name, f"not supported by this server ({_show(value)}); {advice}", code="unsupported_field")

    def ignore(self, *names: str) -> None:
        """Fields that are known to change nothing in the answer."""
        self._seen.update(names)

    def unread(self) -> list[str]:
        """Names (with prefix) of non-null fields that nobody read, in the order of the body."""
        return [self._prefix + name for name in self._data if name not in self._seen and name in self]


def parse_body(body: bytes | bytearray, abandoned: threading.Event) -> Fields:
    """Decode a request body. Raises ``ApiError`` 400 when it is not a JSON object, or one of too many parts."""
    if body.count(b"[") + body.count(b"{") > _MAX_BRACKETS:
        raise ApiError(400, f"the body has more than {_MAX_BRACKETS} brackets; send it in parts")
    collects = gc.isenabled()
    gc.disable()  # it would look through all objects of the process several times, and no other thread runs meanwhile
    try:
        return Fields(msgspec.json.decode(body, type=dict[str, Any]), abandoned=abandoned)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not a JSON object: {error}") from error
    finally:
        if collects:
            gc.enable()


def _show(value: Any) -> str:
    """The value for an error message, cut at 80 characters."""
    if isinstance(value, list | dict) and len(value) > 80:
        value = type(value)(itertools.islice(value.items() if isinstance(value, dict) else value, 80))
    try:
        text = msgspec.json.encode(value).decode()
    except RecursionError:
        text = f"{type(value).__name__} of many levels"
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The sampling parameters of a request, and the form its text takes."""

    template: GenerationRequest
    """A request without a prompt; ``max_tokens`` None: what the context still holds."""
    skip_special_tokens: bool
    include_stop: bool
    """Keep the stop string (or stop token) in the text. Token ids always keep it."""


def parse_sampling(
    fields: Fields,
    *,
    max_tokens_names: tuple[str, ...],
    max_tokens_default: int | None,
    served: Collection[str] = (),
) -> Sampling:
    """The sampling fields that dialects share. ``served``: those that others refuse, and this one reads itself;
    ``max_tokens_names``: the first one given wins; ``max_tokens_default`` None: the rest of the context."""
    bounds = [fields.integer(name, None, minimum=1) for name in max_tokens_names]
    given = [bound for bound in bounds if bound is not None]
    n = fields.integer("n", 1, minimum=1, maximum=_MAX_N)
    fields.require_neutral({name: neutral for name, neutral in _REFUSED.items() if name not in served})
    fields.require_neutral({"best_of": (n,)})
    fields.ignore(*_HARMLESS_OPENAI, *_HARMLESS_NATIVE)
    top_p = fields.number("top_p", 1.0, minimum=0.0, maximum=1.0)
    if top_p == 0.0:
        raise fields.error("top_p", "0.0 is out of range, allowed: above 0 and at most 1")
    top_k = fields.integer("top_k", -1, minimum=-1)
    stop, stop_ids = fields.stops("stop")
    template = GenerationRequest(
        prompt_token_ids=(),
        n=n,
        max_tokens=given[0] if given else max_tokens_default,
        temperature=fields.number("temperature", 1.0, minimum=0.0),
        top_p=top_p,
        top_k=-1 if top_k == 0 or top_k >= _TOP_K_OFF else top_k,
        min_p=fields.number("min_p", 0.0, minimum=0.0, maximum=1.0),
        stop=stop,
        stop_token_ids=(*fields.token_ids("stop_token_ids"), *stop_ids),
        ignore_eos=fields.get("ignore_eos", False),
        seed=fields.integer("seed", None, minimum=-(1 << 63), maximum=(1 << 63) - 1),
    )
    return Sampling(
        template=template,
        skip_special_tokens=fields.get("skip_special_tokens", True),
        include_stop=fields.get("include_stop_str_in_output", False) or fields.get("no_stop_trim", False),
    )
