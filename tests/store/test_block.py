import numpy as np
import pytest
import scipy.sparse as sp

from hce_jax.errors import UserError
from hce_jax.preprocess import normalize_log1p
from hce_jax.store.block import COUNTS, PACKED_COLUMNS, SCALE, VALUES, Block

N_GENES = 400


def counts_of(cells, n_genes=N_GENES):
    """Counts that tell their cell and gene; a third of the genes is expressed, the least with 1 count."""
    cells, genes = np.asarray(cells)[:, None], np.arange(n_genes)[None]
    counts = np.where((cells + genes) % 3 == 0, (cells * 31 + genes * 17) % 400 + 1, 0)
    counts[:, 0] = 1
    return counts


def normalised(counts):
    return np.log1p(counts * (1e4 / np.maximum(counts.sum(axis=1, keepdims=True), 1))).astype(np.float32)


def perturbed(x):
    """No counts explain it any more: one gene of each cell is off by 1e-4."""
    x = x.copy()
    gene = np.argmax(x > 0, axis=1)
    x[np.arange(len(x)), gene] += 1e-4
    return x


def numbered(cells):
    return {"cell_type": np.asarray(cells) % 5, "soma_joinid": np.asarray(cells)}


def mixed_cells(cells):
    """Even cells come from counts, odd ones do not."""
    x = normalised(counts_of(cells))
    return np.where(np.asarray(cells)[:, None] % 2, perturbed(x), x)


def check_cells(block, cells):
    """The block holds these cells, each with its own expression and numbers."""
    np.testing.assert_array_equal(block.column("soma_joinid"), cells)
    np.testing.assert_array_equal(block.column("cell_type"), np.asarray(cells) % 5)
    x, expected, odd = block.x.toarray(), mixed_cells(cells), np.asarray(cells) % 2 == 1
    np.testing.assert_array_equal(x[odd], expected[odd])
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(block.counts.toarray(), np.where(odd[:, None], 0, counts_of(cells)))


def block_of(cells):
    return Block.of_recovered_counts(mixed_cells(cells), numbered(cells))


