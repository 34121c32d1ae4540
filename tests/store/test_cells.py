import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import xxhash
from pyarrow import ipc
from stores import FIRST_CELL, N_GENES, label_of, write_tiny_store

from hce_jax.errors import StoreError
from hce_jax.store import open_store
from hce_jax.store.block import PACKED_COLUMNS, Block
from hce_jax.store.cells import checksum, write_part

COLUMNS = ("cell_type", "soma_joinid", "tissue")
SIZES = {"train": 70, "val": 23}
ROWS_PER_PART, BLOCK_SIZE = 32, 10


def counts_of(cells):
    cells, genes = np.asarray(cells)[:, None], np.arange(N_GENES)[None]
    counts = np.where((cells + genes) % 3 == 0, 0, (cells * 31 + genes * 17) % 600 + 1)
    counts[:, 0] = 1
    return counts


def expression(cells):
    """Each value tells its cell and gene; every third cell comes from no counts."""
    counts = counts_of(cells)
    x = np.log1p(counts * (1e4 / counts.sum(axis=1, keepdims=True)))
    x[:, 0] += np.where(np.asarray(cells) % 3 == 0, 1e-4, 0)
    return x.astype(np.float32)


def block_of(cells):
    columns = {"cell_type": label_of(cells), "soma_joinid": cells, "tissue": cells % 2}
    return Block.of_recovered_counts(expression(cells), columns)


def write_cell_store(folder, sizes=SIZES, rows_per_part=ROWS_PER_PART, block_size=BLOCK_SIZE, **changed):
    """Write a store of cells that are numbered through, and return its folder."""
    write_tiny_store(folder, {})
    splits = {}
    for name, size in sizes.items():
        (folder / name).mkdir()
        splits[name] = {"parts": []}
        for number, start in enumerate(range(0, size, rows_per_part)):
            cells = FIRST_CELL[name] + np.arange(start, min(start + rows_per_part, size))
            part = write_part(folder / name / f"part.{number}.arrow", [block_of(cells)], block_size)
            splits[name]["parts"].append(dataclasses.asdict(part))
    about = {"format": "cells", "format_version": 1, "block_size": block_size, "columns": [*PACKED_COLUMNS, *COLUMNS]}
    (folder / "store.json").write_text(json.dumps(about | {"splits": splits} | changed))
    return folder


def change_json(folder, change):
    about = json.loads((folder / "store.json").read_text())
    change(about)
    (folder / "store.json").write_text(json.dumps(about))


@pytest.fixture
def store_path(tmp_path):
    return write_cell_store(tmp_path / "store")


def read_all(split, columns=COLUMNS):
    return Block.concatenate([split.read_block(i, columns) for i in range(len(split.block_sizes))])


def check_cells(block, cells):
    np.testing.assert_array_equal(block.column("soma_joinid"), cells)
    np.testing.assert_array_equal(block.column("cell_type"), label_of(cells))
    np.testing.assert_array_equal(block.column("tissue"), cells % 2)
    x, expected, as_values = block.x.toarray(), expression(cells), cells % 3 == 0
    np.testing.assert_array_equal(x[as_values], expected[as_values])
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(block.counts.toarray(), np.where(as_values[:, None], 0, counts_of(cells)))


def test_every_cell_comes_back_with_its_expression_label_and_numbers(store_path):
    for name, size in SIZES.items():
        split = open_store(store_path).split(name)
        assert split.n_cells == size
        check_cells(read_all(split), FIRST_CELL[name] + np.arange(size))


def test_blocks_do_not_cross_the_ends_of_parts_and_can_be_read_in_any_order(store_path):
    split = open_store(store_path).split("train")
    assert split.block_sizes.dtype == np.int64
    assert split.block_sizes.tolist() == [10, 10, 10, 2, 10, 10, 10, 2, 6]
    starts = np.cumsum([0, *split.block_sizes])
    for index in (8, 3, 4, 0, 7):
        check_cells(split.read_block(index, COLUMNS), np.arange(starts[index], starts[index + 1]))


@pytest.mark.parametrize(
    "columns", [(), ("soma_joinid",), ("tissue", "cell_type"), ("cell_type", "cell_type"), ("tissue", "soma_joinid")]
)
def test_only_the_columns_that_are_asked_for_are_read(store_path, columns):
    block = open_store(store_path).split("train").read_block(4, columns)
    assert {*block.cells.schema.names} == {*PACKED_COLUMNS, *columns}
    cells = np.arange(32, 42)
    expected = {"cell_type": label_of(cells), "soma_joinid": cells, "tissue": cells % 2}
    for name in columns:
        np.testing.assert_array_equal(block.column(name), expected[name])
    np.testing.assert_allclose(block.x.toarray(), expression(cells), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fraction", "cells"), [(1.0, 70), (0.67, 70), (0.66, 64), (0.34, 64), (0.33, 32), (0.001, 32)]
)
def test_a_fraction_takes_the_first_parts_rounded_up(store_path, fraction, cells):
    check_cells(read_all(open_store(store_path).split("train", fraction)), np.arange(cells))


