import dataclasses
import importlib
import json
import shutil
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from stores import N_GENES, SIZES, cells_of, write_tiny_store

from hce_jax.errors import StoreError
from hce_jax.preprocess import normalize_log1p
from hce_jax.store import convert, open_store
from hce_jax.store.merlin_write import write_split
from hce_jax.store.schema import CATEGORICAL_COLUMNS

module = importlib.import_module("hce_jax.store.convert")  # the package's `convert` is the function

PACKED = ["count_gaps", "counts", "value_gaps", "values", "scale"]
#: Cells of this train split whose expression counts explain; that of the others is not a whole number of anything.
N_COUNTED, N_VALUED = 70, 20


def write_source(folder):
    """Write the tiny store with a train split of 90 cells in 12 parts, 70 of them counts; columns of several kinds."""
    write_tiny_store(folder, {split: size for split, size in SIZES.items() if split != "train"})
    rng = np.random.default_rng(5)
    counted = rng.poisson(rng.gamma(0.3, 3.0, (N_COUNTED, N_GENES))).astype(np.float32)
    counted[:, 3] = 1  # the smallest count tells the scale
    valued = rng.uniform(0.1, 2, (N_VALUED, N_GENES)) * (np.arange(N_GENES) % 2)
    x = sp.vstack([normalize_log1p(sp.csr_array(counted)), sp.csr_array(valued)]).tocsr()
    n_cells = N_COUNTED + N_VALUED
    rows = rng.permutation(n_cells)
    obs = pd.DataFrame({column: rng.integers(0, 2, n_cells) for column in CATEGORICAL_COLUMNS})
    obs = obs.assign(soma_joinid=2**40 + np.arange(n_cells), is_primary_data=np.arange(n_cells) % 3 == 0)
    write_split(folder / "train", x[rows], obs.iloc[rows], rows_per_part=8, rows_per_group=3)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "merlin")


@pytest.fixture(scope="module")
def converted(source):
    convert(source, source.parent / "cells", workers=2)
    return source.parent / "cells"


@pytest.fixture
def own_source(source, tmp_path):
    return shutil.copytree(source, tmp_path / "merlin")


def parts(folder, split, suffix):
    return sorted((folder / split).glob(f"part.*.{suffix}"), key=lambda path: int(path.name.split(".")[1]))


def unpacked(batch, n_genes):
    """Read a batch by the words of the format alone: walk each stream entry by entry."""
    x = np.zeros((batch.num_rows, n_genes))
    for cell in range(batch.num_rows):
        for gaps, amounts, dtype in (("count_gaps", "counts", np.uint8), ("value_gaps", "values", np.float32)):
            gene = -1
            entries = zip(batch[gaps][cell].as_py(), np.frombuffer(batch[amounts][cell].as_py(), dtype), strict=True)
            for gap, amount in entries:
                gene += gap
                x[cell, gene] += amount
        if batch["scale"][cell].as_py():
            x[cell] = np.log1p(x[cell] * batch["scale"][cell].as_py())
    return x


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_each_part_has_the_cells_of_its_source_within_1e_6_and_all_its_integer_columns(source, converted, split):
    made, originals = parts(converted, split, "arrow"), parts(source, split, "parquet")
    assert [path.stem for path in made] == [path.stem for path in originals]
    for path, original in zip(made, originals, strict=True):
        table = pq.read_table(original)
        with ipc.open_file(path) as file:
            batches = [file.get_batch(i) for i in range(file.num_record_batches)]
            assert file.schema.names == PACKED + [name for name in table.column_names if name != "X"]
        x = np.concatenate([unpacked(batch, N_GENES) for batch in batches])
        np.testing.assert_allclose(x, np.array(table["X"].to_pylist()), rtol=0, atol=1e-6)
        for name in table.column_names[1:]:
            values = np.concatenate([batch[name].to_numpy() for batch in batches])
            assert values.dtype == np.int64
            assert values.tolist() == table[name].to_numpy().astype(int).tolist()