# How other programs have written ln(1 + 10,000 x count / total) in float32.
WRITERS = {
    "float64, rounded once": lambda c, t: np.log1p(c * (1e4 / t)).astype(np.float32),
    "float32: count / total x 10,000": lambda c, t: np.log1p(np.float32(c) / np.float32(t) * np.float32(1e4)),
    "float32: count x (10,000 / total)": lambda c, t: np.log1p(np.float32(c) * (np.float32(1e4) / np.float32(t))),
    "float32: count / (total / 10,000)": lambda c, t: np.log1p(np.float32(c) / (np.float32(t) / np.float32(1e4))),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize("library_size", [500, 3_000, 20_000, 200_000])
def test_counts_come_back_exactly_whoever_normalised_them(library_size, write):
    rng = np.random.default_rng(library_size)
    shares = np.exp(rng.normal(0, 2, (40, 2000)))
    counts = np.stack([rng.multinomial(library_size, share) for share in shares / shares.sum(axis=1, keepdims=True)])
    assert counts.max() < 2**16
    assert (np.gcd.reduce(counts, axis=1) == 1).all()  # else they could be divided
    x = write(counts, counts.sum(axis=1, keepdims=True))
    assert x.dtype == np.float32
    block = Block.of_recovered_counts(x, numbered(np.arange(40)))
    np.testing.assert_array_equal(block.counts.toarray(), counts)
    np.testing.assert_allclose(block.column(SCALE), 1e4 / counts.sum(axis=1), rtol=1e-6)
    assert len(block.stream(VALUES).gaps) == 0
    assert block.x.dtype == np.float32
    np.testing.assert_allclose(block.x.toarray(), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cell", [[2, 3, 0], [3, 2, 2], [3, 4, 5], [3, 0, 7]], ids=str)
def test_the_least_count_may_be_2_or_3(cell):
    counts = np.array([cell, [1, 5, 0]])
    block = Block.of_recovered_counts(normalised(counts), numbered([0, 1]))
    np.testing.assert_array_equal(block.counts.toarray(), counts)


def test_counts_with_a_common_divisor_come_back_divided_and_the_expression_is_the_same():
    x = normalised(np.array([[2, 4, 0], [0, 9, 3]]))
    block = Block.of_recovered_counts(x, numbered([0, 1]))
    np.testing.assert_array_equal(block.counts.toarray(), [[1, 2, 0], [0, 3, 1]])
    np.testing.assert_allclose(block.x.toarray(), x, rtol=0, atol=1e-6)


def test_cells_that_no_counts_explain_keep_their_values_bit_for_bit_beside_others_that_are_kept_as_counts():
    cells = np.arange(30)
    block = block_of(cells)
    check_cells(block, cells)
    np.testing.assert_array_equal(block.column(SCALE) > 0, cells % 2 == 0)
    for names, kept in ((COUNTS, cells % 2 == 0), (VALUES, cells % 2 == 1)):
        np.testing.assert_array_equal(np.diff(block.stream(names).offsets) > 0, kept)


def test_a_cell_without_expression_is_kept_as_counts_of_zero():
    block = Block.of_recovered_counts(np.zeros((2, 3), np.float32), numbered([0, 1]))
    assert block.column(SCALE).tolist() == [1, 1]
    assert block.x.nnz == 0
    assert block.x.shape == (2, 3)


@pytest.mark.parametrize("largest", [65_535, 65_536])
def test_counts_up_to_65_535_are_recovered_and_cells_with_a_larger_one_keep_their_values(largest):
    counts = np.array([[1, 3, 30_000, largest]])
    block = Block.of_recovered_counts(normalised(counts), numbered([0]))
    assert (block.column(SCALE)[0] > 0) == (largest == 65_535)
    np.testing.assert_array_equal(block.counts.toarray(), counts if largest == 65_535 else 0 * counts)
    np.testing.assert_allclose(block.x.toarray(), normalised(counts), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "cell",
    [
        [np.nan, 1, 0.5],
        [np.inf, 1, 0],
        [1e30, 1, 0],
        [100, 0.25, 0],
        [1e-40, 1, 2],
        np.log1p([0.5, 0.5, -0.5]).tolist(),
    ],
    ids=str,
)
def test_numbers_that_are_no_expression_are_kept_as_they_are_and_do_not_touch_their_neighbours(cell):
    x = np.array([[0, 2, 0], cell, [3, 0, 0]], np.float32)
    for block in (Block.of_recovered_counts(x, numbered([0, 1, 2])), Block.of_values(x, numbered([0, 1, 2]))):
        np.testing.assert_array_equal(block.x.toarray()[1], x[1])
        np.testing.assert_allclose(block.x.toarray(), x, rtol=0, atol=1e-6)


def test_nothing_differs_by_more_than_a_millionth_whatever_the_expression():
    rng = np.random.default_rng(0)
    for noise in (0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-3):
        x = normalised(rng.poisson(0.4, (50, 300)) * rng.integers(1, 40, (50, 300)))
        x = np.where(x > 0, x + noise * rng.standard_normal(x.shape), 0).astype(np.float32)
        block = Block.of_recovered_counts(x, numbered(np.arange(50)))
        np.testing.assert_allclose(block.x.toarray(), x, rtol=0, atol=1e-6)


def test_values_are_kept_bit_for_bit():
    x = mixed_cells(np.arange(20))
    block = Block.of_values(x, numbered(np.arange(20)))
    assert block.x.dtype == np.float32
    np.testing.assert_array_equal(block.x.toarray(), x)
    assert not block.column(SCALE).any()
    assert block.counts.nnz == len(block.stream(COUNTS).gaps) == 0


@pytest.mark.parametrize("make", [Block.of_values, Block.of_recovered_counts])
def test_other_types_read_only_and_transposed_arrays_give_the_same_block(make):
    x = mixed_cells(np.arange(6))
    expected = make(x, numbered(np.arange(6)))
    read_only = x.copy()
    read_only.flags.writeable = False
    for other in (x.astype(np.float64), read_only, np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2]):
        assert make(other, numbered(np.arange(6))).cells.equals(expected.cells)
    whole = make(np.array([[0, 2], [1, 0]]), numbered([0, 1]))
    np.testing.assert_allclose(whole.x.toarray(), [[0, 2], [1, 0]], atol=1e-6)


def test_float64_is_rounded_before_it_is_decided_what_is_explained():
    x = np.repeat(normalised(np.array([[1, 3, 200]])).astype(np.float64), 2000, axis=0)
    x[:, 1] += np.linspace(0, 4e-6, 2000)  # the last ones are too far off
    as_counts = Block.of_recovered_counts(x, numbered(np.arange(2000))).column(SCALE) > 0
    rounded = Block.of_recovered_counts(x.astype(np.float32), numbered(np.arange(2000))).column(SCALE) > 0
    assert 0 < as_counts.sum() < 2000
    np.testing.assert_array_equal(as_counts, rounded)


def test_counts_come_back_exactly_from_cells_that_express_many_genes():
    counts = 1 + np.random.default_rng(0).poisson(2, (3, 30_000))
    block = Block.of_recovered_counts(normalised(counts), numbered(np.arange(3)))
    np.testing.assert_array_equal(block.counts.toarray(), counts)


def test_columns_are_int64_whatever_they_were():
    columns = {"cell_type": np.array([3, 4], np.int8), "is_primary_data": np.array([True, False])}
    block = Block.of_values(np.eye(2), columns)
    assert block.cells.schema.names == [*PACKED_COLUMNS, "cell_type", "is_primary_data"]
    for name, values in (("cell_type", [3, 4]), ("is_primary_data", [1, 0])):
        assert block.column(name).dtype == np.int64
        assert block.column(name).tolist() == values


@pytest.mark.parametrize("n_genes", [1, 255, 256, 510, 700])
def test_slices_of_slices_and_chosen_rows_are_the_cells_they_say(n_genes):
    cells = np.arange(24)
    counts = np.where(cells[:, None] % 4 == 3, 0, counts_of(cells, n_genes) * (np.arange(n_genes) % 250 < 2))
    x = normalised(counts)
    x[cells % 3 == 1] *= np.float32(1.01)
    block = Block.of_recovered_counts(x, numbered(cells))
    for rows in (np.arange(24)[5:20][3:9], np.arange(24)[5:20][::-1], np.array([7, 7, 0, 23, 7]), np.array([], int)):
        np.testing.assert_array_equal(block.take(rows).x.toarray(), block.x.toarray()[rows])
    inner = block.slice(5, 20).slice(3, 9)
    np.testing.assert_array_equal(inner.column("soma_joinid"), np.arange(8, 14))
    np.testing.assert_array_equal(inner.x.toarray(), block.x.toarray()[8:14])
    np.testing.assert_array_equal(inner.take(np.array([4, 0, 4])).column("soma_joinid"), [12, 8, 12])
    np.testing.assert_array_equal(inner.take(np.array([4, 0, 4])).x.toarray(), block.x.toarray()[[12, 8, 12]])
    assert len(block.slice(4, 4)) == block.slice(4, 4).x.nnz == 0


def test_cells_keep_together_through_slice_take_and_concatenate():
    rng = np.random.default_rng(3)
    whole = block_of(np.arange(60))
    for _ in range(20):
        pieces, cells = [], []
        for _ in range(rng.integers(1, 5)):
            start, stop = sorted(rng.integers(0, 61, 2).tolist())
            rows = rng.integers(0, stop - start, 7) if stop > start else np.array([], int)
            pieces.append(whole.slice(start, stop).take(rows))
            cells.append(np.arange(start, stop)[rows])
        joined = Block.concatenate(pieces)
        check_cells(joined, np.concatenate(cells))
        order = rng.permutation(len(joined))
        check_cells(joined.take(order), np.concatenate(cells)[order])


def test_blocks_of_counts_only_and_of_values_only_can_be_joined():
    even, odd = np.arange(0, 10, 2), np.arange(1, 11, 2)
    joined = Block.concatenate([block_of(even), block_of(odd), block_of(np.arange(0)), block_of(even).slice(1, 3)])
    check_cells(joined, np.concatenate([even, odd, even[1:3]]))


@pytest.mark.parametrize("make", [Block.of_values, Block.of_recovered_counts])
def test_a_block_may_have_no_cells(make):
    block = make(np.zeros((0, 7), np.float32), numbered([]))
    assert (len(block), block.x.shape, block.counts.shape) == (0, (0, 7), (0, 7))
    assert len(Block.concatenate([block, block])) == 0


def test_slicing_copies_nothing():
    block = block_of(np.arange(10))
    for names in (COUNTS, VALUES):
        assert np.shares_memory(block.stream(names).gaps, block.slice(2, 9).stream(names).gaps)
        assert np.shares_memory(block.stream(names).amounts, block.slice(2, 9).stream(names).amounts)


def of_counts(counts):
    return Block.of_counts(sp.csr_array(counts), numbered(np.arange(len(counts))))


@pytest.mark.parametrize("library_size", [1, 500, 20_000, 2_000_000])
@pytest.mark.parametrize("n_genes", [255, 700])
def test_raw_counts_are_kept_exactly_and_give_the_normalised_expression(library_size, n_genes):
    rng = np.random.default_rng(library_size)
    counts = np.stack([rng.multinomial(library_size, rng.dirichlet(np.full(n_genes, 0.3))) for _ in range(30)])
    counts = np.minimum(counts * rng.integers(1, 3, (30, 1)), 65_535)  # a common divisor is no matter here
    block = of_counts(counts)
    np.testing.assert_array_equal(block.counts.toarray(), counts)
    np.testing.assert_allclose(block.column(SCALE), 1e4 / counts.sum(axis=1), rtol=1e-7)
    assert len(block.stream(VALUES).gaps) == 0
    assert block.x.dtype == np.float32
    np.testing.assert_allclose(block.x.toarray(), normalize_log1p(counts), rtol=0, atol=1e-6)
    assert counts.max() > 255 or library_size <= 500
    np.testing.assert_array_equal(block.column("soma_joinid"), np.arange(30))


@pytest.mark.parametrize("last", [0, 1, 255, 256, 65_535], ids="the last gene has {} counts".format)
def test_raw_counts_at_every_step_of_a_byte_come_back_and_empty_cells_stay_empty(last):
    counts = np.zeros((6, 600), int)
    counts[0, :8] = [1, 2, 254, 255, 256, 510, 511, 65_535]
    counts[1, 300] = 65_535
    counts[[0, 1, 3, 5], -1] = last  # cells 2 and 4 are empty
    block = of_counts(counts)
    np.testing.assert_array_equal(block.counts.toarray(), counts)
    np.testing.assert_allclose(block.x.toarray(), normalize_log1p(counts), rtol=0, atol=1e-6)
    assert not block.x.toarray()[[2, 4]].any()
    assert (block.column(SCALE) > 0).all()


def test_counts_that_are_not_whole_or_above_65_535_are_kept_as_the_values_that_follow_from_them():
    cells = np.arange(24)
    counts = counts_of(cells).astype(float)
    counts[1::4, 0] = 0.25
    counts[2::4, -1] = 65_536
    counts[7] = 0
    odd = np.isin(cells % 4, [1, 2])
    block = of_counts(counts)
    np.testing.assert_array_equal(block.column(SCALE) == 0, odd)
    np.testing.assert_array_equal(block.counts.toarray(), np.where(odd[:, None], 0, counts))
    np.testing.assert_array_equal(block.x.toarray()[odd], normalize_log1p(counts)[odd])  # bit for bit
    np.testing.assert_allclose(block.x.toarray(), normalize_log1p(counts), rtol=0, atol=1e-6)
    for names, kept in ((COUNTS, ~odd), (VALUES, odd)):
        np.testing.assert_array_equal(np.diff(block.stream(names).offsets) > 0, kept)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -0.5])
