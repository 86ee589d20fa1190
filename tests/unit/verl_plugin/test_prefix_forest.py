"""Forests of shared prefixes against the plain definition: each token sees what is before it in its own sequence."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atropos_verl.verl_plugin import prefix_forest
from atropos_verl.verl_plugin.prefix_forest import build_forest, fill, partition, sort_by_prefix

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=25), min_size=1, max_size=14)


@settings(max_examples=200, deadline=None)
@given(rows=SEQUENCES, dense=st.sampled_from([4, 16, 256]))
def test_every_token_sees_its_own_sequence_and_nothing_else(rows: list[list[int]], dense: int) -> None:
    sequences = [np.array(row) for row in rows]
    flat, size = np.concatenate(sequences), dense // 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_forest, "DENSE_TOKENS", dense)
        patch.setattr(prefix_forest, "FLEX_BLOCK", size)
        forest = build_forest(sequences)
        blocks = forest.block_mask(torch.device("cpu"))
    assert (flat[forest.first][forest.place] == flat).all()
    assert len(forest.first) == len({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)})
    sees = np.zeros((len(forest.first), len(forest.first)), dtype=np.bool_)
    for place in np.split(forest.place, np.cumsum([len(row) for row in rows])[:-1]):
        for at, token in enumerate(place):
            sees[token, place[: at + 1]] = True
    assert [call.start for call in forest.calls] == [0, *(call.end for call in forest.calls[:-1])]
    for call in forest.calls:
        calls = [*(forest.calls[at] for at in call.above), call]
        keys = np.concatenate([np.arange(one.start, one.end) for one in calls])
        length = call.end - call.start
        assert call.mask is None or length <= dense
        inside = np.tri(length, dtype=np.bool_) if call.mask is None else call.mask.numpy()
        said = np.zeros((length, len(sees)), dtype=np.bool_)
        said[:, keys] = np.concatenate([np.ones((length, len(keys) - length), dtype=np.bool_), inside], axis=1)
        assert (said == sees[call.start : call.end]).all()
    at = torch.arange(len(sees))
    assert (blocks.mask_mod(0, 0, at[:, None], at[None]).numpy() == sees).all()
    for query, key in np.ndindex(blocks.kv_indices.shape[-2:]):
        tile = sees[query * size :, key * size :][:size, :size]
        is_whole = tile.all() and key < query and len(tile) == size
        for table, counts, wanted in (
            (blocks.full_kv_indices, blocks.full_kv_num_blocks, is_whole),
            (blocks.kv_indices, blocks.kv_num_blocks, tile.any() and not is_whole),
        ):
            assert (key in table[0, 0, query, : counts[0, 0, query]]) == wanted


def test_answers_of_a_prompt_are_one_call() -> None:
    assert len(build_forest([np.array([7, 7, 7, 7, *answer]) for answer in ([1, 2], [1, 3], [5])]).calls) == 1


@settings(deadline=None)
@given(rows=SEQUENCES, count=st.integers(1, 6))
def test_parts_hold_every_sequence_and_the_largest_is_as_small_as_cuts_allow(rows: list[list[int]], count: int) -> None:
    order, shared = sort_by_prefix([np.array(row) for row in rows])
    lengths = [len(rows[at]) for at in order]
    parts = partition(lengths, shared, count)
    assert len(parts) == count
    assert list(itertools.chain(*parts)) == list(range(len(rows)))
    assert sum(bool(part) for part in parts) == min(count, len(rows))

    def distinct(part: list[int]) -> int:
        return lengths[part[0]] + sum(lengths[at] - shared[at] for at in part[1:]) if part else 0

    cuts = itertools.combinations(range(1, len(rows)), min(count, len(rows)) - 1)
    borders = ([0, *cut, len(rows)] for cut in cuts)
    best = min(max(distinct(list(range(a, b))) for a, b in itertools.pairwise(border)) for border in borders)
    assert max(map(distinct, parts)) == best
    assert len(fill(lengths, shared, best)) <= count
