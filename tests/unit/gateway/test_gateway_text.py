"""Text of completions: stop strings, special tokens, and pieces of a stream that join to the whole."""

import random

import pytest
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.gateway.fields import Fields, Sampling, parse_sampling
from atropos_verl.gateway.text import StreamText, TextCodec, cut_at_stop

EOS = 258


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(build_tiny_tokenizer(), frozenset({EOS}))


def plain(**fields: object) -> Sampling:
    return parse_sampling(Fields(fields), max_tokens_names=("max_tokens",), max_tokens_default=None)


def test_completion_text_follows_vllm(codec: TextCodec) -> None:
    hi = [71, 72]  # "hi": byte - 33
    assert codec.completion_text([*hi, EOS], "stop", plain()) == ("hi", EOS)
    # vLLM leaves the stop token out of the text even when special tokens are shown
    assert codec.completion_text([*hi, EOS], "stop", plain(skip_special_tokens=False)) == ("hi", EOS)
    shown = plain(skip_special_tokens=False, include_stop_str_in_output=True)
    assert codec.completion_text([*hi, EOS], "stop", shown) == ("hi<|im_end|>", EOS)
    # a stop token the client asked for is left out though it is an ordinary letter
    assert codec.completion_text(hi, "stop", plain(stop_token_ids=[72])) == ("h", 72)
    assert codec.completion_text(hi, "length", plain(stop_token_ids=[72])) == ("hi", None)
    # the earliest stop string
    assert codec.completion_text(hi, "stop", plain(stop=["i", "h"])) == ("", "h")
    assert codec.completion_text(hi, "stop", plain(stop=["h"], include_stop_str_in_output=True)) == ("h", "h")
    assert codec.completion_text(hi, "stop", plain(stop=["j"])) == ("hi", None)
    assert codec.completion_text([*hi, EOS], "length", plain(ignore_eos=True, skip_special_tokens=False)) == (
        "hi<|im_end|>",
        None,
    )


def test_tokens_that_are_no_text_have_their_bytes() -> None:
    """SentencePiece names bytes, and its decoders drop the space at the start of a text."""

    class Sentences:
        names = ("<0xE6>", "\u2581the", "the", "\u0120the", None)

        def convert_ids_to_tokens(self, token_id: int) -> str | None:
            return self.names[token_id]

        def decode(self, token_ids: list[int], **_: bool) -> str:
            return "\ufffd" if token_ids == [0] else "the"

    codec = TextCodec(Sentences(), frozenset())
    assert [codec.tokens[token_id] for token_id in (0, 1, 2, 4)] == [
        ("\ufffd", b"\xe6"),
        (" the", b" the"),
        ("the", b"the"),
        ("the", b"the"),
    ]


def test_stream_holds_back_half_a_character_and_a_possible_stop_string(codec: TextCodec) -> None:
    stream = StreamText(codec, plain(stop=["</a>"]))
    ids = codec.encode("é</b></a>", add_special_tokens=False)
    assert len(ids) == 10  # é is two bytes
    pieces = [stream.push([token_id], None) for token_id in ids[:-1]]
    #          é (1st, 2nd byte)  <   /   b      >    <   /   a: begins the stop string until b comes
    assert pieces == ["", "é", "", "", "</b", ">", "", "", ""]
    assert stream.push([ids[-1]], "stop") == ""


def test_stream_pieces_join_to_the_whole_text(codec: TextCodec) -> None:
    rng = random.Random(0)
    alphabet = ["a", "b", "é", "漢", "🙂", "<", "/", "<|im_start|>", "\n"]
    for case in range(300):
        if case % 3:
            text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 40)))
            ids = list(codec.encode(text, add_special_tokens=False))
        else:
            ids = [rng.randrange(259) for _ in range(rng.randrange(1, 200))]  # mostly bytes that are no UTF-8
        finish = rng.choice(["stop", "length"])
        sampling = plain(stop=rng.choice([[], ["b/"], ["ab", "é<"], ["🙂"]]))
        if finish == "stop" and sampling.template.stop:  # an engine stops at the stop string: cut the tokens after it
            whole = codec.decode(ids, skip_special_tokens=True)
            _, found = cut_at_stop(whole, sampling.template.stop, include_stop=False)
            if found is not None:
                ends = (k for k in range(1, len(ids) + 1) if found in codec.decode(ids[:k], skip_special_tokens=True))
                ids = ids[: next(ends)]
        expected, _ = codec.completion_text(ids, finish, sampling)  # type: ignore[arg-type]
        stream, pieces, start = StreamText(codec, sampling), [], 0
        while start < len(ids):
            width = rng.randrange(1, 4)
            last = start + width >= len(ids)
            pieces.append(stream.push(ids[start : start + width], finish if last else None))  # type: ignore[arg-type]
            start += width
        assert "".join(pieces) == expected, (case, ids, sampling.template.stop, finish)


def test_endless_invalid_bytes_are_not_held_back_for_ever(codec: TextCodec) -> None:
    stream = StreamText(codec, plain())
    invalid = 97  # a lone continuation byte
    assert codec.decode([invalid], skip_special_tokens=False) == "\ufffd"
    pieces = [stream.push([invalid], None) for _ in range(130)]
    assert sum(len(piece) for piece in pieces) == 128  # two windows of 64 were given up
    assert stream.push([invalid], "length") == "\ufffd" * 3