def test_counts_that_are_no_numbers_or_negative_are_refused(wrong):
    with pytest.raises(UserError, match="1 of the given counts are negative or not finite"):
        of_counts(np.array([[1.0, 2.0], [wrong, 1.0]]))


def test_a_cell_is_packed_alike_whoever_its_neighbours_are_and_as_recovered_counts():
    counts = counts_of(np.arange(20)).astype(float)
    counts[::5, 3] = 0.5
    whole = of_counts(counts)
    for rows in (np.arange(5, 9), np.array([0, 5]), np.array([1]), np.array([0]), np.arange(20)[::-1]):
        alone = Block.of_counts(sp.csr_array(counts[rows]), numbered(rows))
        assert alone.cells.equals(whole.take(rows).cells)
    recovered = Block.of_recovered_counts(normalised(counts), numbered(np.arange(20))).counts.toarray()
    is_whole = np.arange(20) % 5 > 0
    np.testing.assert_array_equal(recovered[is_whole], whole.counts.toarray()[is_whole])


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.float32, np.float64])
def test_counts_of_any_type_with_stored_zeros_are_packed_and_not_changed(dtype):
    counts = counts_of(np.arange(9)).astype(dtype)
    given = sp.csr_array(np.where(counts == 0, 1, counts).astype(dtype))
    given.data[given.data == 1] = 0  # stored, or counts of 1 that become 0
    before = given.copy()
    given.data.flags.writeable = False
    block = Block.of_counts(given, numbered(np.arange(9)))
    assert block.cells.equals(of_counts(np.where(counts == 1, 0, counts)).cells)
    for ours, was in ((given.data, before.data), (given.indices, before.indices), (given.indptr, before.indptr)):
        np.testing.assert_array_equal(ours, was)


