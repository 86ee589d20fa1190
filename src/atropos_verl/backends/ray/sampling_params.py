"""verl's sampling parameters (vLLM's words, and SGLang's for some) ⇄ ``GenerationRequest``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atropos_verl.errors import GenerationRequestError
from atropos_verl.types import GenerationRequest

__all__ = ["to_request", "to_sampling_params"]

_SAME_NAME = ("temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "prompt_logprobs")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1, None),
    "best_of": (1, None),
    "repetition_penalty": (1, None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "min_tokens": (0, None),
    "min_new_tokens": (0, None),
    "logit_bias": (None, {}),
    "bad_words": (None, [], ()),
    "extra_args": (None, {}),
}
"""Parameters the embedded engine does not have, and the values at which they change nothing."""
_TEXT_ONLY = {
    "logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "no_stop_trim",
    "detokenize",
    "output_kind",
    "response_length",
}
"""Parameters about the form of the answer, which is tokens here."""


def to_request(
    prompt_ids: Sequence[int], params: dict[str, Any], config: Any, max_context_len: int, request_id: str
) -> GenerationRequest:
    """What verl's server gets → a request. ``config`` is verl's ``RolloutConfig``.

    Without ``max_tokens``: verl's default, ``response_length`` at most and ``prompt_length + response_length`` in all.

    Raises ``GenerationRequestError`` naming a parameter that the embedded engine would have to ignore.
    """
    params = dict(params)
    prompt = tuple(int(token) for token in prompt_ids)
    max_tokens = params.pop("max_tokens", None)
    max_new_tokens = params.pop("max_new_tokens", None)
    wanted = max_tokens if max_tokens is not None else max_new_tokens
    if wanted is None:
        wanted = min(config.response_length, config.prompt_length + config.response_length - len(prompt))
    wanted = max(1, min(int(wanted), max_context_len - len(prompt)))
    settings = {name: params.pop(name) for name in _SAME_NAME if params.get(name) is not None}
    settings.setdefault("ignore_eos", bool(config.ignore_eos))
    stop = params.pop("stop", None) or ()
    stop_ids = params.pop("stop_token_ids", None) or ()
    for name, value in params.items():
        if name in _TEXT_ONLY or value is None or (name in _NEUTRAL and value in _NEUTRAL[name]):
            continue
        raise GenerationRequestError(f"{name}={value!r} is not supported by rollout.name=transformers", name)
    return GenerationRequest(
        prompt_token_ids=prompt,
        max_tokens=wanted,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(stop_ids),
        request_id=request_id,
        **settings,
    )


def to_sampling_params(request: GenerationRequest, max_tokens: int, *, index: int, generated: int) -> dict[str, Any]:
    """What verl's client gets for completion ``index`` of ``request`` after ``generated`` tokens of it.

    Only what differs from vLLM's defaults is named: SGLang does not know every word. Logprobs are always asked for.
    """
    params: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "logprobs": True,
    }
    if request.top_k > 0:
        params["top_k"] = request.top_k
    if request.min_p > 0:
        params["min_p"] = request.min_p
    if request.stop:
        params["stop"] = list(request.stop)
    if request.stop_token_ids:
        params["stop_token_ids"] = list(request.stop_token_ids)
    if request.ignore_eos:
        params["ignore_eos"] = True
    if request.seed is not None:
        # Another stream per completion, and after an abort: the same numbers again would repeat the same draws.
        params["seed"] = (request.seed + 0x9E3779B1 * index + 0x85EBCA6B * generated) % (1 << 31)
    if request.prompt_logprobs is not None and generated == 0:
        params["prompt_logprobs"] = request.prompt_logprobs
    return params
