"""Reads a JSON body field by field, typed and bounded, and answers what cannot be served with an ``ApiError``.

``parse_sampling`` reads the sampling parameters, which all dialects share. ``Fields.unread`` names what nobody read.
JSON null means absent, as in the APIs that are imitated here."""

import gc
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeVar

import msgspec
from msgspec import Meta

from atropos_verl.errors import EngineError, EngineStoppedError, GenerationRequestError
from atropos_verl.types import GenerationRequest

T = TypeVar("T")

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

_N = Annotated[int, Meta(ge=1, le=1024)]
"""Completions of one prompt in one request: a typing error should not queue a million sequences."""
_TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
TokenIds = tuple[_TokenId, ...]
_Stops = Annotated[list[Annotated[str, Meta(min_length=1, max_length=4096)] | _TokenId], Meta(max_length=256)]
_MAX_BRACKETS = 1 << 18
"""Opening ones, those in texts included: two million empty lists took seconds, in which no other thread ran."""

_TOP_K_OFF = 1 << 30
"""SGLang's own "no top-k"."""

# Everything here would change the distribution that is sampled from (or what the answer means), and the engine does not
# do it: training on such tokens with our logprobs would be wrong in silence.
_REFUSED: tuple[str, ...] = (
    *("frequency_penalty", "presence_penalty", "min_tokens", "min_new_tokens", "no_repeat_ngram_size", "logit_bias"),
    *("use_beam_search", "early_stopping", "echo", "suffix", "background", "bad_words", "allowed_token_ids"),
    *("logits_processors", "custom_logit_processor", "custom_params", "session_params", "lora_path", "prompt_embeds"),
    *("input_embeds", "image_data", "video_data", "audio_data", "multi_modal_data", "mm_processor_kwargs"),
    *("guided_choice", "guided_regex", "guided_grammar", "guided_json", "guided_decoding_regex", "regex", "ebnf"),
    *("structured_outputs", "structural_tag", "json_schema"),
)
_REFUSED_UNLESS = {
    **dict.fromkeys(("repetition_penalty", "length_penalty", "typical_p"), 1),
    "spaces_between_special_tokens": True,
    "response_format": {"type": "text"},
    "truncate_prompt_tokens": -1,
}
# Fields of OpenAI's APIs, and of vLLM's and SGLang's, that change neither tokens, logprobs nor text here.
_HARMLESS: tuple[str, ...] = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_HARMLESS += ("cache_salt", "priority", "guided_decoding_backend")


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

    def __init__(self, data: Mapping[str, Any], prefix: str = "") -> None:
        self._data, self._prefix = data, prefix
        self._seen: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._data.get(name) is not None

    def raw(self, name: str) -> Any:
        """The value as decoded, or None."""
        self._seen.add(name)
        return self._data.get(name)

    def error(self, name: str, message: str, code: str | None = None) -> ApiError:
        """A 400 about field ``name`` (to be raised by the caller)."""
        return ApiError(400, f"{self._prefix}{name}: {message}", param=self._prefix + name, code=code)

    def read(self, name: str, default: T, kind: Any = None) -> T:
        """The value as ``convert`` gives it; ``kind`` None: of the type of ``default``, which stands for null."""
        value = self.raw(name)
        return default if value is None else self.convert(name, value, kind or type(default))

    def convert(self, name: str, value: Any, kind: Any, where: str = "") -> Any:
        """``value`` as ``kind``, a type of msgspec. Not one by one: other threads wait meanwhile."""
        try:  # some clients send 16.0 for 16
            return msgspec.convert(int(value) if isinstance(value, float) and value.is_integer() else value, kind)
        except (msgspec.ValidationError, OverflowError) as error:
            raise self.error(name, f"{where}{error}; it is {reprlib.repr(value)[:80]}") from None

    def child(self, name: str) -> Self:
        """The object under ``name`` (empty when absent), with its own record of what was read."""
        return type(self)(self.read(name, dict[str, Any]()), prefix=f"{self._prefix}{name}.")

    def stops(self, name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Stop strings and stop token ids: a string, an id, or a list of them. (Environments send the id of an end.)"""
        value = self.raw(name)
        items = self.convert(name, value if isinstance(value, list) else [] if value is None else [value], _Stops)
        strings = tuple(item for item in items if isinstance(item, str))
        return strings, tuple(item for item in items if isinstance(item, int))

    def refuse(self, *names: str, **unless: Any) -> None:
        """Fields that are not implemented. What is null, empty, zero or false changes nothing; of those in ``unless``,
        null and that value."""
        self.ignore(*names, *unless)
        for name, value in self._data.items():
            is_refused = value != unless[name] if name in unless else name in names and value
            if value is not None and is_refused:
                shown = reprlib.repr(value)[:80]
                raise self.error(name, f"not supported by this server ({shown}); leave it out", "unsupported_field")

    def ignore(self, *names: str) -> None:
        """Fields that are known to change nothing in the answer."""
        self._seen.update(names)

    def unread(self) -> list[str]:
        """Names (with prefix) of non-null fields that nobody read, in the order of the body."""
        return [self._prefix + name for name in self._data if name not in self._seen and name in self]


def parse_body(body: bytes | bytearray) -> Fields:
    """Decode a request body. Raises ``ApiError`` 400 when it is not a JSON object, or one of too many parts."""
    if body.count(b"[") + body.count(b"{") > _MAX_BRACKETS:
        raise ApiError(400, f"the body has more than {_MAX_BRACKETS} brackets; send it in parts")
    collects = gc.isenabled()
    gc.disable()  # it would look through all objects of the process several times, and no other thread runs meanwhile
    try:
        return Fields(msgspec.json.decode(body, type=dict[str, Any]))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not a JSON object: {error}") from error
    finally:
        if collects:
            gc.enable()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The sampling parameters of a request, and the form its text takes."""

    template: GenerationRequest
    """A request without a prompt; ``max_tokens`` None: what the context still holds."""
    skip_special_tokens: bool
    include_stop: bool
    """Keep the stop string (or stop token) in the text. Token ids always keep it."""


def parse_sampling(
    fields: Fields, max_tokens_names: tuple[str, ...], max_tokens_default: int | None = None, served: str = ""
) -> Sampling:
    """The sampling fields that dialects share. ``served``: one that others refuse, and this one reads itself;
    ``max_tokens_names``: the first one given wins; ``max_tokens_default`` None: the rest of the context."""
    bounds: list[int | None] = [fields.read(name, None, Annotated[int, Meta(ge=1)]) for name in max_tokens_names]
    n = fields.read("n", 1, _N)
    fields.refuse(*_REFUSED, best_of=n, **{name: value for name, value in _REFUSED_UNLESS.items() if name != served})
    fields.ignore(*_HARMLESS)
    top_k = fields.read("top_k", -1, Annotated[int, Meta(ge=-1)])
    stop, stop_ids = fields.stops("stop")
    template = GenerationRequest(
        prompt_token_ids=(),
        n=n,
        max_tokens=next((bound for bound in bounds if bound is not None), max_tokens_default),
        temperature=fields.read("temperature", 1.0, Annotated[float, Meta(ge=0)]),
        top_p=fields.read("top_p", 1.0, Annotated[float, Meta(gt=0, le=1)]),
        top_k=-1 if top_k == 0 or top_k >= _TOP_K_OFF else top_k,
        min_p=fields.read("min_p", 0.0, Annotated[float, Meta(ge=0, le=1)]),
        stop=stop,
        stop_token_ids=(*fields.read("stop_token_ids", (), TokenIds), *stop_ids),
        ignore_eos=fields.read("ignore_eos", False),
        seed=fields.read("seed", None, Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]),
    )
    return Sampling(
        template=template,
        skip_special_tokens=fields.read("skip_special_tokens", True),
        include_stop=fields.read("include_stop_str_in_output", False) or fields.read("no_stop_trim", False),
    )
