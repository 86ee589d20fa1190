"""Posted text gets back the ids that were sampled: by values, and over generated conversations."""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from support.conversations import TEMPLATES, Conversation, Policy, conversations, tokenizer_of
from support.ledgers import query, wrote

from atropos_verl.provenance.attribution import SequenceQuery, look_up
from atropos_verl.provenance.ledger import Ledger, trained_spans
from atropos_verl.provenance.repair import Repairer
from atropos_verl.token_texts import TokenTexts
from atropos_verl.types import UNKNOWN_VERSION, SequenceMatch

CONVERSATIONS = int(os.environ.get("ATROPOS_VERL_CONVERSATIONS", "500"))
"""100000 take about 20 minutes."""
TOKENIZER = tokenizer_of("bytes")
TEXTS = TokenTexts(TOKENIZER)
ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
BETWEEN = f"{END}\n<|im_start|>user\nand?{END}\n<|im_start|>assistant\n"


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def letters(text: str) -> list[int]:
    """Not what the tokenizer makes of it."""
    return [token for letter in text for token in encode(letter)]


class World:
    """A ledger, and what became of what is posted. ``written``: prompts and completions, of versions 3, 4, …"""

    def __init__(self, *written: tuple[str, list[int]]) -> None:
        self.ledger = Ledger()
        self.repairer = Repairer(self.ledger, TEXTS)
        for version, (prompt, ids) in enumerate(written, 3):
            self.wrote(prompt, ids, version)

    def wrote(self, prompt: str, ids: list[int], version: int = 3) -> None:
        self.ledger.record(encode(prompt), [wrote(ids, version)])

    def posts(self, *parts: str, has_advantages: bool = False) -> SequenceMatch:
        """Parts in turn not trained, trained, not trained, …, each tokenised by itself."""
        return self.found(query(*map(encode, parts), is_text=True, has_advantages=has_advantages))

    def found(self, sent: SequenceQuery) -> SequenceMatch:
        [match] = look_up(self.ledger, [sent], self.repairer)
        return match


def trained(match: SequenceMatch) -> list[list[int]]:
    assert match.repaired is not None
    return [match.repaired.token_ids[a:b].tolist() for a, b in trained_spans(match.repaired.loss_mask)]


def bare(text: str) -> str:
    return "".join(text.replace(END, "").split())


SPLIT = [*letters("the answer"), *encode(END)]
SECOND = (f"{ASKED}the answer{BETWEEN}", [*letters("number"), *encode(END)])


@pytest.mark.parametrize(
    ("written", "posted"),
    [
        pytest.param([(ASKED, SPLIT)], [f"the answer{END}\n"], id="the template's end of a turn is the sampled one"),
        pytest.param([(ASKED, SPLIT)], ["the answer"], id="the template leaves out the end of a turn"),
        pytest.param([(ASKED, SPLIT)], [f"the answer \n{END}"], id="and white space, which is added before it"),
        pytest.param(
            [(ASKED, [*letters(" the answer\n"), *encode(END)])], [f"the answer{END}\n"], id="white space was stripped"
        ),
        pytest.param([(ASKED, letters("the answer"))], [f"the answer{END}\n"], id="it was cut at its longest"),
        pytest.param([(ASKED, [*encode(END), *SPLIT])], [f"the answer{END}"], id="a special token was left out"),
        pytest.param([(ASKED, letters("the ")), (f"{ASKED}the ", letters("answer"))], ["the answer"], id="continued"),
        pytest.param([(ASKED, SPLIT), SECOND], [f"the answer{END}", BETWEEN[len(END) :], f"number{END}\n"], id="turns"),
    ],
)
def test_a_completion_gets_back_its_ids_versions_and_logprobs(
    written: list[tuple[str, list[int]]], posted: list[str]
) -> None:
    match = World(*written).posts(ASKED, *posted)
    spans = (len(posted) + 1) // 2
    assert (match.spans, match.unmatched_spans, match.unmatched_tokens, match.repaired_spans) == (spans, 0, 0, spans)
    assert match.repaired is not None
    mask, ids = match.repaired.loss_mask, match.repaired.token_ids
    expected = [wrote(tokens, version) for version, (_, tokens) in enumerate(written, 3)]
    assert ids[: len(encode(ASKED))].tolist() == encode(ASKED)
    assert ids[mask].tolist() == [token for made in expected for token in made.token_ids]
    assert match.versions[mask].tolist() == [made.policy_versions[0] for made in expected for _ in made.token_ids]
    assert match.logprobs[mask].tolist() == [logprob for made in expected for logprob in made.logprobs]
    text = TOKENIZER.decode(ids)
    assert bare(text) == bare(ASKED + "".join(posted))
    if spans == 2:
        assert text == ASKED + "".join(posted), "the text between stays"


