"""The sampling parameters that all dialects share, and what a request becomes for the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from atropos_verl.gateway.fields import Fields
from atropos_verl.types import GenerationRequest

__all__ = ["MAX_N", "Sampling", "parse_sampling"]

MAX_N = 1024
"""Completions of one prompt in one request, at most: a typing error should not queue a million sequences."""

_TOP_K_OFF = 1 << 30
"""SGLang's own "no top-k"."""

# Field → values that change nothing. Everything here would change the distribution that is sampled from (or what the
# answer means), and the engine does not do it: training on such tokens with our logprobs would be wrong in silence.
_REFUSED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("repetition_penalty", "length_penalty", "typical_p"), (1,)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_tokens", "min_new_tokens"), (0,)),
    **dict.fromkeys(("use_beam_search", "early_stopping", "echo"), (False,)),
    **dict.fromkeys(("bad_words", "allowed_token_ids", "logits_processors", "guided_choice"), ([],)),
    **dict.fromkeys(("image_data", "video_data", "audio_data"), ([],)),
    **dict.fromkeys(("logit_bias", "custom_params", "structured_outputs", "multi_modal_data"), ({},)),
    **dict.fromkeys(("mm_processor_kwargs", "session_params"), ({},)),
    **dict.fromkeys(("guided_regex", "guided_grammar", "guided_decoding_regex", "regex", "ebnf", "suffix"), ("",)),
    **dict.fromkeys(("custom_logit_processor", "guided_json", "structural_tag", "json_schema"), ()),
    **dict.fromkeys(("prompt_embeds", "input_embeds", "lora_path"), ()),
    "no_repeat_ngram_size": (0,),
    "response_format": ({"type": "text"}, {}),
    "truncate_prompt_tokens": (-1,),
}

# Fields of the imitated APIs that change neither tokens, logprobs nor text here.
_HARMLESS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "cache_salt",
    "priority",
    "parallel_tool_calls",
    "spaces_between_special_tokens",
    "guided_decoding_backend",
    "background",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The sampling parameters of a request, and the form its text takes."""

    template: GenerationRequest
    """A request without a prompt; ``max_tokens`` None: what the context still holds."""
    skip_special_tokens: bool
    include_stop: bool
    """Keep the stop string (or stop token) in the text. Token ids always keep it."""


def parse_sampling(fields: Fields, *, max_tokens_names: tuple[str, ...], max_tokens_default: int | None) -> Sampling:
    """Read the shared sampling fields.

    ``max_tokens_names``: the dialect's names of the bound on new tokens, the first one given wins.
    ``max_tokens_default``: the dialect's own default (None: rest of the context). Raises ``ApiError`` 400.
    """
    bounds = [fields.optional_integer(name, minimum=1) for name in max_tokens_names]
    given = [bound for bound in bounds if bound is not None]
    n = fields.integer("n", 1, minimum=1, maximum=MAX_N)
    best_of = fields.optional_integer("best_of")
    if best_of is not None and best_of != n:
        raise fields.error("best_of", f"not supported ({best_of}); leave it out or send n ({n})", "unsupported_field")
    fields.require_neutral(_REFUSED)
    fields.ignore(*_HARMLESS)
    top_p = fields.number("top_p", 1.0, minimum=0.0, maximum=1.0)
    if top_p == 0.0:
        raise fields.error("top_p", "0.0 is out of range, allowed: above 0 and at most 1")
    top_k = fields.integer("top_k", -1, minimum=-1)
    template = GenerationRequest(
        prompt_token_ids=(),
        n=n,
        max_tokens=given[0] if given else max_tokens_default,
        temperature=fields.number("temperature", 1.0, minimum=0.0),
        top_p=top_p,
        top_k=-1 if top_k == 0 or top_k >= _TOP_K_OFF else top_k,
        min_p=fields.number("min_p", 0.0, minimum=0.0, maximum=1.0),
        stop=fields.strings("stop"),
        stop_token_ids=fields.token_ids("stop_token_ids"),
        ignore_eos=fields.boolean("ignore_eos", False),
        seed=fields.optional_integer("seed", minimum=-(1 << 63), maximum=(1 << 63) - 1),
    )
    return Sampling(
        template=template,
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
        include_stop=fields.boolean("include_stop_str_in_output", False) or fields.boolean("no_stop_trim", False),
    )
