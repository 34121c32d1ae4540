import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pytest
from memory_source import N_GENES, cells_of, counts_of
from scipy import sparse

from hce_jax.preprocess.normalize import normalize_log1p
from hce_jax.store import shuffle as module
from hce_jax.store.block import PACKED_COLUMNS, SCALE, Block
from hce_jax.store.shuffle import FEWEST_GENES_TO_TELL, Shuffle, chunk_path, fingerprints

N_CELLS = 500
SPLIT = np.random.default_rng(5).choice(3, N_CELLS, p=[0.7, 0.2, 0.1])


def few_genes(n_expressed, n_cells=1):
    """Counts of cells that express so many genes, the last gene not among them."""
    counts = np.zeros((n_cells, N_GENES))
    counts[:, :n_expressed] = 1 + np.arange(n_expressed) % 7
    return counts


def coded_counts():
    """Counts of 500 cells; those of some are not whole or above 255, and some cells are empty."""
    counts = counts_of(np.arange(N_CELLS)).astype(float)
    counts[::9] += np.where(counts[::9] > 0, 0.5, 0)
    counts[4::31] *= 300
    counts[3::71] = 0
    return counts


def with_copies(rng):
    """Counts with copies: of whole and of other counts, of a copy, of cells with few genes, within and over chunks."""
    counts = coded_counts()
    for first, *others in rng.permutation(N_CELLS)[:120].reshape(30, 4):
        counts[others[: rng.integers(1, 4)]] = counts[first]
    expressing = rng.permutation(N_CELLS)[:60].reshape(6, 10)
    for cells, n_expressed in zip(expressing, (0, 1, 23, 24, 25, 26), strict=True):
        counts[cells] = few_genes(n_expressed)
    return counts


def first_pass(shuffle, counts, folder):
    """Write all chunks; return what is recorded of each and the numbers of cells that were read together."""
    folder.mkdir()
    reads, ticks, records = [], [], []

    def read(numbers):
        reads.append(numbers.tolist())
        return Block.of_counts(sparse.csr_array(counts[numbers]), {})

    for chunk in range(shuffle.n_chunks):
        path = chunk_path(folder, chunk)
        records.append(shuffle.write_chunk(chunk, path, read, ticks.append))
        assert records[-1]["bytes"] == path.stat().st_size
    assert [len(numbers) for numbers in reads] == ticks
    return records, reads


def second_pass(shuffle, folder, dropped_n):
    """Read all parts; return for each split the numbers and the blocks of its parts."""
    passes = []
    for split in range(3):
        parts = shuffle.parts(split, dropped_n)
        passes.append((parts, [shuffle.read_part(part, folder) for part in parts]))
    return passes


def none_dropped():
    return np.zeros(N_CELLS, bool)


SIZES = [(32_768, 32_768), (100, 70), (70, 100), (1, 64), (64, 1), (499, 501), (33, 33)]


@pytest.mark.parametrize(("cells_per_chunk", "cells_per_part"), SIZES)
def test_every_cell_comes_out_once_at_its_place_with_its_own_expression(tmp_path, cells_per_chunk, cells_per_part):
    counts = coded_counts()
    shuffle = Shuffle.draw(SPLIT, N_GENES, 3, cells_per_chunk=cells_per_chunk, cells_per_part=cells_per_part)
    first_pass(shuffle, counts, tmp_path / "chunks")
    for split, (parts, blocks) in enumerate(second_pass(shuffle, tmp_path / "chunks", none_dropped())):
        numbers = np.concatenate(parts)
        expected = np.flatnonzero(SPLIT == split)
        assert sorted(numbers) == expected.tolist()
        np.testing.assert_array_equal(shuffle.place_n[numbers], np.arange(len(numbers)))
        assert {len(part) for part in parts[:-1]} <= {cells_per_part}
        assert 0 < len(parts[-1]) <= cells_per_part
        for part, block in zip(parts, blocks, strict=True):
            assert set(block.cells.schema.names) == {*PACKED_COLUMNS, "cell"}
            np.testing.assert_array_equal(block.column("cell"), part)
            np.testing.assert_allclose(block.x.toarray(), normalize_log1p(counts[part]), rtol=0, atol=1e-6)
            whole = (block.column(SCALE) > 0) & counts[part].any(axis=1) & (counts[part].max(axis=1) < 256)
            np.testing.assert_array_equal(cells_of(block.counts[np.flatnonzero(whole)]), part[whole])