@pytest.mark.parametrize("fraction", [0.05, 0.3, 1.0])
def test_a_part_of_the_split_is_the_same_cells_in_both_stores(source, converted, fraction):
    def ids(path):
        split = open_store(path).split("train", fraction)
        blocks = [split.read_block(i, ("cell_type", "soma_joinid")) for i in range(len(split.block_sizes))]
        return np.concatenate([block.column("soma_joinid") for block in blocks]).tolist()

    assert ids(converted) == ids(source)
    assert len(ids(converted)) == min(90, 8 * np.ceil(12 * fraction))


def test_store_json_counts_what_is_there(source, converted):
    about = json.loads((converted / "store.json").read_text())
    x = np.concatenate([np.array(pq.read_table(path)["X"].to_pylist()) for path in parts(source, "train", "parquet")])
    train = about["splits"]["train"]
    assert len(train.pop("parts")) == 12
    assert train == {"cells": 90, "blocks": 12, "non_zeros": np.count_nonzero(x), "cells_as_counts": N_COUNTED,
                     "cells_as_values": N_VALUED}  # fmt: skip
    assert about["format"], about["format_version"] == ("cells", 1)
    assert about["source"] == str(source)
    assert about["columns"][:5] == PACKED
    assert about["splits"]["val"]["cells"] == SIZES["val"]


def test_the_result_counts_cells_kept_as_counts_and_as_values(source, tmp_path):
    done = convert(source, tmp_path / "cells")
    folder = tmp_path / "cells"
    sizes = [path.stat().st_size for path in folder.rglob("*.arrow")]
    tiny = SIZES["val"] + SIZES["test"]
    counted = sum(
        split["cells_as_counts"] for split in json.loads((folder / "store.json").read_text())["splits"].values()
    )
    expected = {"cells": {"train": 90, "val": SIZES["val"], "test": SIZES["test"]}, "cells_as_counts": counted,
                "files": 14, "bytes": sum(sizes), "new_cells": 90 + tiny, "verified": False}  # fmt: skip
    assert expected.items() <= dataclasses.asdict(done).items()
    assert N_COUNTED <= counted <= N_COUNTED + tiny


def test_side_files_are_copied_and_other_files_are_not(own_source, tmp_path):
    (own_source / "class_weights_3.npy").write_bytes(b"more weights")
    (own_source / "ood").mkdir()
    (own_source / "ood" / "study.h5ad").write_bytes(b"study")
    (own_source / "store.json").write_text(json.dumps({"simulated": True, "splits": {"train": {"cells": 7}}}))
    for unwanted in ("tb_logs/run/checkpoint", "train/_metadata", "val/_common_metadata", ".cache/file", ".hidden"):
        (own_source / unwanted).parent.mkdir(parents=True, exist_ok=True)
        (own_source / unwanted).write_bytes(b"unwanted")
    for path in own_source.rglob("*.npy"):
        path.chmod(0o400)
    convert(own_source, tmp_path / "cells")
    found = contents(tmp_path / "cells")
    assert {path: data for path, data in found.items() if path.suffix != ".arrow" and path.name != "store.json"} == {
        path: data
        for path, data in contents(own_source).items()
        if path.parts[0] in ("var.parquet", "categorical_lookup", "cell_type_hierarchy", "ood")
        or path.name.startswith("class_weights")
    }
    assert (tmp_path / "cells" / "class_weights.npy").stat().st_mode & 0o200  # not read-only as its source is
    about = json.loads((tmp_path / "cells" / "store.json").read_text())
    assert about["simulated"] is True
    assert about["splits"]["train"]["cells"] == 90
    assert about["side_files"]["ood/study.h5ad"] == {
        "bytes": 5,
        "xxh3_64": module.checksum(own_source / "ood/study.h5ad"),
    }


def test_the_number_of_workers_changes_no_byte(source, converted, tmp_path):
    for workers in (1, 3):
        convert(source, tmp_path / f"cells{workers}", workers=workers)
        assert contents(tmp_path / f"cells{workers}") == contents(converted)


