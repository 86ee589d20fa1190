"""Posted text gets back the ids that were sampled: by values, and over generated conversations."""

import logging
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from support.conversations import TEMPLATES, Conversation, Policy, conversations, tokenizer_of

from atropos_verl.provenance.attribution import SequenceQuery, look_up
from atropos_verl.provenance.ledger import Ledger, trained_spans
from atropos_verl.provenance.repair import Repairer
from atropos_verl.token_texts import TokenTexts
from atropos_verl.types import UNKNOWN_VERSION, Generation, SequenceMatch

logger = logging.getLogger(__name__)
CONVERSATIONS = int(os.environ.get("ATROPOS_VERL_CONVERSATIONS", "500"))
"""100000 take about 20 minutes; with ``--log-cli-level=INFO`` the test says what it counted."""
TOKENIZER = tokenizer_of("bytes")
TEXTS = TokenTexts(TOKENIZER)
ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
U = UNKNOWN_VERSION


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def letters(text: str) -> list[int]:
    """Not what the tokenizer makes of it."""
    return [token for letter in text for token in encode(letter)]


class World:
    """A ledger, and what became of what is posted."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.repairer = Repairer(self.ledger, TEXTS)

    def wrote(self, prompt: str | list[int], ids: list[int], version: int = 3) -> None:
        made = Generation(
            token_ids=tuple(ids),
            logprobs=tuple(-1 - k / 8 for k in range(len(ids))),
            finish_reason="stop",
            policy_version_runs=((version, len(ids)),),
        )
        self.ledger.record(encode(prompt) if isinstance(prompt, str) else prompt, [made])

    def posts(self, *parts: str, is_text: bool = True, has_advantages: bool = False) -> SequenceMatch:
        """Parts in turn not trained, trained, not trained, …, each tokenised by itself."""
        rows = [encode(part) for part in parts]
        mask = [bool(index % 2) for index, row in enumerate(rows) for _ in row]
        ids = np.array([token for row in rows for token in row])
        query = SequenceQuery(token_ids=ids, loss_mask=np.array(mask), is_text=is_text, has_advantages=has_advantages)
        [match] = look_up(self.ledger, [query], self.repairer)
        return match


def trained(match: SequenceMatch) -> list[list[int]]:
    assert match.repaired is not None
    return [match.repaired.token_ids[a:b].tolist() for a, b in trained_spans(match.repaired.loss_mask)]


SPLIT = [*letters("the answer"), *encode(END)]


@pytest.mark.parametrize(
    ("sampled", "behind"),
    [
        pytest.param(SPLIT, END + "\n", id="the template's end of a turn is the sampled one"),
        pytest.param(SPLIT, "", id="the template leaves out the end of a turn"),
        pytest.param(SPLIT, " \n" + END, id="and white space, which is added before it"),
        pytest.param([*letters(" the answer\n"), *encode(END)], END + "\n", id="white space was stripped"),
        pytest.param(letters("the answer"), END + "\n", id="it was cut at its longest"),
        pytest.param([*encode(END), *SPLIT], END, id="a special token in front was left out"),
    ],
)
def test_a_completion_gets_back_its_ids_versions_and_logprobs(sampled: list[int], behind: str) -> None:
    world = World()
    world.wrote(ASKED, sampled)
    match = world.posts(ASKED, "the answer" + behind)
    assert (match.spans, match.unmatched_spans, match.unmatched_tokens, match.repaired_spans) == (1, 0, 0, 1)
    assert trained(match) == [sampled]
    assert match.repaired is not None
    count = len(encode(ASKED))
    assert match.repaired.token_ids[: count + len(sampled)].tolist() == [*encode(ASKED), *sampled]
    assert match.versions.tolist()[count : count + len(sampled)] == [3] * len(sampled)
    np.testing.assert_array_equal(
        match.logprobs[count : count + len(sampled)], [-1 - k / 8 for k in range(len(sampled))]
    )
    text = TOKENIZER.decode(match.repaired.token_ids)
    assert text.replace(" ", "").replace("\n", "").replace(END, "") == (ASKED + "the answer").replace(" ", "").replace(
        "\n", ""
    ).replace(END, "")


def test_every_turn_is_repaired_and_the_text_between_stays() -> None:
    world = World()
    again = f"{ASKED}the answer{END}\n<|im_start|>user\nand?{END}\n<|im_start|>assistant\n"
    world.wrote(ASKED, SPLIT, 3)
    second = [*letters("number"), *encode(END)]
    world.wrote(again, second, 4)
    match = world.posts(ASKED, f"the answer{END}", again.removeprefix(f"{ASKED}the answer{END}"), f"number{END}\n")
    assert trained(match) == [SPLIT, second]
    assert match.repaired is not None and TOKENIZER.decode(match.repaired.token_ids) == f"{again}number{END}\n"
    assert match.versions[match.repaired.loss_mask].tolist() == [3] * len(SPLIT) + [4] * len(second)


@pytest.mark.parametrize("first", [encode("the answer"), SPLIT], ids=["posted as it was written", "split"])
def test_a_mask_over_two_turns_is_not_taken_for_the_second(first: list[int]) -> None:
    world = World()
    between = f"{END}\n<|im_start|>user\nand?{END}\n<|im_start|>assistant\n"
    world.wrote(ASKED, first, 3)
    world.wrote(f"{ASKED}the answer{between}", letters("number"), 4)
    match = world.posts(ASKED, f"the answer{between}number")
    assert match.repaired is None and (match.repaired_spans, match.unmatched_spans) == (0, 1)


@pytest.mark.parametrize("sampled", [SPLIT, [*encode("\n"), *letters("the answer\n")]])
def test_what_a_template_strips_has_the_advantage_of_its_turn(sampled: list[int]) -> None:
    world = World()
    world.wrote(ASKED, sampled)
    match = world.posts(ASKED, "the answer", "\nmore", has_advantages=True)
    assert trained(match) == [sampled] and match.repaired is not None and match.repaired.origin is not None
    before, turn = len(encode(ASKED)), len(encode("the answer"))
    origin = match.repaired.origin[match.repaired.loss_mask]
    assert ((origin >= before) & (origin < before + turn)).all()


def test_a_merge_over_the_border_of_a_turn() -> None:
    """The prompt's last newline and the completion's first are one token of the posted text."""
    world = World()
    sampled = [*encode("\n"), *letters("the answer")]
    assert len(encode("x:\n\n")) < len(encode("x:\n")) + 1
    world.wrote("x:\n", sampled)
    match = world.posts("x:\n\n", "the answer\n")
    assert trained(match) == [sampled]
    assert match.repaired is not None
    assert match.repaired.token_ids[: len(encode("x:\n"))].tolist() == encode("x:\n")


def test_a_generation_that_was_continued() -> None:
    world = World()
    world.wrote(ASKED, letters("the "), 3)
    world.wrote(f"{ASKED}the ", letters("answer"), 4)
    match = world.posts(ASKED, "the answer")
    assert trained(match) == [letters("the answer")]
    assert match.versions[-len("the answer") :].tolist() == [3] * 4 + [4] * 6


def test_parts_of_characters_are_found_by_what_the_environment_saw() -> None:
    world = World()
    broken = [*letters("caf"), encode("\u4f60")[0], *encode(END)]
    text = TOKENIZER.decode(broken, skip_special_tokens=True)
    assert text == "caf\ufffd"
    world.wrote(ASKED, broken)
    assert trained(world.posts(ASKED, text + END)) == [broken]
    half = next(token for token in range(len(TOKENIZER)) if TEXTS[token][1] == b"\xd1")
    other = [*letters("caf"), half]  # an edit of ids: not what a text would be tokenised into
    assert TOKENIZER.decode(other) == text
    mask = np.arange(len(encode(ASKED)) + 4) >= len(encode(ASKED))
    query = SequenceQuery(token_ids=np.array([*encode(ASKED), *other]), loss_mask=mask, is_text=True)
    assert look_up(world.ledger, [query], world.repairer)[0].repaired is None


def test_two_texts_with_different_ids_are_not_repaired_and_equal_ids_of_two_versions_have_none() -> None:
    world = World()
    world.wrote(ASKED, letters("number"), 3)
    world.wrote(ASKED, letters("number"), 5)
    match = world.posts(ASKED, "number")
    assert trained(match) == [letters("number")] and set(match.versions.tolist()) == {U}
    world.wrote(ASKED, [*letters("numb"), *encode("er")], 5)
    match = world.posts(ASKED, "number")
    assert match.repaired is None and (match.unmatched_spans, match.ambiguous_texts) == (1, 1)


@pytest.mark.parametrize("posted", ["the Answer", "the answe", "the answer.", "the  answer", "he answer"])
def test_one_other_character_inside_a_span_repairs_nothing(posted: str) -> None:
    world = World()
    world.wrote(ASKED, SPLIT)
    match = world.posts(ASKED, posted + END)
    assert match.repaired is None and (match.unmatched_spans, match.ambiguous_texts) == (1, 0)
    match = world.posts(ASKED.replace("hi", "ho"), "the answer" + END)
    assert match.repaired is None and match.unmatched_spans == 1


def test_ids_that_the_environment_sent_values_of_stay() -> None:
    world = World()
    world.wrote(ASKED, SPLIT)
    assert world.posts(ASKED, "the answer" + END, is_text=False).repaired is None


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
    """What became of each posted span. ``text``: its text was not edited, and was sampled with these ids only."""
    ids_of: defaultdict[tuple[str, str], list[list[int]]] = defaultdict(list)
    for turn in policy.turns:
        ids_of[policy.tokenizer.decode(turn.prompt), form_of(turn.text)].append(turn.ids)
    counts: Counter[str] = Counter()
    for conversation, match in zip(posted, matches, strict=True):
        before = trained_spans(np.array(conversation.mask))
        mask, ids = np.array(conversation.mask), np.array(conversation.tokens)
        if match.repaired is not None:
            mask, ids = match.repaired.loss_mask, match.repaired.token_ids
            assert match.repaired.origin is not None and match.repaired.posted == len(conversation.tokens)
            assert len(match.repaired.origin) == len(ids) == len(match.found)
            assert (np.diff(match.repaired.origin) >= 0).all()
            assert match.repaired.origin[0] >= 0 and match.repaired.origin[-1] < len(conversation.tokens)
        after = trained_spans(mask)
        assert len(before) == len(after) == len(conversation.turns) == match.spans
        for (a, b), (start, stop), turn in zip(before, after, conversation.turns, strict=True):
            known = ids[start:stop][match.found[start:stop]].tolist()
            as_posted = conversation.tokens[a:b][: len(known)] == known
            alike = ids_of.get((policy.tokenizer.decode(turn.prompt), form_of(turn.posted)), [])
            kind = "text" if all(other == turn.ids for other in alike) else "ambiguous"
            if turn.edited:  # now and then into what was written elsewhere
                kind = "edited into another's" if alike else "edited"
            if not known:
                counts[f"{kind}, left"] += 1
            elif as_posted:
                counts[f"{kind}, as posted"] += 1
            elif kind == "edited into another's" and all(other == known for other in alike):
                counts[f"{kind}, repaired"] += 1
            elif known == turn.ids and not turn.edited:
                counts[f"{kind}, repaired"] += 1
                versions = match.versions[start:stop].tolist()
                if len(alike) == 1:  # else it may be the other one's, or unknown
                    assert versions == [turn.version] * len(known)
                    assert match.logprobs[start:stop].tolist() == list(turn.logprobs)
            else:
                counts[f"{kind}, WRONG"] += 1
    return counts


@pytest.mark.parametrize("kind", ["bytes", "composed", "pieces"])
def test_generated_conversations(kind: str) -> None:
    """Never wrong ids; and of what is unambiguous nearly all."""
    texts = TokenTexts(tokenizer_of(kind))
    total: Counter[str] = Counter()
    for template in TEMPLATES:
        counts: Counter[str] = Counter()
        for policy, posted in conversations(kind, template, -(-CONVERSATIONS // (3 * len(TEMPLATES))), 0):
            repairer = Repairer(policy.ledger, texts)
            queries = [conversation.query(number) for number, conversation in enumerate(posted)]
            counts += outcomes(policy, posted, look_up(policy.ledger, queries, repairer))
        logger.info("%s %s %s", kind, template, dict(sorted(counts.items())))
        total += counts
    assert not [name for name in total if name.endswith("WRONG")], total
    lost, found = total["text, left"], total["text, repaired"]
    assert found > 100 and found / (found + lost) >= 0.995, total