@pytest.mark.parametrize("sizes", [[70], [1] * 70, [7, 0, 40, 3, 20], [0, 10, 10, 50]], ids=str)
def test_a_file_does_not_depend_on_the_blocks_in_which_its_cells_came(tmp_path, sizes):
    cells = np.split(np.arange(70), np.cumsum(sizes)[:-1])
    (tmp_path / "train").mkdir()
    part = write_part(tmp_path / "train" / "part.0.arrow", map(block_of, cells), 10)
    (tmp_path / "other" / "train").mkdir(parents=True)
    ten_by_ten = [block_of(each) for each in np.split(np.arange(70), 7)]
    assert part == write_part(tmp_path / "other" / "train" / "part.0.arrow", ten_by_ten, 10)


def test_a_part_is_described_as_it_is(tmp_path):
    path = tmp_path / "part.3.arrow"
    part = write_part(path, [block_of(np.arange(64))], 10)
    cells = np.arange(64)
    # A file of one entry each: gene 0 and the last gene have one even if not expressed; 255 counts an entry.
    x, as_values = expression(cells), cells % 3 == 0
    last = x[:, -1] == 0
    value_entries = ((x > 0).sum(axis=1) + last)[as_values]
    count_entries = ((-(-counts_of(cells) // 255)).sum(axis=1) + last)[~as_values]
    assert part.file == "part.3.arrow"
    assert (part.cells, part.cells_as_counts) == (64, (~as_values).sum())
    assert part.non_zeros == np.count_nonzero(x)
    assert (part.count_entries, part.most_count_entries) == (count_entries.sum(), count_entries.max())
    assert (part.value_entries, part.most_value_entries) == (value_entries.sum(), value_entries.max())
    assert (part.bytes, part.xxh3_64) == (path.stat().st_size, xxhash.xxh3_64_hexdigest(path.read_bytes()))
    assert checksum(path) == part.xxh3_64


def test_a_split_says_how_many_entries_its_cells_have_on_average_and_at_most(store_path):
    split = open_store(store_path).split("train", 0.5)  # 64 cells in two parts
    streams = [(block.stream(("count_gaps", "counts")), block.stream(("value_gaps", "values")))
               for block in map(split.read_block, range(len(split.block_sizes)))]  # fmt: skip
    for which, entries in enumerate((split.count_entries, split.value_entries)):
        sizes = np.concatenate([np.diff(pair[which].offsets) for pair in streams])
        assert entries == (sizes.sum() / 64, sizes.max())


def test_a_part_without_cells_is_a_part(store_path):
    part = write_part(store_path / "train" / "part.0.arrow", [block_of(np.arange(0))], BLOCK_SIZE)
    assert (part.cells, part.non_zeros, part.most_count_entries) == (0, 0, 0)
    change_json(store_path, lambda about: about["splits"]["train"]["parts"].__setitem__(0, dataclasses.asdict(part)))
    store = open_store(store_path)
    check_cells(read_all(store.split("train")), np.arange(32, 70))
    check_cells(read_all(store.split("train", 0.5)), np.arange(32, 64))
    with pytest.raises(StoreError, match=r"the train split in \S+/train is empty"):
        store.split("train", 0.1)


def test_a_file_appears_when_it_is_complete(tmp_path):
    def broken():
        yield block_of(np.arange(30))
        assert not (tmp_path / "part.0.arrow").exists()
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_part(tmp_path / "part.0.arrow", broken(), 10)
    with pytest.raises(ValueError, match=r"part.0.arrow needs at least one block"):
        write_part(tmp_path / "part.0.arrow", [], 10)
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_does_not_depend_on_the_number_of_threads(store_path):
    split = open_store(store_path).split("train")
    alone = [split.read_block(i, COLUMNS) for i in range(9)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: split.read_block(i % 9, COLUMNS), range(90)))
    for i, block in enumerate(together):
        assert block.cells.equals(alone[i % 9].cells)


def test_a_flipped_bit_anywhere_in_a_file_is_found_or_does_no_harm(tmp_path):
    path = write_cell_store(tmp_path / "store", {"train": 8}, block_size=4)
    split = open_store(path).split("train")
    right = [split.read_block(i, COLUMNS).cells for i in range(2)]
    file = path / "train" / "part.0.arrow"
    data = file.read_bytes()
    harmless = 0
    for position in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position // 3 + position // 24) % 8
        file.write_bytes(damaged)
        index = position % 2
        try:
            read = split.read_block(index, COLUMNS).cells
        except StoreError as error:
            assert f"block {index} of {file} cannot be read (" in str(error)  # noqa: PT017
        else:
            harmless += 1
            assert read.equals(right[index]), f"byte {position}"
    assert 0 < harmless < 0.8 * len(data) / 3  # one block of two, and what Arrow pads, are not looked at


def test_a_file_that_is_cut_anywhere_after_the_store_was_opened_is_named(tmp_path):
    path = write_cell_store(tmp_path / "store", {"train": 8}, block_size=4)
    split = open_store(path).split("train")
    file = path / "train" / "part.0.arrow"
    data = file.read_bytes()
    for length in range(0, len(data), 37):
        file.write_bytes(data[:length])
        with pytest.raises(StoreError, match=r"block 1 of \S+/train/part.0.arrow cannot be read"):
            split.read_block(1)
    file.unlink()
    with pytest.raises(StoreError, match=r"block 1 of \S+/train/part.0.arrow cannot be read .*No such file"):
        split.read_block(1)


def test_missing_and_truncated_files_are_named_before_any_cell_is_read(store_path):
    file = store_path / "train" / "part.1.arrow"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    says = rf"train/part.1.arrow has {len(data) - 1} bytes, but store.json says {len(data)}; take the file from a copy"
    with pytest.raises(StoreError, match=says):
        open_store(store_path).split("train")
    file.unlink()
    with pytest.raises(StoreError, match=r"train/part.1.arrow does not exist, but store.json lists it; take the file"):
        open_store(store_path).split("train")
    open_store(store_path).split("train", 0.1)  # does not need it
    open_store(store_path).split("val")


def swap(one, other):
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.mark.parametrize("other", ["train/part.1.arrow", "val/part.0.arrow"])
def test_swapped_files_are_found_even_if_their_sizes_are_equal(tmp_path, other):
    path = write_cell_store(tmp_path / "store", {"train": 64, "val": 32})
    swap(path / "train" / "part.0.arrow", path / other)

    def equal_sizes(about):
        for name, split in about["splits"].items():
            for part in split["parts"]:
                part["bytes"] = (path / name / part["file"]).stat().st_size

    change_json(path, equal_sizes)
    with pytest.raises(StoreError, match=r"block 0 of \S+/train/part.0.arrow cannot be read \(wrong checksum: these"):
        open_store(path).split("train").read_block(0)


def test_blocks_in_another_order_are_found(store_path):
    file = store_path / "train" / "part.0.arrow"
    with pa.OSFile(str(file)) as opened:
        reader = ipc.open_file(opened)
        schema, batches = reader.schema, [reader.get_batch_with_custom_metadata(i) for i in (1, 0, 2, 3)]
    with ipc.new_file(file, schema, options=ipc.IpcWriteOptions(compression="zstd")) as writer:
        for batch, metadata in batches:
            writer.write_batch(batch, metadata)
    change_json(store_path, lambda about: about["splits"]["train"]["parts"][0].update(bytes=file.stat().st_size))
    split = open_store(store_path).split("train")
    check_cells(split.read_block(2, COLUMNS), np.arange(20, 30))
    for index in (0, 1):
        with pytest.raises(StoreError, match=rf"block {index} of \S+/part.0.arrow cannot be read \(wrong checksum"):
            split.read_block(index)


@pytest.mark.parametrize("kept", [0, 1], ids=["as values", "as counts"])
def test_a_store_may_have_one_stream_only(tmp_path, kept):
    path = write_cell_store(tmp_path / "store", {"train": 30})
    cells = np.arange(30)[(np.arange(30) % 3 > 0) == kept]
    part = write_part(path / "train" / "part.0.arrow", [block_of(cells)], BLOCK_SIZE)
    assert part.cells_as_counts == kept * len(cells)
    change_json(path, lambda about: about["splits"]["train"].update(parts=[dataclasses.asdict(part)]))
    block = read_all(open_store(path).split("train"))
    check_cells(block, cells)
    check_cells(block.take(np.arange(5)), cells[:5])


def test_a_part_with_other_cells_than_store_json_says_is_named(store_path):
    change_json(store_path, lambda about: about["splits"]["train"]["parts"][0].update(cells=31))
    with pytest.raises(StoreError, match=r"block 3 of \S+/part.0.arrow cannot be read \(it has 2 cells instead of 1\)"):
        open_store(store_path).split("train").read_block(3)


@pytest.mark.parametrize(
    "columns",
    [
        [*PACKED_COLUMNS, "cell_type", "tissue", "soma_joinid"],
        [*PACKED_COLUMNS, "tissue", "soma_joinid", "cell_type"],
        [*reversed(PACKED_COLUMNS), *COLUMNS],
        [*PACKED_COLUMNS, "cell_type", "soma_joinid", "donor_id"],
    ],
)
def test_columns_other_than_store_json_says_are_named(store_path, columns):
    change_json(store_path, lambda about: about.update(columns=columns))
    with pytest.raises(StoreError, match=r"block 0 of \S+/part.0.arrow cannot be read \(its columns are not \w+, "):
        open_store(store_path).split("train").read_block(0, tuple(columns[-3:]))


def test_a_column_that_the_store_has_not_is_named(store_path):
    split = open_store(store_path).split("train")
    with pytest.raises(StoreError, match=r"store.json lists no column 'assay'; it has cell_type, soma_joinid, tissue$"):
        split.read_block(0, ("cell_type", "assay"))


def test_a_code_outside_its_lookup_is_named(store_path):
    table = pd.DataFrame({"label": ["a"]})  # there are codes 0 and 1
    table.to_parquet(store_path / "categorical_lookup" / "tissue.parquet")
    split = open_store(store_path).split("val")
    split.read_block(0)  # does not need it
    with pytest.raises(StoreError, match=r"val/part.0.arrow has the tissue code 1, but tissue.parquet has the codes"):
        split.read_block(0, COLUMNS)


def test_cells_with_other_genes_than_the_side_files_are_not_read(store_path):
    genes = pd.read_parquet(store_path / "var.parquet")
    genes[:-1].to_parquet(store_path / "var.parquet")
    with pytest.raises(StoreError, match=r"part.0.arrow cannot be read \(its cells have 12 genes, but var.parquet"):
        open_store(store_path).split("train").read_block(0)


def in_part(**changed):
    return lambda about: about["splits"]["train"]["parts"][1].update(changed)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda about: about.update(format_version=2), "has format version 2, this hce_jax reads version 1; install"),
        (lambda about: about.pop("format_version"), "has format version None, this hce_jax reads version 1"),
        (lambda about: about.pop("block_size"), r"is damaged \(KeyError: 'block_size'\); take the file from a copy"),
        (lambda about: about.update(block_size=0), r"is damaged \(ValueError: block_size is 0\)"),
        (lambda about: about.update(block_size="10"), r"is damaged \(ValueError: block_size is '10'\)"),
        (lambda about: about.update(columns=COLUMNS), r"is damaged \(ValueError: columns are cell_type, soma_joinid"),
        (lambda about: about.update(columns=PACKED_COLUMNS), r"is damaged \(ValueError: columns are count_gaps"),
        (lambda about: about.update(columns=5), r"is damaged \(TypeError: "),
        (lambda about: about.update(splits=[]), r"is damaged \(AttributeError: "),
        (lambda about: about["splits"].update(val=[1]), r"is damaged \(TypeError: "),
        (lambda about: about["splits"]["val"].clear(), r"is damaged \(KeyError: 'parts'\)"),
        (lambda about: about["splits"]["val"]["parts"][0].pop("cells"), r"is damaged \(KeyError: 'cells'\)"),
        (in_part(cells="32"), r"is damaged \(ValueError: cells of a part is '32'\)"),
        (in_part(cells=-1), r"is damaged \(ValueError: cells of a part is -1\)"),
        (in_part(file=None), r"is damaged \(ValueError: file of a part is None\)"),
        (in_part(colour="blue"), r"is damaged \(TypeError: .*'colour'"),
    ],
)
def test_a_store_json_that_cannot_be_understood_is_named(store_path, change, says):
    change_json(store_path, change)
    with pytest.raises(StoreError, match=rf"store.json {says}"):
        open_store(store_path)


def test_a_store_json_cut_in_the_middle_is_named(store_path):
    text = (store_path / "store.json").read_text()
    (store_path / "store.json").write_text(text[: len(text) // 2])
    with pytest.raises(StoreError, match=r"store.json is not a readable JSON object"):
        open_store(store_path)


def test_a_split_that_the_store_lacks_is_named(store_path):
    store = open_store(store_path)
    assert [store.has_split(name) for name in ("train", "val", "test")] == [True, True, False]
    with pytest.raises(StoreError, match=r"store.json lists no test parts; the store lacks its test split"):
        store.split("test")
    with pytest.raises(ValueError, match=r"a split is one of train, val, test, not 'training'"):
        store.split("training")


def test_a_store_can_be_moved(store_path, tmp_path):
    shutil.move(store_path, tmp_path / "elsewhere")
    check_cells(read_all(open_store(tmp_path / "elsewhere").split("val")), 1000 + np.arange(23))
