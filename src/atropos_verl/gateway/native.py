"""``POST /generate``: the native dialects of vLLM, SGLang and (with a trailing slash) trl's vLLM server.

Atropos asks for tokens and logprobs through these. vLLM and SGLang share the path and are told apart by their keys:
``prompt`` / ``prompt_token_ids`` is vLLM, ``input_ids`` / ``text`` / ``sampling_params`` is SGLang."""

from collections.abc import Sequence
from operator import itemgetter
from typing import Annotated, Any

import msgspec

from atropos_verl.gateway.fields import ApiError, Fields, TokenIds, parse_sampling
from atropos_verl.gateway.service import Answer, GatewayService, finite_logprobs, policy_fields
from atropos_verl.types import Generation, GenerationRequest

_VLLM_BOUNDS = ("max_tokens", "max_new_tokens", "max_completion_tokens")
_SGLANG_BOUNDS = ("max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the largest number of new tokens; each dialect's own wins."""
_VLLM_DEFAULT_TOKENS = 16
"""``SamplingParams.max_tokens`` of vLLM when absent."""
_SGLANG_DEFAULT_TOKENS = 128
"""``max_new_tokens`` of SGLang when absent."""
_PromptLogprobs = Annotated[int, msgspec.Meta(ge=0, le=1024)]


def generate(service: GatewayService, fields: Fields) -> Answer:
    """``POST /generate``. Raises ``ApiError`` 400 when the body fits neither dialect, or both."""
    sglang = [name for name in ("input_ids", "text", "sampling_params") if name in fields]
    vllm = [name for name in ("prompt", "prompt_token_ids") if name in fields]
    if sglang and vllm:
        raise ApiError(400, f"{vllm[0]} (vLLM's dialect) and {sglang[0]} (SGLang's) in one request", param=vllm[0])
    if sglang:
        return _generate_sglang(service, fields)
    if vllm:
        return _generate_vllm(service, fields)
    message = "no prompt: send prompt (a text or {'prompt_token_ids': [...]}, vLLM) or input_ids / text (SGLang)"
    raise ApiError(400, message, param="prompt")


# vLLM ---------------------------------------------------------------------------------------------------------------


def _generate_vllm(service: GatewayService, fields: Fields) -> Answer:
    sampling = parse_sampling(fields, _VLLM_BOUNDS, _VLLM_DEFAULT_TOKENS)
    fields.refuse("stream")
    fields.ignore("detokenize", "request_id")  # false would only leave the text out
    with_logprobs = "logprobs" in fields
    if fields.read("logprobs", 0, Annotated[int, msgspec.Meta(ge=0, le=1)]):
        service.warn("generate logprobs=1", "/generate: logprobs=1 returns the sampled token only, as logprobs=0")
    prompt_logprobs: int | None = fields.read("prompt_logprobs", None, _PromptLogprobs)
    prompt_text, prompt_ids, holder = _vllm_prompt(service, fields)
    name = service.new_id("generate-")
    [request] = service.requests(sampling, [prompt_ids], param="prompt", name=name, prompt_logprobs=prompt_logprobs)
    service.report_unread("/generate", fields, holder)

    async def answer() -> bytes:
        [generations] = await service.generate([request])
        codec = service.codec
        parts: dict[str, Any] = {
            "text": [codec.completion_text(g.token_ids, g.finish_reason, sampling)[0] for g in generations],
            "prompt": prompt_text if prompt_text is not None else codec.decode(prompt_ids, skip_special_tokens=False),
            "finish_reasons": [g.finish_reason for g in generations],
            "token_ids": [g.token_ids for g in generations],
            "prompt_token_ids": prompt_ids,
            **policy_fields(generations),
        }
        if with_logprobs:
            # [sequence][position][0] = {token id: logprob}: the shape that Atropos reads
            parts["logprobs"] = [
                [[{t: v}] for t, v in zip(g.token_ids, finite_logprobs(g.logprobs), strict=True)] for g in generations
            ]
        if prompt_logprobs is not None:
            parts["prompt_logprobs"] = _prompt_logprobs(request, generations[0])
        return msgspec.json.encode(parts)

    return answer


def _vllm_prompt(service: GatewayService, fields: Fields) -> tuple[str | None, tuple[int, ...], Fields]:
    """(text as sent or None, token ids, the object that holds the prompt)."""
    add_special, prompt, holder = fields.read("add_special_tokens", True), fields.raw("prompt"), fields
    if prompt is not None and "prompt_token_ids" in fields:
        raise fields.error("prompt_token_ids", "send either prompt or prompt_token_ids, not both")
    if isinstance(prompt, list):
        return None, fields.convert("prompt", prompt, TokenIds), holder
    if prompt is not None and not isinstance(prompt, str):
        holder = fields.child("prompt")
        holder.refuse("multi_modal_data", "prompt_embeds")
    if "prompt_token_ids" in holder:
        holder.ignore("prompt")
        return None, holder.read("prompt_token_ids", (), TokenIds), holder
    text = holder.read("prompt", "")
    return text, service.codec.encode(text, add_special_tokens=add_special), holder


def _prompt_logprobs(request: GenerationRequest, generation: Generation) -> list[dict[int, float] | None]:
    """[P] ``{token id: logprob}``, null at position 0. The prompt's own token comes first, for which readers of vLLM
    take the first entry, then the likely ones."""
    entries = generation.prompt_logprobs
    if entries is None or len(entries) != len(request.prompt_token_ids):
        raise ApiError(500, "the inference engine returned no prompt logprobs", code="engine_error")
    ordered: list[dict[int, float] | None] = []
    for token_id, entry in zip(request.prompt_token_ids, entries, strict=True):
        if entry is not None:
            best_first = dict(sorted(entry.items(), key=itemgetter(1), reverse=True))
            entry = {token_id: entry[token_id], **best_first}
            entry = dict(zip(entry, finite_logprobs(entry.values()), strict=True))
        ordered.append(entry)
    return ordered


# SGLang -------------------------------------------------------------------------------------------------------------


def _generate_sglang(service: GatewayService, fields: Fields) -> Answer:
    params = fields.child("sampling_params")
    sampling = parse_sampling(params, _SGLANG_BOUNDS, _SGLANG_DEFAULT_TOKENS)
    fields.refuse("stream", "return_hidden_states", "top_logprobs_num", "token_ids_logprob", "image_data")
    fields.refuse("input_embeds", "lora_path")
    with_logprobs = fields.read("return_logprob", False)
    with_texts = fields.read("return_text_in_logprobs", False)
    start = fields.read("logprob_start_len", -1, Annotated[int, msgspec.Meta(ge=-1)])
    scores_prompt = with_logprobs and start >= 0
    fields.ignore("rid", "log_metrics", "bootstrap_host", "bootstrap_port", "bootstrap_room")
    if ("input_ids" in fields) == ("text" in fields):
        raise fields.error("input_ids", "send either input_ids or text")
    param = "input_ids" if "input_ids" in fields else "text"
    prompts, batched = service.codec.prompts(fields, param, str if param == "text" else TokenIds)
    scored = 0 if scores_prompt else None
    requests = service.requests(sampling, prompts, param=param, name=service.new_id(""), prompt_logprobs=scored)
    service.report_unread("/generate", fields, params)

    def rows(token_ids: Sequence[int], logprobs: Sequence[float | None]) -> list[tuple[float | None, int, str | None]]:
        """``[logprob, token id, text or null]`` per token."""
        texts = [service.codec.tokens[token_id][0] if with_texts else None for token_id in token_ids]
        return list(zip(logprobs, token_ids, texts, strict=True))

    def form(request: GenerationRequest, generation: Generation) -> dict[str, Any]:
        text, matched = service.codec.completion_text(generation.token_ids, generation.finish_reason, sampling)
        is_cut = generation.finish_reason == "length"
        why = {"length": len(generation.token_ids)} if is_cut else {"matched": matched}
        meta: dict[str, Any] = {
            "id": request.request_id,
            "finish_reason": {"type": generation.finish_reason, **why},
            "prompt_tokens": len(request.prompt_token_ids),
            "completion_tokens": len(generation.token_ids),
            "cached_tokens": 0,
            "weight_version": str(generation.policy_versions[-1]),
            "policy_version": generation.policy_versions[0],
            "policy_versions": list(generation.policy_versions),
        }
        if with_logprobs:
            meta["output_token_logprobs"] = rows(generation.token_ids, finite_logprobs(generation.logprobs))
            entries = _prompt_logprobs(request, generation) if scores_prompt else []
            values = [None if entry is None else next(iter(entry.values())) for entry in entries]
            prompt = request.prompt_token_ids[start:] if scores_prompt else ()
            meta["input_token_logprobs"] = rows(prompt, values[max(start, 0) :])
        return {"text": text, "output_ids": generation.token_ids, "meta_info": meta}

    async def answer() -> bytes:
        results = zip(requests, await service.generate(requests), strict=True)
        answers = [form(request, generation) for request, generations in results for generation in generations]
        return msgspec.json.encode(answers if batched or sampling.template.n > 1 else answers[0])

    return answer


# trl ----------------------------------------------------------------------------------------------------------------


def generate_trl(service: GatewayService, fields: Fields) -> Answer:
    """``POST /generate/``: texts in, ``completion_ids`` out, ``n`` per prompt in prompt order. 400 on a bad body."""
    if "prompts" not in fields:
        message = "missing; this is trl's dialect (/generate/ with a slash). vLLM's and SGLang's are at /generate"
        raise fields.error("prompts", message)
    sampling = parse_sampling(fields, _VLLM_BOUNDS, _VLLM_DEFAULT_TOKENS)
    fields.refuse("images", "generation_kwargs", "logprobs")
    prompts, _ = service.codec.prompts(fields, "prompts", str)
    requests = service.requests(sampling, prompts, param="prompts", name=service.new_id("trl-"))
    service.report_unread("/generate/", fields)

    async def answer() -> bytes:
        everything = [generation for generations in await service.generate(requests) for generation in generations]
        parts = {
            "prompt_ids": [request.prompt_token_ids for request in requests],
            "completion_ids": [generation.token_ids for generation in everything],
            "logprobs": [finite_logprobs(generation.logprobs) for generation in everything],
            **policy_fields(everything),
        }
        return msgspec.json.encode(parts)

    return answer
