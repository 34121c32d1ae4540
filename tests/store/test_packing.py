import numpy as np
import pytest
import scipy.sparse as sp

from hce_jax.store.packing import Places, Stream, expression, unpack


def pack_by_hand(x_ng, dtype):
    """The definition, one gene after the other."""
    entries, offsets, gap = [], [0], 0
    for cell in x_ng:
        for gene, value in enumerate(cell):
            gap += 1
            if value == 0 and gene < len(cell) - 1:
                continue
            while gap > 255:
                entries.append((255, 0))
                gap -= 255
            whole = (int(value) - 1) // 255 if dtype == np.uint8 and value > 255 else 0
            entries += [(gap, value - 255 * whole)] + [(0, 255)] * whole
            gap = 0
        offsets.append(len(entries))
    return [gap for gap, _ in entries], [amount for _, amount in entries], offsets


def walk_by_hand(stream, n_cells, n_genes):
    x_ng, at = np.zeros((n_cells, n_genes)), -1
    for gap, amount in zip(stream.gaps.tolist(), stream.amounts.tolist(), strict=True):
        at += gap
        if amount:
            x_ng[at // n_genes, at % n_genes] += amount
    assert at == n_cells * n_genes - 1
    return x_ng


def row(n_genes, **at):
    """A cell with these counts at these genes, written g<gene>=count."""
    cell = np.zeros(n_genes, int)
    for gene, count in at.items():
        cell[int(gene[1:])] = count
    return cell


CASES = {
    "one gene": np.array([[0], [3], [255], [0], [256]]),
    "one cell, nothing expressed": np.zeros((1, 7), int),
    "255 genes, nothing expressed": np.zeros((3, 255), int),
    "256 genes, nothing expressed": np.zeros((3, 256), int),
    "510 genes, nothing expressed": np.zeros((2, 510), int),
    "511 genes, nothing expressed": np.zeros((2, 511), int),
    "all expressed": np.arange(1, 31).reshape(5, 6),
    "gaps of 255, 256, 510 and 511": np.stack(
        [row(1600, g254=1, g510=2, g1020=3, g1531=4), row(1600, g255=5, g1599=6), row(1600, g0=7, g1599=8)]
    ),
    "counts about 255, 510 and 65,535": np.array([[0, 1, 254, 255], [256, 509, 510, 511], [65_535, 65_536, 0, 0]]),
    "a large count, then a far place": np.stack([row(600, g1=511, g599=256), row(600, g300=1000), row(600, g599=1)]),
    "an empty cell between others": np.stack([row(300, g3=4), row(300), row(300, g299=1)]),
}


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("x_ng", CASES.values(), ids=CASES.keys())
def test_a_stream_is_what_its_definition_says_and_gives_back_what_went_in(x_ng, dtype):
    stream = Places.of(x_ng.astype(np.float32)).pack(dtype)
    gaps, amounts, offsets = pack_by_hand(x_ng, dtype)
    assert (stream.gaps.dtype, stream.amounts.dtype) == (np.uint8, dtype)
    np.testing.assert_array_equal(stream.gaps, gaps)
    np.testing.assert_array_equal(stream.amounts, amounts)
    np.testing.assert_array_equal(stream.offsets, offsets)
    np.testing.assert_array_equal(walk_by_hand(stream, *x_ng.shape), x_ng)
    unpacked = unpack(stream, x_ng.shape[1])
    assert unpacked.dtype == (np.float32 if dtype == np.float32 else np.int32)
    assert unpacked.has_canonical_format
    np.testing.assert_array_equal(unpacked.toarray(), x_ng)
    assert unpacked.nnz == np.count_nonzero(x_ng)


@pytest.mark.parametrize("seed", range(40))
def test_random_cells_of_any_density_are_packed_as_defined(seed):
    rng = np.random.default_rng(seed)
    n_cells, n_genes = int(rng.integers(1, 8)), int(rng.choice([1, 2, 254, 255, 256, 257, 511, 1200]))
    x_ng = rng.choice([1, 2, 200, 255, 256, 700, 3000], (n_cells, n_genes))
    x_ng[rng.random(x_ng.shape) > rng.choice([0.002, 0.01, 0.1, 0.9])] = 0
    for dtype in (np.uint8, np.float32):
        stream = Places.of(x_ng).pack(dtype)
        for ours, by_hand in zip(stream, pack_by_hand(x_ng, dtype), strict=True):
            np.testing.assert_array_equal(ours, by_hand)
        np.testing.assert_array_equal(unpack(stream, n_genes).toarray(), x_ng)


def check_same_places(x_ng):
    """The places found in CSR, with indices of either size, are those found in the dense expression."""
    expected = Places.of(x_ng)
    for index_type in (np.int32, np.int64):
        x = sp.csr_array(x_ng)
        x.indices, x.indptr = x.indices.astype(index_type), x.indptr.astype(index_type)
        for array in (x.data, x.indices, x.indptr):
            array.flags.writeable = False
        found = Places.of_csr(x)
        for ours, of_dense in zip(found, expected, strict=True):
            assert ours.dtype == of_dense.dtype
            np.testing.assert_array_equal(ours, of_dense)


@pytest.mark.parametrize("dtype", [np.int64, np.float32, np.float64])
@pytest.mark.parametrize("x_ng", [*CASES.values(), np.zeros((0, 5), int)], ids=[*CASES.keys(), "no cells"])
def test_places_in_csr_are_those_in_the_same_dense_expression(x_ng, dtype):
    check_same_places(x_ng.astype(dtype))


@pytest.mark.parametrize("seed", range(30))
def test_places_in_csr_are_those_in_random_dense_expression(seed):
    rng = np.random.default_rng(seed)
    n_cells, n_genes = int(rng.integers(1, 9)), int(rng.choice([1, 2, 255, 256, 700]))
    x_ng = rng.random((n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < rng.choice([0.002, 0.05, 0.5, 1]))
    x_ng[:, -1] = np.where(rng.random(n_cells) < 0.5, 0, 7)
    check_same_places(x_ng)


def test_places_in_csr_do_not_overflow_where_the_cells_have_more_than_2_31_places():
    x = sp.csr_array((np.ones(3), np.array([5, 0, 7], np.int32), np.array([0, 1, 1, 3], np.int32)), shape=(3, 2**30))
    gaps, values, offsets = Places.of_csr(x)
    assert gaps.tolist() == [6, 2**30 - 6, 2**30, 1, 7, 2**30 - 8]
    assert (values.tolist(), offsets.tolist()) == ([1, 0, 0, 1, 1, 0], [0, 2, 3, 6])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_no_cells_are_no_entries(dtype):
    stream = Places.of(np.zeros((0, 5), np.float32)).pack(dtype)
    assert (len(stream.gaps), len(stream.amounts), stream.offsets.tolist()) == (0, 0, [0])
    assert unpack(stream, 5).shape == (0, 5)


def test_chosen_cells_walk_on_as_if_they_had_been_alone():
    rng = np.random.default_rng(0)
    x_ng = rng.integers(0, 600, (9, 700)) * (rng.random((9, 700)) < 0.004)
    for chosen in (rng.random(9) < 0.5, np.zeros(9, bool), np.ones(9, bool)):
        taken, alone = Places.of(x_ng).take(chosen).pack(np.uint8), Places.of(x_ng[chosen]).pack(np.uint8)
        for ours, expected in zip(taken, alone, strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_bytes_of_cells_can_be_joined_in_any_order():
    x_ng = CASES["gaps of 255, 256, 510 and 511"]
    stream = Places.of(x_ng).pack(np.uint8)
    order = [2, 0, 1, 2]
    pieces = [slice(stream.offsets[i], stream.offsets[i + 1]) for i in order]
    joined = Stream(
        np.concatenate([stream.gaps[piece] for piece in pieces]),
        np.concatenate([stream.amounts[piece] for piece in pieces]),
        np.cumsum([0, *(piece.stop - piece.start for piece in pieces)]),
    )
    np.testing.assert_array_equal(unpack(joined, 1600).toarray(), x_ng[order])


def test_a_cell_that_is_not_in_the_walk_has_nothing_and_filling_changes_nothing():
    x_ng = np.array([[0, 3, 0], [5, 0, 7]])
    stream = Places.of(x_ng).pack(np.uint8)
    fill, (first, last) = np.zeros(4, np.uint8), stream.offsets[1:]
    filled = Stream(
        np.concatenate([stream.gaps, fill]),
        np.concatenate([stream.amounts, fill]),
        np.array([0, 0, first, first, last + 4]),
    )
    np.testing.assert_array_equal(unpack(filled, 3).toarray(), [[0, 0, 0], x_ng[0], [0, 0, 0], x_ng[1]])


def test_neither_packing_nor_unpacking_writes_to_what_it_is_given():
    x_ng = np.array([[0, 300, 0], [9, 0, 600]], np.float32)
    x_ng.flags.writeable = False
    places = Places.of(x_ng)
    stream = places.pack(np.uint8)
    for array in (*places, *stream):
        array.flags.writeable = False
    np.testing.assert_array_equal(unpack(places.pack(np.uint8), 3).toarray(), x_ng)
    np.testing.assert_array_equal(unpack(stream, 3).toarray(), x_ng)


def test_expression_is_that_of_counts_or_of_values_or_none():
    rng = np.random.default_rng(3)
    n_cells, n_genes = 40, 700
    counts = np.where(rng.random((n_cells, n_genes)) < 0.02, rng.integers(1, 900, (n_cells, n_genes)), 0)
    values = np.where(rng.random((n_cells, n_genes)) < 0.02, rng.random((n_cells, n_genes)), 0).astype(np.float32)
    counts[3], values[4] = 0, 0  # cells without expression
    as_counts = rng.random(n_cells) < 0.5
    as_counts[3], as_counts[4] = True, False
    scale = np.where(as_counts, rng.random(n_cells) * 9 + 1, 0).astype(np.float32)
    counts[~as_counts], values[as_counts] = 0, 0

    def stream(x_ng, chosen, dtype):
        packed = Places.of(x_ng).take(chosen).pack(dtype)
        entries = np.zeros(n_cells, np.int64)
        entries[chosen] = np.diff(packed.offsets)
        return packed._replace(offsets=np.concatenate([[0], np.cumsum(entries)]))

    x = expression(stream(counts, as_counts, np.uint8), stream(values, ~as_counts, np.float32), scale, n_genes)
    expected = np.log1p(counts * scale[:, None].astype(np.float64)) + values
    np.testing.assert_allclose(x.toarray(), expected, rtol=3e-7)
    assert x.nnz == np.count_nonzero(expected)
    assert x.dtype == np.float32
    x.check_format()
    assert x.has_sorted_indices
    np.testing.assert_array_equal(x.toarray()[~as_counts], values[~as_counts])  # values are not computed


def test_expression_of_no_cells_has_no_rows():
    none = Stream(np.zeros(0, np.uint8), np.zeros(0, np.uint8), np.zeros(1, np.int64))
    nothing = none._replace(amounts=np.zeros(0, np.float32))
    assert expression(none, nothing, np.zeros(0, np.float32), 5).shape == (0, 5)