def test_a_total_that_float32_cannot_hold_is_exact():
    counts = np.full((1, 300), 65_535)
    counts[0, 0] = 1
    assert of_counts(counts).column(SCALE)[0] == np.float32(1e4 / counts.sum())


def test_counts_of_no_cells_are_a_block_of_no_cells():
    block = Block.of_counts(sp.csr_array((0, 7)), numbered([]))
    assert (len(block), block.x.shape, block.counts.shape) == (0, (0, 7), (0, 7))


def test_other_columns_take_the_place_of_a_block_s_own_and_the_expression_stays():
    cells = np.arange(12)
    block = block_of(cells).slice(2, 11)
    renamed = block.with_columns({"idx": np.arange(9, dtype=np.int8), "cell_type": cells[2:11] % 2 == 0})
    assert renamed.cells.schema.names == [*PACKED_COLUMNS, "idx", "cell_type"]
    assert [renamed.column(name).dtype for name in ("idx", "cell_type")] == [np.int64] * 2
    assert renamed.column("idx").tolist() == list(range(9))
    assert renamed.column("cell_type").tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 1]
    check_cells(renamed.with_columns(numbered(cells[2:11])), cells[2:11])
    assert block.cells.schema.names == [*PACKED_COLUMNS, "cell_type", "soma_joinid"]
    assert np.shares_memory(block.stream(COUNTS).gaps, renamed.stream(COUNTS).gaps)