def test_a_source_with_one_split_is_converted(tmp_path):
    source = write_tiny_store(tmp_path / "merlin", {"val": 23})
    assert convert(source, tmp_path / "cells").cells == {"val": 23}
    assert cells_of(open_store(tmp_path / "cells").split("val").read_block(0).x.toarray()).tolist() == [
        *range(1000, 1023)
    ]


def test_an_empty_part_keeps_its_place_and_a_missing_one_is_told(own_source, tmp_path, capsys):
    path = own_source / "train" / "part.2.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    (own_source / "train" / "part.5.parquet").unlink()
    convert(own_source, tmp_path / "cells", verify=True)
    said = capsys.readouterr().err
    assert f"{own_source / 'train'} lacks part.5.parquet; converting what is there" in said
    sizes = [
        part["cells"] for part in json.loads((tmp_path / "cells/store.json").read_text())["splits"]["train"]["parts"]
    ]
    assert sizes == [8, 8, 0, 8, 8, 8, 8, 8, 8, 8, 2]
    for path in (own_source, tmp_path / "cells"):
        assert open_store(path).split("train", 0.3).n_cells == 24  # 4 of 11 parts


def test_columns_that_are_not_integers_are_left_out_and_named(own_source, tmp_path, capsys):
    for path in own_source.rglob("part.*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.append_column("barcode", pa.array(["AC"] * len(table))), path)
    convert(own_source, tmp_path / "cells")
    assert "left out, because they are not integers: barcode" in capsys.readouterr().out
    assert "barcode" not in json.loads((tmp_path / "cells" / "store.json").read_text())["columns"]


def rewrite(path, change):
    pq.write_table(change(pq.read_table(path)), path)


REFUSED = {
    "a column that one part lacks": (
        lambda folder: rewrite(folder / "val/part.0.parquet", lambda table: table.drop_columns(["donor_id"])),
        "train/part.0.parquet has the column 'donor_id', .*val/part.0.parquet has not; all parts must have the same",
    ),
    "a column with a name of the format": (
        lambda folder: [
            rewrite(path, lambda table: table.rename_columns({"donor_id": "scale"}))
            for path in folder.rglob("part.*.parquet")
        ],
        "part.0.parquet has a column 'scale', of which a cell store keeps its own; rename it",
    ),
    "a column twice": (
        lambda folder: rewrite(
            folder / "train/part.0.parquet", lambda table: table.append_column("donor_id", table["donor_id"])
        ),
        "train/part.0.parquet has a column 'donor_id', more than once; rename it",
    ),
    "a code that is in no table": (
        lambda folder: rewrite(
            folder / "train/part.3.parquet",
            lambda table: table.drop_columns("donor_id").append_column("donor_id", pa.array([0, 1, 2, 0, 0, 0, 0, 0])),
        ),
        "train/part.3.parquet has the donor_id code 2, but donor_id.parquet has the codes 0 to 1; .* are finished",
    ),
    "no parts at all": (
        lambda folder: [path.unlink() for path in folder.rglob("part.*.parquet")],
        "merlin has no train/, val/, test/ with part.N.parquet files; nothing to convert",
    ),
    "a truncated part": (
        lambda folder: (folder / "test/part.0.parquet").write_bytes(b"PAR1"),
        "test/part.0.parquet is truncated or not a parquet file",
    ),
    "a missing side file": (
        lambda folder: (folder / "var.parquet").unlink(),
        "merlin/var.parquet does not exist; a store needs it",
    ),
    "another format": (
        lambda folder: (folder / "store.json").write_text('{"format": "zarr"}'),
        "merlin is a store of the format 'zarr'; convert takes a store in the merlin format",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_source_is_refused_with(own_source, tmp_path, case):
    spoil, says = REFUSED[case]
    spoil(own_source)
    with pytest.raises(StoreError, match=says):
        convert(own_source, tmp_path / "cells")
    assert not (tmp_path / "cells").exists()


def test_places_that_cannot_be_are_refused(source, converted, tmp_path):
    (tmp_path / "file").write_text("")
    for from_, to, says in (
        (tmp_path / "nowhere", tmp_path / "cells", "nowhere is not a folder; name the folder of a merlin store"),
        (converted, tmp_path / "cells", "cells is a cell store already; convert takes a store in the merlin format"),
        (source, source / "cells", "lie in one another; name a destination beside the source"),
        (source, source.parent, "lie in one another; name a destination beside the source"),
        (source, source, "lie in one another; name a destination beside the source"),
        (source, converted, "cells exists already; remove it or name another folder"),
        (source, tmp_path / "file" / "cells", "cannot use .*file/cells.partial: Not a directory"),
    ):
        with pytest.raises(StoreError, match=says):
            convert(from_, to)
    with pytest.raises(ValueError, match="workers must be at least 1, not 0"):
        convert(source, tmp_path / "cells", workers=0)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_workers_are_bounded_by_the_memory_of_their_row_groups(source, monkeypatch):
    plan = module._Plan.of(source)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: range(64), raising=False)
    assert plan.default_workers() == 16  # more threads would leave each other waiting
    each = 8 * 8 * N_GENES * 4  # the largest row group, of val and test, has 8 cells
    monkeypatch.setattr(module, "_MEMORY", 5 * each + 1)
    assert plan.default_workers() == 5
    monkeypatch.setattr(module, "_MEMORY", 1)
    assert plan.default_workers() == 1


# --- verify -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_converted(source, converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "cells")


def test_verify_of_an_existing_store_only_compares(source, own_converted, capsys):
    before = {path: path.stat().st_mtime_ns for path in own_converted.rglob("*")}
    done = convert(source, own_converted, verify=True)
    assert done.verified
    assert done.new_cells == 0
    assert sum(done.cells.values()) == 130
    assert f"{own_converted} exists: comparing it with {source}, converting nothing" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in own_converted.rglob("*")} == before


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_verify_finds_a_flipped_byte_wherever_it_is_and_names_file_and_block(source, own_converted):
    said = []
    for name in ("train/part.3.arrow", "var.parquet", "class_weights.npy"):
        path = own_converted / name
        size = path.stat().st_size
        for offset in range(size // 40, size, size // 10):
            flip(path, offset)
            with pytest.raises(StoreError, match=path.name.split(".")[0]) as caught:
                convert(source, own_converted, verify=True)
            said.append(str(caught.value))
            flip(path, offset)
    assert sum(f"block 0 of {own_converted}/train/part.3.arrow" in each for each in said) > 3
    assert any(f"{own_converted}/train/part.3.arrow is damaged: its checksum" in each for each in said)  # the schema
    convert(source, own_converted, verify=True)


def changed_value(table):
    x = np.array(table["X"].to_pylist(), np.float32)
    x[6, 4] += 1e-5
    return table.set_column(0, "X", pa.array(list(x), pa.list_(pa.float32())))


def changed_column(table):
    idx = table["idx"].to_numpy().copy()
    idx[7] += 1
    return table.set_column(table.schema.get_field_index("idx"), "idx", pa.array(idx))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (changed_value, r"differs from .*train/part.7.parquet in block 0: expression \(by 1e-05\)"),
        (changed_column, "differs from .*train/part.7.parquet in block 0: the column 'idx'"),
        (lambda table: table.slice(0, 7), "train/part.7.arrow has 8 cells, .*train/part.7.parquet has 7"),
    ],
)
def test_verify_finds_a_difference_to_the_source(own_source, own_converted, change, says):
    rewrite(own_source / "train" / "part.7.parquet", change)
    with pytest.raises(StoreError, match=says):
        convert(own_source, own_converted, verify=True)


