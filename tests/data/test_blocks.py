"""Properties of the strategies, on token numbers that are all different, so that every one can be traced."""

from collections import Counter
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olive.config.workflow import PreProcess
from olive.data.blocks import Block, arrange, build, settings_missing
from olive.data.tokens import IGNORE, Encoded
from olive.errors import ConfigError

JOINER = [-7, -8]


def rows_of(lengths: list[int], masked: int = 0) -> list[Encoded]:
    """Rows whose token numbers count up from 1 through the whole data; the first ``masked`` have no label."""
    rows, start = [], 1
    for length in lengths:
        ids = list(range(start, start + length))
        hidden = min(masked, length)
        rows.append(Encoded(ids, [IGNORE] * hidden + ids[hidden:]))
        start += length
    return rows


def pre(strategy: str, limit: int, **settings: object) -> PreProcess:
    return PreProcess.model_validate({"strategy": strategy, "max_seq_len": limit, **settings})


def check_shape(block: Block, limit: int) -> None:
    assert len(block.ids) == len(block.labels) == sum(block.lengths) <= limit
    assert all(label in (IGNORE, token) for token, label in zip(block.ids, block.labels, strict=True))


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=40)
limits = st.integers(2, 40)


@given(lengths, limits)
def test_join_takes_every_token_once_but_a_tail_shorter_than_a_block(sizes: list[int], limit: int) -> None:
    rows = rows_of(sizes)
    stream = [token for row in rows for token in (*JOINER, *row.ids)][len(JOINER) :]
    if len(stream) < limit:
        with pytest.raises(ConfigError, match="makes no block"):
            arrange(rows, pre("join", limit), JOINER)
        return
    blocks = arrange(rows, pre("join", limit), JOINER).blocks
    taken = [token for block in blocks for token in block.ids]
    assert taken == stream[: len(taken)]
    assert len(stream) - len(taken) < limit
    for block in blocks:
        assert block.ids == block.labels
        assert block.lengths == (limit,)


@pytest.mark.parametrize(("tokens", "expected"), [(8, 1), (15, 1), (16, 2), (17, 2), (24, 3)])
def test_join_keeps_the_exact_final_block(tokens: int, expected: int) -> None:
    assert len(arrange(rows_of([tokens]), pre("join", 8), [])) == expected


@given(lengths, limits, st.data())
def test_sliding_windows_count_every_label_exactly_once(
    sizes: list[int], limit: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, limit))
    rows = rows_of(sizes)
    if sum(sizes) < 2:
        return
    blocks = arrange(rows, pre("join-sliding-window", limit, stride=stride), []).blocks
    counted = Counter(label for block in blocks for label in block.labels if label != IGNORE)
    last = blocks[-1].ids[-1]
    # A final window of one single new token has a label but no room is lost: the last token is always there.
    assert last == sum(sizes)
    assert set(counted.values()) == {1}
    assert sorted(counted) == list(range(1, sum(sizes) + 1))
    assert blocks[0].labels == blocks[0].ids
    for before, after in pairwise(blocks):
        check_shape(after, limit)
        overlap = [label == IGNORE for label in after.labels].count(True)
        assert after.labels[:overlap] == [IGNORE] * overlap
        assert after.ids[:overlap] == before.ids[len(before.ids) - overlap :]
        assert overlap >= limit - stride


def test_sliding_window_by_hand() -> None:
    blocks = arrange(rows_of([10]), pre("join-sliding-window", 4, stride=2), []).blocks
    assert [block.ids for block in blocks] == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8], [7, 8, 9, 10]]
    assert [block.labels for block in blocks][1] == [IGNORE, IGNORE, 5, 6]


@given(lengths, limits)
def test_pack_holds_every_document_whole_in_one_block(sizes: list[int], limit: int) -> None:
    rows = rows_of(sizes)
    if all(min(size, limit) < 2 for size in sizes):
        with pytest.raises(ConfigError, match="nothing would be learnt"):
            arrange(rows, pre("pack", limit), [])
        return
    packed = arrange(rows, pre("pack", limit), [])
    documents = []
    for block in packed:
        check_shape(block, limit)
        ends = list(accumulate(block.lengths))
        for end, length in zip(ends, block.lengths, strict=True):
            documents.append(tuple(block.ids[end - length : end]))
            assert block.labels[end - length] == IGNORE
            assert block.labels[end - length + 1 : end] == block.ids[end - length + 1 : end]
            assert block.positions[end - length : end] == list(range(length))
    assert sorted(documents) == sorted(tuple(row.ids[:limit]) for row in rows if min(len(row.ids), limit) > 1)


