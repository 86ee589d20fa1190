"""Conversations of a policy that does not always sample the tokenizer's own ids, and environments that see text.

Each environment renders its messages with a template and tokenises that, as upstream's ``tokenize_for_trainer``.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from atropos_verl.provenance.attribution import SequenceQuery
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.types import Generation

_PLAIN = """\
the answer is and of to number sum therefore because first then 12 7 345 x = + - * / ( ) . , ; : ! ? café
naïve 你好 世界 да нет 😀 ½ → ≠ שלום #include <vector> def return
"""
_ODD = ["\n", "\n\n", "\t", "\U0001f469\u200d\U0001f680", "e\u0301", "a\u0308", "print('hi')", ""]
_WORDS = [*_PLAIN.split(), *_ODD]
_ANSWERS = ("the answer", "345", " 345", "number 12.", "caf\u00e9")
_SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>")


def text_of(rng: random.Random, words: int) -> str:
    return "".join(rng.choice(_WORDS) + rng.choice(("", " ", " ", " ")) for _ in range(rng.randint(1, words)))


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """``bytes``: GPT-2's kind; ``composed``: the same behind NFC, as Qwen's; ``pieces``: SentencePiece's kind, with
    byte fallback."""
    backend = Tokenizer(models.BPE())
    if kind == "pieces":
        backend.normalizer = normalizers.Replace(" ", "\u2581")
        backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        backend.normalizer = normalizers.NFC() if kind == "composed" else None
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bytes")
        backend.decoder = decoders.ByteLevel()
    rng, alphabet = random.Random(0), [] if kind == "pieces" else pre_tokenizers.ByteLevel.alphabet()
    limits = {"vocab_size": 600, "max_token_length": 12, "limit_alphabet": 70 if kind == "pieces" else 1000}
    trainer = trainers.BpeTrainer(show_progress=False, initial_alphabet=alphabet, **limits)
    backend.train_from_iterator((text_of(rng, 30) for _ in range(1500)), trainer)
    if kind == "pieces":  # the trainer would make special tokens of these
        written = json.loads(backend.to_str())
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        written["model"]["vocab"] |= {name: backend.get_vocab_size() + number for number, name in enumerate(names)}
        written["model"]["byte_fallback"] = True
        backend = Tokenizer.from_str(json.dumps(written))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


class Template(NamedTuple):
    """Chat template: what stands before and behind a message, and before a completion."""

    eos: str
    before: Callable[[str], str]
    behind: Callable[[str], str]
    strips: bool = False

    def render(self, messages: list[tuple[str, str]], *, asks: bool = False) -> str:
        shown = [(role, text.strip() if self.strips else text) for role, text in messages]
        text = "".join(self.before(role) + text + self.behind(role) for role, text in shown)
        return text + (self.before("assistant").rstrip(" ") if asks else "")


TEMPLATES = {
    "chatml": Template("<|im_end|>", lambda role: f"<|im_start|>{role}\n", lambda _: "<|im_end|>\n"),
    "stripping": Template("</s>", lambda role: f"<s>{role}\n\n", lambda _: "</s>", strips=True),
    "plain": Template("</s>", lambda role: f"{role}: ", lambda _: "\n"),
    "marked": Template("</s>", lambda role: f"### {role}\n", lambda role: "\n\n" if role == "user" else "</s>\n"),
}


@dataclass
class Turn:
    """One completion, as it was sampled. ``text``: as the environment saw it, ``posted``: what it made of that."""

    prompt: list[int]
    ids: list[int]
    version: int
    logprobs: tuple[float, ...]
    text: str
    posted: str = ""

    @property
    def edited(self) -> bool:
        return self.posted.strip() != self.text.strip()


@dataclass
class Conversation:
    """``turns`` are those that are trained, in the order of the posted spans."""

    turns: list[Turn]
    tokens: list[int]
    mask: list[bool]

    def query(self, group: int) -> SequenceQuery:
        tokens, mask = np.array(self.tokens), np.array(self.mask)
        return SequenceQuery(token_ids=tokens, loss_mask=mask, group=group, is_text=True, has_advantages=True)


class Policy:
    """Samples what the tokenizer would not always have made of its text, and records it as a gateway does."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: Template, rng: random.Random) -> None:
        self.tokenizer, self.template, self.rng = tokenizer, template, rng
        self.ledger = Ledger()
        self.turns: list[Turn] = []

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def sample(self, prompt: list[int], text: str) -> Turn:
        rng, ids = self.rng, list[int]()
        for token in self.encode(text):
            alone = self.tokenizer.decode([token])
            if rng.random() < 0.15 and len(alone) > 1 and "\ufffd" not in alone:
                cut = rng.randrange(1, len(alone))
                ids += [*self.encode(alone[:cut]), *self.encode(alone[cut:])]
            else:
                ids.append(token)
        if rng.random() < 0.1:
            token = rng.randrange(len(self.tokenizer) - len(_SPECIAL))  # often a part of a character
            ids.insert(rng.randint(0, len(ids)), token)
        if rng.random() < 0.8 or not ids:
            ids.append(self.tokenizer.convert_tokens_to_ids(self.template.eos))
        version = rng.randrange(50)
        logprobs = tuple(float(np.float32(-rng.random())) for _ in ids)
        made = {"token_ids": tuple(ids), "logprobs": logprobs, "policy_version_runs": ((version, len(ids)),)}
        self.ledger.record(prompt, [Generation(**made, finish_reason="stop")])
        self.turns.append(Turn(prompt, ids, version, logprobs, self.tokenizer.decode(ids, skip_special_tokens=True)))
        return self.turns[-1]

    def converse(self, *, turns: int, last_only: bool) -> Conversation:
        """Tokenised with a template, and masked by the lengths of its prefixes, as ``tokenize_for_trainer`` does."""
        rng, messages, made = self.rng, list[tuple[str, str]](), list[Turn]()
        is_common = rng.random() < 0.2  # asked again and again, and answered in a few words
        for _ in range(turns):
            messages.append(("user", "the number?" if is_common else text_of(rng, 3)))
            prompt = self.encode(self.template.render(messages, asks=True))
            turn = self.sample(prompt, rng.choice(_ANSWERS) if is_common else text_of(rng, 8))
            turn.posted = turn.text
            if rng.random() < 0.05 and len(turn.text.strip()) > 2:
                at = rng.randrange(len(turn.text))
                turn.posted = turn.text[:at] + rng.choice(("", "q")) + turn.text[at + 1 :]
            messages.append(("assistant", turn.posted))
            made.append(turn)
        tokens = self.encode(self.template.render(messages))
        mask = [False] * len(tokens)
        for index in range(1, len(messages), 2):
            if not last_only or index == len(messages) - 1:
                start = len(self.encode(self.template.render(messages[:index], asks=True)))
                stop = len(self.encode(self.template.render(messages[: index + 1])))
                mask[start:stop] = [True] * len(tokens[start:stop])
        mask[0] = False
        return Conversation(made[-1:] if last_only else made, tokens, mask)


def conversations(kind: str, template: str, count: int, seed: int) -> Iterator[tuple[Policy, list[Conversation]]]:
    """Batches of 100, each with a policy and a ledger of its own; short texts make some equal."""
    rng = random.Random(f"{kind} {template} {seed}")
    for _ in range(0, count, 100):
        policy = Policy(tokenizer_of(kind), TEMPLATES[template], rng)
        settings = [(rng.randint(1, 8), rng.random() < 0.3) for _ in range(min(100, count))]
        yield policy, [policy.converse(turns=turns, last_only=last_only) for turns, last_only in settings]
