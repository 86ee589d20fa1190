"""What the store of prefixes finds, forgets and drops."""

from hypothesis import given
from hypothesis import strategies as st

from atropos_verl.engine.kv_cache import BLOCK, WORTH_STORING, PrefixIndex

_CONTEXT = st.lists(st.sampled_from([0, 1]), min_size=1, max_size=12).map(
    lambda bits: tuple(bit for bit in bits for _ in range(WORTH_STORING // 4))
)


def tokens(*parts: tuple[int, int]) -> tuple[int, ...]:
    """Tokens of one value after another: (value, count)."""
    return tuple(value for value, count in parts for _ in range(count))


@given(st.lists(_CONTEXT, max_size=12), st.integers(WORTH_STORING // BLOCK, 60))
def test_what_is_found_is_what_was_stored(contexts: list[tuple[int, ...]], capacity: int) -> None:
    """Each block holds the tokens that it is found for, whatever was dropped; within the capacity all are found."""
    index, content = PrefixIndex(), dict[int, tuple[int, ...]]()
    for context in contexts:
        start, blocks = index.add(context, 0, capacity)
        for number, block in enumerate(blocks):
            content[block] = context[: start + (number + 1) * BLOCK]
        for other in contexts:
            found = index.find(other)
            assert [content[block] for block in found] == [other[: end * BLOCK] for end in range(1, len(found) + 1)]
        found = index.find((*context, 2))
        assert len(found) == (min(len(context) // BLOCK, capacity) if len(context) >= WORTH_STORING else 0)
    assert set(content) <= set(range(capacity))


def test_the_end_of_what_was_used_least_recently_is_dropped_first() -> None:
    index = PrefixIndex()
    first, second = tokens((1, 64)), tokens((2, 64))
    index.add(first, 0, capacity=40)
    index.add(second, 0, capacity=40)
    index.find((*first, 0))
    index.add(tokens((3, 64)), 0, capacity=40)  # 16 blocks, of which 8 are free
    assert len(index.find((*first, 0))) == 16
    assert len(index.find((*second, 0))) == 8


def test_what_follows_a_dropped_block_is_not_found_after_the_one_in_its_place() -> None:
    index = PrefixIndex()
    index.add(tokens((1, 32), (5, 32)), 0, capacity=16)
    index.add(tokens((2, 64)), 0, capacity=16)
    index.add(tokens((1, 32), (6, 4)), 0, capacity=16)
    assert len(index.find(tokens((1, 32), (5, 32)))) == 8


def test_what_is_kept_over_a_change_of_weights_outlives_one() -> None:
    index, context = PrefixIndex(), tokens((1, 64))
    index.add(context, 0, capacity=32)
    index.age()
    assert len(index.find((*context, 0))) == 16
    index.add(tokens((1, 64), (2, 32)), 0, capacity=32)  # computed on top of it
    index.age()
    assert index.find((*context, 0)) == []
    assert index.add(context, 0, capacity=32) == (0, [])  # in a slot for two changes
    assert index.add(context, 1, capacity=32)[1] != []