def test_the_order_does_not_depend_on_the_sizes_nor_on_other_splits():
    orders = [Shuffle.draw(SPLIT, N_GENES, 3, cells_per_chunk=c, cells_per_part=p).place_n for c, p in SIZES]
    for order in orders[1:]:
        np.testing.assert_array_equal(order, orders[0])
    other_split = np.where(SPLIT == 2, 1, SPLIT)
    np.testing.assert_array_equal(Shuffle.draw(other_split, N_GENES, 3).place_n[SPLIT == 0], orders[0][SPLIT == 0])
    assert (Shuffle.draw(SPLIT, N_GENES, 4).place_n != orders[0]).mean() > 0.9


def test_splits_of_one_size_do_not_have_the_same_order():
    split = np.repeat([0, 1], 100)
    place = Shuffle.draw(split, N_GENES, 0).place_n
    assert sorted(place[:100]) == sorted(place[100:]) == list(range(100))
    assert (place[:100] != place[100:]).mean() > 0.9


def test_cells_of_one_study_are_neighbours_as_often_as_by_chance():
    n_cells, n_studies = 40_000, 8
    study = np.arange(n_cells) * n_studies // n_cells
    for seed in range(3):
        shuffle = Shuffle.draw(np.zeros(n_cells, np.int8), N_GENES, seed)
        ordered = study[np.argsort(shuffle.place_n)]
        same = (ordered[1:] == ordered[:-1]).mean()
        chance = (n_cells / n_studies - 1) / (n_cells - 1)
        assert abs(same - chance) < 4 * np.sqrt(chance * (1 - chance) / n_cells)
        # and each study is spread evenly over the tenths of the split
        table = np.stack([np.bincount(tenth, minlength=n_studies) for tenth in np.split(ordered, 10)])
        assert ((table - 500) ** 2 / 500).sum() < 63 + 4 * np.sqrt(2 * 63)  # chi squared of 63 degrees of freedom


