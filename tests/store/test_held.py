import threading

import numpy as np
import psutil
import pytest
from coded_cells import block_of, check_rows, coded_split, write_cell_store, write_merlin_store

from hce_jax.errors import StoreError
from hce_jax.store import hold, open_store
from hce_jax.store.block import COUNTS, PACKED_COLUMNS, VALUES
from hce_jax.store.held import read_blocks


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    write_merlin_store(folder / "merlin", {"train": 90}, rows_per_part=32, rows_per_group=8)
    write_cell_store(folder / "cells", {"train": 90}, rows_per_part=32, block_size=8)
    return {kind: open_store(folder / kind).split("train") for kind in ("merlin", "cells")}


@pytest.mark.parametrize("kind", ["merlin", "cells"])
def test_it_has_the_same_blocks_bit_for_bit_and_reads_nothing_more(splits, kind, monkeypatch):
    split = splits[kind]
    held = hold(split)
    expected = [split.read_block(index) for index in range(12)]
    monkeypatch.setattr(type(split), "read_block", None)
    assert (held.name, held.side, held.n_cells) == ("train", split.side, 90)
    np.testing.assert_array_equal(held.block_sizes, split.block_sizes)
    assert held.block_sizes.dtype == np.int64
    for index, block in enumerate(expected):
        assert held.read_block(index).cells.equals(block.cells)
        cells = np.arange(8 * index, min(8 * index + 8, 90))
        check_rows(held.read_block(index).x.toarray(), held.read_block(index).column("cell_type"), cells)


def test_it_holds_expression_and_labels_only(splits):
    assert {*hold(splits["cells"]).read_block(0).cells.schema.names} == {*PACKED_COLUMNS, "cell_type"}


@pytest.mark.parametrize("kind", ["merlin", "cells"])
def test_it_counts_its_entries(splits, kind):
    """Also for a merlin store, whose own account is a guess."""
    held = hold(splits[kind])
    block = block_of(np.arange(90), as_values=kind == "merlin")
    for entries, names in ((held.count_entries, COUNTS), (held.value_entries, VALUES)):
        of_cells = np.diff(block.stream(names).offsets)
        assert entries.mean == pytest.approx(of_cells.mean())
        assert entries.most == of_cells.max()
    if kind == "cells":
        assert held.count_entries == pytest.approx(splits[kind].count_entries)
        assert held.value_entries == pytest.approx(splits[kind].value_entries)


@pytest.mark.parametrize("chosen", [None, [], [5], [3, 4, 5], list(range(40))], ids=str)
def test_blocks_are_read_in_order_those_chosen_or_all(chosen):
    split = coded_split([3] * 40)
    expected = range(40) if chosen is None else chosen
    found = [block.column("cell_type").tolist() for block in read_blocks(split, chosen)]
    assert found == [split.blocks[index].column("cell_type").tolist() for index in expected]
    assert sorted(split.reads) == list(expected)


def test_blocks_are_not_read_far_ahead(monkeypatch):
    monkeypatch.setattr("hce_jax.store.held.n_readers", lambda: 2)
    split = coded_split([1] * 40)
    blocks = read_blocks(split)
    next(blocks)
    blocks.close()
    assert 1 <= len(split.reads) <= 9


def test_a_damaged_block_is_named_and_no_threads_stay():
    split = coded_split([3] * 40)
    split.damaged.add(17)
    before = set(threading.enumerate())
    with pytest.raises(StoreError, match="block 17 is damaged"):
        hold(split)
    assert set(threading.enumerate()) <= before


def test_too_little_memory_is_told_with_both_sizes_before_anything_is_read(monkeypatch):
    split = coded_split([8] * 11)
    needed = sum(block.cells.get_total_buffer_size() for block in split.blocks)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=int(1.05 * needed)))
    assert len(hold(split).blocks) == 11
    split.reads.clear()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=int(0.95 * needed)))
    with pytest.raises(
        StoreError, match=r"the train split of coded takes about 0.0 GiB of memory, and 0.0 GiB are free"
    ):
        hold(split)
    assert not split.reads