@pytest.mark.parametrize(
    ("written", "asked", "posted", "ambiguous"),
    [
        *(
            (((ASKED, SPLIT),), ASKED, text + END, 0)
            for text in ("the Answer", "the answe", "the answer.", "the  answer", "he answer")
        ),
        (((ASKED, SPLIT),), ASKED.replace("hi", "ho"), f"the answer{END}", 0),
        # A mask over two turns is not taken for the second.
        (((ASKED, encode("the answer")), SECOND), ASKED, f"the answer{BETWEEN}number", 0),
        (((ASKED, SPLIT), SECOND), ASKED, f"the answer{BETWEEN}number", 0),
        # Which of two forms it was is not known.
        (((ASKED, letters("number")), (ASKED, [*letters("numb"), *encode("er")])), ASKED, "number", 1),
    ],
)
def test_another_text_and_one_of_several_forms_are_not_repaired(
    written: tuple[tuple[str, list[int]], ...], asked: str, posted: str, ambiguous: int
) -> None:
    match = World(*written).posts(asked, posted)
    assert match.repaired is None and match.repaired_spans == 0
    assert (match.unmatched_spans, match.ambiguous_texts) == (1, ambiguous)


def test_equal_ids_of_two_versions_have_none() -> None:
    match = World((ASKED, letters("number")), (ASKED, letters("number"))).posts(ASKED, "number")
    assert trained(match) == [letters("number")] and set(match.versions.tolist()) == {UNKNOWN_VERSION}


@pytest.mark.parametrize("sampled", [SPLIT, [*encode("\n"), *letters("the answer\n")]])
def test_what_a_template_strips_has_the_advantage_of_its_turn(sampled: list[int]) -> None:
    match = World((ASKED, sampled)).posts(ASKED, "the answer", "\nmore", has_advantages=True)
    assert trained(match) == [sampled]
    before, turn = len(encode(ASKED)), len(encode("the answer"))
    assert set(match.repaired.origin[match.repaired.loss_mask]) <= set(range(before, before + turn))


def test_a_merge_over_the_border_of_a_turn() -> None:
    """The prompt's last newline and the completion's first are one token of the posted text."""
    assert len(encode("x:\n\n")) < len(encode("x:\n")) + 1
    sampled = [*encode("\n"), *letters("the answer")]
    match = World(("x:\n", sampled)).posts("x:\n\n", "the answer\n")
    assert trained(match) == [sampled]
    assert match.repaired.token_ids[: len(encode("x:\n"))].tolist() == encode("x:\n")


def test_parts_of_characters_are_found_by_what_the_environment_saw() -> None:
    broken = [*letters("caf"), encode("\u4f60")[0], *encode(END)]
    text = TOKENIZER.decode(broken, skip_special_tokens=True)
    assert text == "caf\ufffd"
    world = World((ASKED, broken))
    assert trained(world.posts(ASKED, text + END)) == [broken]
    half = next(token for token in range(len(TOKENIZER)) if TEXTS[token][1] == b"\xd1")
    other = [*letters("caf"), half]  # an edit of ids: not what a text would be tokenised into
    assert TOKENIZER.decode(other) == text
    assert world.found(query(encode(ASKED), other, is_text=True)).repaired is None