def test_a_chunk_has_one_record_batch_for_each_part_that_gets_cells_of_it(tmp_path):
    shuffle = Shuffle.draw(SPLIT, N_GENES, 3, cells_per_chunk=120, cells_per_part=90)
    first_pass(shuffle, coded_counts(), tmp_path / "chunks")
    for chunk in range(shuffle.n_chunks):
        cells = np.arange(120 * chunk, min(120 * (chunk + 1), N_CELLS))
        np.testing.assert_array_equal(shuffle.chunk_cells(chunk), cells)
        goes_to = {}
        for cell in cells:
            goes_to.setdefault((SPLIT[cell], shuffle.place_n[cell] // 90), []).append(cell)
        with pa.OSFile(str(chunk_path(tmp_path / "chunks", chunk))) as file:
            reader = ipc.open_file(file)
            found = [reader.get_batch(at).column("cell").to_pylist() for at in range(reader.num_record_batches)]
        assert found == [sorted(goes_to[part], key=lambda cell: shuffle.place_n[cell]) for part in sorted(goes_to)]
    assert shuffle.n_chunks == 5


def test_cells_are_read_some_at_a_time_in_the_order_of_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CELLS_PER_READ", 40)
    shuffle = Shuffle.draw(SPLIT, N_GENES, 3, cells_per_chunk=130)
    records, reads = first_pass(shuffle, coded_counts(), tmp_path / "chunks")
    assert [len(numbers) for numbers in reads] == [40, 40, 40, 10] * 3 + [40, 40, 30]
    assert np.concatenate(reads).tolist() == list(range(N_CELLS))
    counts = coded_counts()
    is_empty, is_odd = ~counts.any(axis=1), (counts != np.rint(counts)).any(axis=1)
    for chunk, record in enumerate(records):
        cells = shuffle.chunk_cells(chunk)
        assert record["empty"] == is_empty[cells].sum() > 0
        assert record["cells_as_values"] == is_odd[cells].sum() > 0


def test_a_chunk_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    take, taken = Block.take, []

    def fail_at_the_second_batch(block, rows):
        taken.append(len(rows))
        if len(taken) == 2:
            raise OSError("no more")
        return take(block, rows)

    monkeypatch.setattr(Block, "take", fail_at_the_second_batch)
    with pytest.raises(OSError, match="no more"):
        first_pass(Shuffle.draw(SPLIT, N_GENES, 3), coded_counts(), tmp_path / "chunks")
    assert list((tmp_path / "chunks").iterdir()) == []


def originals_by_comparison(counts):
    """For each cell the first with the same row, itself if it expresses few genes."""
    _, row = np.unique(counts, axis=0, return_inverse=True)
    first = {}
    of_row = [first.setdefault(value, cell) for cell, value in enumerate(row.ravel().tolist())]
    return np.where((counts > 0).sum(axis=1) >= 25, of_row, np.arange(len(counts)))


@pytest.mark.parametrize("seed", range(4))
def test_copies_are_found_that_a_comparison_of_all_rows_finds_and_the_first_stays(tmp_path, seed):
    counts = with_copies(np.random.default_rng(seed))
    expected = originals_by_comparison(counts)
    n_copies = np.count_nonzero(expected != np.arange(N_CELLS))
    assert 40 < n_copies < 150
    shuffle = Shuffle.draw(SPLIT, N_GENES, seed, cells_per_chunk=[60, 500, 1, 77][seed], cells_per_part=48)
    first_pass(shuffle, counts, tmp_path / "chunks")
    original_n = shuffle.originals(tmp_path / "chunks")
    np.testing.assert_array_equal(original_n, expected)
    assert len(np.unique(original_n)) == N_CELLS - n_copies

    dropped_n = original_n != np.arange(N_CELLS)
    for split, (parts, blocks) in enumerate(second_pass(shuffle, tmp_path / "chunks", dropped_n)):
        kept = np.flatnonzero((SPLIT == split) & ~dropped_n)
        ordered = kept[np.argsort(shuffle.place_n[kept])]
        assert [len(part) for part in parts[:-1]] == [48] * ((len(kept) - 1) // 48)
        np.testing.assert_array_equal(np.concatenate(parts), ordered)
        x = np.concatenate([block.x.toarray() for block in blocks])
        np.testing.assert_allclose(x, normalize_log1p(counts[ordered]), rtol=0, atol=1e-6)


def test_a_split_may_lose_all_its_cells():
    split = np.array([0, 0, 2, 2, 0])
    shuffle = Shuffle.draw(split, N_GENES, 0, cells_per_part=2)
    dropped_n = np.array([False, True, True, True, False])
    assert [part.tolist() for part in shuffle.parts(2, dropped_n)] == []
    assert [part.tolist() for part in shuffle.parts(1, dropped_n)] == []
    assert sorted(np.concatenate(shuffle.parts(0, dropped_n)).tolist()) == [0, 4]


@pytest.mark.parametrize("scale", [1, 0.3, 300], ids=["whole counts", "values", "counts above 255"])
@pytest.mark.parametrize("last_gene", [0, 1], ids=["last gene not expressed", "last gene expressed"])
def test_cells_with_fewer_than_25_genes_are_not_compared(scale, last_gene):
    for n_expressed in (1, 23, 24, 25, 26, 40):
        counts = few_genes(n_expressed - last_gene, 2) * scale
        counts[:, -1] = last_gene * scale
        of_cell = fingerprints(Block.of_counts(sparse.csr_array(counts), {}))
        assert of_cell.dtype == np.int64
        assert of_cell[0] == of_cell[1]
        assert (of_cell[0] != 0) == (n_expressed >= FEWEST_GENES_TO_TELL)


def test_a_fingerprint_is_that_of_the_cell_alone_and_differs_where_any_count_does():
    counts = coded_counts()
    alone = [fingerprints(Block.of_counts(sparse.csr_array(counts[cell : cell + 1]), {}))[0] for cell in range(60)]
    block = Block.of_counts(sparse.csr_array(counts), {})
    np.testing.assert_array_equal(fingerprints(block)[:60], alone)
    order = np.random.default_rng(0).permutation(N_CELLS)
    np.testing.assert_array_equal(fingerprints(block.take(order).slice(5, 450)), fingerprints(block)[order[5:450]])
    one = np.repeat(few_genes(30), 1 + 2 * N_GENES, axis=0)
    one[np.arange(1, 1 + N_GENES), np.arange(N_GENES)] += 1
    one[np.arange(1 + N_GENES, 1 + 2 * N_GENES), np.arange(N_GENES)] += 256
    changed = fingerprints(Block.of_counts(sparse.csr_array(one), {}))
    assert len(np.unique(changed)) == len(one)
    assert (changed != 0).all()
    moved = np.stack([np.roll(few_genes(30)[0], shift) for shift in range(20)])  # the same amounts elsewhere
    assert len(np.unique(fingerprints(Block.of_counts(sparse.csr_array(moved), {})))) == 20