@given(lengths, limits)
def test_line_by_line_cuts_and_keeps_order(sizes: list[int], limit: int) -> None:
    if max(sizes) < 2:
        return
    rows = rows_of(sizes)
    blocks = arrange(rows, pre("line-by-line", limit), []).blocks
    assert [block.ids for block in blocks] == [row.ids[:limit] for row in rows if len(row.ids) > 1]


def test_drop_short_sequences() -> None:
    rows = rows_of([3, 8, 9, 2])
    blocks = arrange(rows, pre("line-by-line", 8, drop_short_sequences=True), []).blocks
    assert [len(block.ids) for block in blocks] == [8, 8]
    with pytest.raises(ConfigError, match="max_seq_len to 9 or less"):
        arrange(rows, pre("line-by-line", 10, drop_short_sequences=True), [])


@given(lengths, limits, st.integers(0, 99), st.integers(1, 12))
def test_join_random_never_gives_a_short_block(sizes: list[int], limit: int, seed: int, samples: int) -> None:
    rows = rows_of(sizes)
    total = sum(sizes) + len(JOINER) * (len(sizes) - 1)
    wanted = pre("join-random", limit, random_seed=seed, max_samples=samples)
    if total < limit:
        with pytest.raises(ConfigError, match="makes no block"):
            arrange(rows, wanted, JOINER)
        return
    blocks = arrange(rows, wanted, JOINER).blocks
    assert len(blocks) == samples
    assert all(len(block.ids) == limit for block in blocks)
    assert {block.ids[0] for block in blocks} <= {row.ids[0] for row in rows}
    assert blocks == arrange(rows, wanted, JOINER).blocks


def test_line_by_line_random_draws_with_replacement_and_by_seed() -> None:
    rows = rows_of([4] * 10)
    drawn = arrange(rows, pre("line-by-line-random", 4, random_seed=3, max_samples=50), []).blocks
    assert len(drawn) == 50
    assert {tuple(block.ids) for block in drawn} <= {tuple(row.ids) for row in rows}
    other = arrange(rows, pre("line-by-line-random", 4, random_seed=4, max_samples=50), []).blocks
    assert drawn != other
    short = arrange(
        rows_of([2, 8, 8]),
        pre("line-by-line-random", 8, random_seed=0, max_samples=20, drop_short_sequences=True),
        [],
    )
    assert all(len(block.ids) == 8 for block in short)


@pytest.mark.parametrize("strategy", ["line-by-line-random", "join-random"])
def test_a_random_strategy_needs_a_seed(strategy: str) -> None:
    assert "seed" in settings_missing(pre(strategy, 8))[0].message
    assert not settings_missing(pre(strategy, 8), seed=0)
    with pytest.raises(ConfigError, match="has no seed"):
        build([{"text": "a"}], pre(strategy, 8), None)  # type: ignore[arg-type]


def test_a_sliding_window_needs_a_stride_that_skips_nothing() -> None:
    assert settings_missing(pre("join-sliding-window", 8))
    assert settings_missing(pre("join-sliding-window", 8, stride=9))
    assert not settings_missing(pre("join-sliding-window", 8, stride=8))


def test_rows_whose_completion_is_cut_off_are_left_out_and_said() -> None:
    rows = [*rows_of([6], masked=2), *rows_of([20], masked=15)]
    found = arrange(rows, pre("line-by-line", 10), [])
    assert len(found) == 1
    assert [note.message for note in found.notes] == [
        "1 of 2 rows are cut to max_seq_len 10; the longest has 20",
        "1 of 2 rows hold no token to learn and are left out",
    ]
    with pytest.raises(ConfigError, match="every label is masked"):
        arrange(rows[1:], pre("line-by-line", 10), [])


def test_the_joiner_is_learnt_only_when_everything_is() -> None:
    rows = rows_of([4, 4], masked=2)
    everything = arrange(rows, pre("join", 10), JOINER).blocks[0]
    completion = arrange(rows, pre("join", 10, train_on="completion"), JOINER).blocks[0]
    assert everything.labels[4:6] == JOINER
    assert completion.labels[4:6] == [IGNORE, IGNORE]


def test_trained_tokens_are_those_the_shifted_loss_sees() -> None:
    block = Block([1, 2, 3, 4, 5], [1, 2, 3, IGNORE, 5], (3, 2))
    assert block.trained_tokens == 3  # 2, 3 and 5: the first token of a document has no logits


def test_max_samples_keeps_the_first_blocks() -> None:
    assert [b.ids for b in arrange(rows_of([20]), pre("join", 4, max_samples=2), [])] == [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
    ]