def test_verify_compares_blocks_that_span_row_groups_and_parts_of_several_blocks(tmp_path):
    source = write_tiny_store(tmp_path / "merlin", {"train": 1300}, rows_per_part=1200, rows_per_group=100)
    assert convert(source, tmp_path / "cells", verify=True).verified
    path = source / "train" / "part.0.parquet"
    table = pq.read_table(path)
    idx = table["idx"].to_numpy().copy()
    idx[1030] += 1
    rewrite(path, lambda table: table.set_column(table.schema.get_field_index("idx"), "idx", pa.array(idx)))
    with pytest.raises(StoreError, match="in block 2: the column 'idx'"):
        convert(source, tmp_path / "cells", verify=True)


def test_verify_tells_a_store_that_was_not_made_from_this_source(own_source, own_converted):
    (own_source / "train" / "part.11.parquet").unlink()
    with pytest.raises(
        StoreError, match=r"is no conversion of .*: the file train/part.11.arrow is in one of them only"
    ):
        convert(own_source, own_converted, verify=True)
    with pytest.raises(StoreError, match="is not a cell store; name another folder"):
        convert(own_converted.parent / "merlin", write_tiny_store(own_converted.parent / "other"), verify=True)


def test_verify_compares_side_files_with_the_source(own_source, own_converted):
    np.save(own_source / "class_weights.npy", np.full(5, 2.0))
    with pytest.raises(StoreError, match=r"cells/class_weights.npy is not a copy of .*merlin/class_weights.npy"):
        convert(own_source, own_converted, verify=True)