def test_what_the_ledger_forgets_is_forgotten_here() -> None:
    world = World()
    world.ledger.max_spans = 2
    for version, answer in enumerate(("number", "the answer", "first", "then")):
        world.wrote(ASKED, letters(answer), version)
        world.posts(ASKED, "nothing")
    assert world.posts(ASKED, "number").repaired is None
    assert world.posts(ASKED, "first").repaired_spans == 1
    for version in range(40):
        world.wrote(f"{version}", letters("number"))
        world.wrote(f"{version}", letters("first"))
        world.posts(f"{version}", "number.")
    assert len(world.repairer._written) <= 4 and world.posts(ASKED, "first").repaired is None
    for version in range(40):
        world.wrote("39", letters("then"), version)
        world.posts("39", "number.")
    known = [one for alike in world.repairer._written.values() for one in alike.values() if one.prompt.spans]
    assert [sum(map(len, one.completions.values())) <= 10 for one in known] == [True]
    assert world.posts("39", "then").repaired_spans == 1


def form_of(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())


def outcomes(policy: Policy, posted: Sequence[Conversation], matches: Sequence[SequenceMatch]) -> Counter[str]:
    """Checks that no span has wrong ids. Counts what became of those whose text was not edited, and was sampled with
    these ids only."""
    ids_of: defaultdict[tuple[str, str], list[list[int]]] = defaultdict(list)
    for turn in policy.turns:
        ids_of[policy.tokenizer.decode(turn.prompt), form_of(turn.text)].append(turn.ids)
    counts: Counter[str] = Counter()
    for conversation, match in zip(posted, matches, strict=True):
        mask, ids = np.array(conversation.mask), np.array(conversation.tokens)
        before = trained_spans(mask)
        if (repaired := match.repaired) is not None:
            mask, ids, origin = repaired.loss_mask, repaired.token_ids, repaired.origin
            assert repaired.posted == len(conversation.tokens)
            assert origin is not None and len(origin) == len(ids) == len(match.found)
            assert (np.diff(origin) >= 0).all() and origin[0] >= 0 and origin[-1] < len(conversation.tokens)
        after = trained_spans(mask)
        assert len(before) == len(after) == len(conversation.turns) == match.spans
        for (a, b), (start, stop), turn in zip(before, after, conversation.turns, strict=True):
            known = ids[start:stop][match.found[start:stop]].tolist()
            alike = ids_of.get((policy.tokenizer.decode(turn.prompt), form_of(turn.posted)), [])
            is_clear = not turn.edited and all(other == turn.ids for other in alike)
            if not known:
                counts["left"] += is_clear
            elif known == conversation.tokens[a:b][: len(known)]:
                counts["as posted"] += is_clear
            elif turn.edited:  # now and then into what was written elsewhere
                assert alike and all(other == known for other in alike)
            else:
                assert known == turn.ids
                counts["repaired"] += is_clear
                if len(alike) == 1:  # else it may be the other one's, or unknown
                    assert match.versions[start:stop].tolist() == [turn.version] * len(known)
                    assert match.logprobs[start:stop].tolist() == list(turn.logprobs)
    return counts


@pytest.mark.parametrize("kind", ["bytes", "composed", "pieces"])
def test_generated_conversations(kind: str) -> None:
    """Never wrong ids; and of what is unambiguous nearly all."""
    texts, total = TokenTexts(tokenizer_of(kind)), Counter[str]()
    for template in TEMPLATES:
        for policy, posted in conversations(kind, template, -(-CONVERSATIONS // (3 * len(TEMPLATES))), 0):
            queries = [conversation.query(number) for number, conversation in enumerate(posted)]
            total += outcomes(policy, posted, look_up(policy.ledger, queries, Repairer(policy.ledger, texts)))
    assert total["repaired"] > 100 and total["repaired"] / (total["repaired"] + total["left"]) >= 0.995, total