@pytest.mark.parametrize("damaged", ["train/part.4.arrow", "var.parquet", "categorical_lookup/cell_type.parquet"])
def test_a_file_damaged_before_the_end_is_made_anew_by_the_same_command(source, tmp_path, monkeypatch, damaged):
    finish = module.WorkFolder.finish

    def damaging(work, name, make):
        finish(work, name, make)
        if name == damaged:
            flip(work.store / name, (work.store / name).stat().st_size // 3)

    monkeypatch.setattr(module.WorkFolder, "finish", damaging)
    with pytest.raises(StoreError, match=damaged):
        convert(source, tmp_path / "cells", verify=True, workers=1)
    assert not (tmp_path / "cells").exists()
    monkeypatch.undo()
    done = convert(source, tmp_path / "cells", verify=True)
    assert done.new_cells == (8 if damaged.endswith("arrow") else 0)
    assert done.verified


def test_a_short_conversion_is_silent_but_for_its_report(source, tmp_path, capsys):
    started = time.monotonic()
    convert(source, tmp_path / "cells")
    if time.monotonic() - started < 10:
        assert capsys.readouterr().err == ""


# --- what a cell store notices when it is opened ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["var.parquet", "categorical_lookup/cell_type.parquet"])
def test_genes_and_codes_that_others_than_the_cells_came_with_are_refused(own_converted, name):
    path = own_converted / name
    table = pq.read_table(path)
    pq.write_table(table.take(list(range(len(table)))[::-1]), path)
    with pytest.raises(StoreError, match=rf"{path} is not the file that store.json describes"):
        open_store(own_converted)


def test_a_part_that_is_missing_from_the_list_is_noticed_by_the_total(own_converted):
    path = own_converted / "store.json"
    about = json.loads(path.read_text())
    about["splits"]["train"]["parts"].pop()
    path.write_text(json.dumps(about))
    with pytest.raises(StoreError, match=r"store.json is damaged .*the parts of train have \d+ cells, not 90"):
        open_store(own_converted)


def test_a_cell_store_without_its_store_json_is_not_taken_for_a_merlin_store(own_converted):
    (own_converted / "store.json").unlink()
    with pytest.raises(StoreError, match=r"store.json does not exist, but a cell store needs it"):
        open_store(own_converted)


def test_a_split_that_the_source_lacks_is_told(tmp_path, capsys):
    convert(write_tiny_store(tmp_path / "merlin", {"train": 20}), tmp_path / "cells")
    assert "merlin lacks its val and test split; converting what is there" in capsys.readouterr().err
