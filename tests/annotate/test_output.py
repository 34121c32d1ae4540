"""The annotated copy; the oracle is anndata, reading the input and the copy."""

import errno
import os
import resource
import warnings
from types import SimpleNamespace

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata import AnnData
from given_cells import (
    N_CELLS,
    N_GENES,
    check_same,
    counts_of,
    given_cells,
    ids_of,
    plain_cells,
    read,
    write,
    write_tenx,
    write_tenx_folder,
)

from hce_jax.annotate import output as output_module
from hce_jax.annotate.output import open_output
from hce_jax.annotate.query import open_query
from hce_jax.errors import SourceError

EMBEDDING = np.arange(3 * N_CELLS, dtype=np.float32).reshape(N_CELLS, 3)
UNS = {"version": "1", "cells": 30, "max_error": 0.05, "genes": pd.DataFrame({"gene": ["CD4"], "score": [1.5]})}


def columns_of(barcodes):
    labels = ["T cell"] * 20 + ["neuron"] * 10
    return pd.DataFrame({"hce_label": labels, "hce_confidence": np.linspace(0, 1, N_CELLS)}, index=barcodes)


def annotate(source, path, **options):
    with open_query(source) as query, open_output(query, path, **options) as output:
        write_annotation(output, query)


def write_annotation(output, query):
    array = output.array("X_hce", EMBEDDING.shape)
    array[0:12] = EMBEDDING[0:12]
    array[12:30] = EMBEDDING[12:30].astype(np.float64)
    output.finish(columns_of(query.barcodes), UNS)


def check_annotation(adata):
    assert [*adata.obs][-2:] == ["hce_label", "hce_confidence"]
    assert isinstance(adata.obs["hce_label"].dtype, pd.CategoricalDtype)
    assert adata.obs["hce_label"].tolist() == ["T cell"] * 20 + ["neuron"] * 10
    assert adata.obs["hce_confidence"].tolist() == np.linspace(0, 1, N_CELLS).tolist()
    assert adata.obsm["X_hce"].dtype == np.float32
    np.testing.assert_array_equal(adata.obsm["X_hce"], EMBEDDING)
    entry = adata.uns["hce_jax"]
    assert (entry["version"], entry["cells"], entry["max_error"]) == ("1", 30, 0.05)
    assert entry["genes"]["gene"].tolist() == ["CD4"]


def without_annotation(adata):
    adata.obs = adata.obs.drop(columns=[name for name in adata.obs if name.startswith("hce_")])
    del adata.obsm["X_hce"], adata.uns["hce_jax"]
    return adata


def nothing_but(folder, *names):
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize(
    ("suffix", "copy_suffix", "zarr_format"),
    [(".h5ad", ".h5ad", 2), (".h5ad", ".zarr", 2), (".zarr", ".h5ad", 2), (".zarr", ".zarr", 3)],
)
def test_the_copy_has_the_annotation_and_all_else_as_it_was(tmp_path, monkeypatch, suffix, copy_suffix, zarr_format):
    monkeypatch.setattr(output_module, "_VALUES_AT_A_TIME", 50)  # a matrix is copied in several goes
    path = write(given_cells(), tmp_path / f"cells{suffix}", zarr_format)
    copy = tmp_path / f"copy{copy_suffix}"
    annotate(path, copy)
    nothing_but(tmp_path, path.name, copy.name)
    found = read(copy)
    check_annotation(found)
    check_same(without_annotation(found), read(path))
    if suffix == copy_suffix == ".zarr":
        assert zarr.open_group(copy, mode="r").metadata.zarr_format == zarr_format


def test_the_input_is_not_touched_and_the_bytes_of_other_elements_are_copied(tmp_path):
    path = write(given_cells(), tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        file.create_dataset("X_of_others", data=np.arange(9), compression="gzip")
        file.attrs["note"] = "kept"
    path.chmod(0o444)
    before, status = path.read_bytes(), path.stat()
    annotate(path, tmp_path / "copy.h5ad")
    assert path.read_bytes() == before
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    with h5py.File(tmp_path / "copy.h5ad") as file:
        assert file["X_of_others"].compression == "gzip"
        assert file.attrs["note"] == "kept"


@pytest.mark.parametrize(
    ("write_input", "suffix"), [(write_tenx, ".h5ad"), (write_tenx, ".zarr"), (write_tenx_folder, ".h5ad")]
)
def test_10x_output_becomes_a_file_of_anndata(tmp_path, write_input, suffix):
    annotate(write_input(tmp_path / "cells.h5"), tmp_path / f"copy{suffix}")
    found = read(tmp_path / f"copy{suffix}")
    check_annotation(found)
    np.testing.assert_array_equal(found.X.toarray(), counts_of(range(N_CELLS)))
    assert found.var_names.tolist() == found.var["feature_id"].tolist() == ids_of(range(N_GENES))
    nothing_but(tmp_path, "cells.h5", f"copy{suffix}")


@pytest.mark.filterwarnings("ignore:.*old version of AnnData")
def test_files_of_older_versions_come_out_in_todays_form(tmp_path):
    names = np.array([f"cell {cell}" for cell in range(N_CELLS)])
    records = np.array([*zip(names, range(N_CELLS), strict=True)], [("index", h5py.string_dtype()), ("n", "i4")])
    with h5py.File(tmp_path / "oldest.h5ad", "w") as file:  # from before anndata 0.7
        file["obs"] = records
        file["var"] = np.array([(name,) for name in ids_of(range(N_GENES))], [("index", h5py.string_dtype())])
        file["X"] = counts_of(range(N_CELLS))
    with h5py.File(write(given_cells(), tmp_path / "older.h5ad"), "r+") as file:  # of anndata 0.7
        codes, categories = file["obs/leiden/codes"][:], file["obs/leiden/categories"][:]
        del file["obs/leiden"]
        file["obs/leiden"], file["obs/__categories/leiden"] = codes, categories
        file["obs/leiden"].attrs["categories"] = file["obs/__categories/leiden"].ref
        file["obs"].attrs["encoding-version"] = "0.1.0"
    for name in ("oldest", "older"):
        annotate(tmp_path / f"{name}.h5ad", tmp_path / f"{name}_copy.h5ad")
        with warnings.catch_warnings(action="error"):
            found = read(tmp_path / f"{name}_copy.h5ad")
        check_annotation(found)
        assert found.obs["n"].tolist() == [*range(N_CELLS)]
        assert found.obs_names.tolist() == names.tolist()
    assert found.obs["leiden"].tolist() == list("abc") * 10


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_what_an_earlier_annotation_left_is_replaced(tmp_path, suffix):
    adata = plain_cells()
    adata.obs["hce_label"], adata.obs["n"], adata.obs["hce_group_label"] = "neuron", 1, "neuron"
    adata.obsm["X_hce"] = np.ones((N_CELLS, 99))
    adata.obsm["hce_probabilities"] = np.ones((N_CELLS, 9))
    adata.obsm["X_pca"] = np.ones((N_CELLS, 3))
    adata.obs["hce_mine"], adata.obsm["X_hce_umap"] = 3, np.ones((N_CELLS, 2))  # another's, whatever its name
    written = {"obs": np.array(["hce_label", "hce_group_label"]), "obsm": np.array(["X_hce", "hce_probabilities"])}
    adata.uns["hce_jax"] = {"earlier": 1, "written": written}
    for source in (write(adata, tmp_path / f"cells{suffix}"), adata):
        path = None if source is adata else tmp_path / f"copy{suffix}"
        annotate(source, path)
        found = adata if path is None else read(path)
        check_annotation(found)
        assert [*found.obs] == ["n", "hce_mine", "hce_label", "hce_confidence"]
        assert set(found.obsm) == {"X_hce", "X_pca", "X_hce_umap"}
        assert "earlier" not in found.uns["hce_jax"]


def test_columns_of_others_are_kept_whatever_their_names_unless_ours_are_called_so(tmp_path):
    adata = given_cells()
    adata.obs["hce_of_mine"], adata.obs["hce_label"] = 1, 2
    for source in (write(adata, tmp_path / "cells.h5ad"), adata):
        annotate(source, None if source is adata else tmp_path / "copy.h5ad")
        found = adata if source is adata else read(tmp_path / "copy.h5ad")
        assert [*found.obs] == ["leiden", "n", "hce_of_mine", "hce_label", "hce_confidence"]
        assert found.obs["hce_label"].tolist() == ["T cell"] * 20 + ["neuron"] * 10


def test_a_file_with_nothing_but_a_matrix_is_annotated(tmp_path):
    with h5py.File(write(AnnData(counts_of(range(N_CELLS))), tmp_path / "cells.h5ad"), "r+") as file:
        for name in ("obsm", "obsp", "varm", "varp", "layers", "uns"):
            del file[name]
    annotate(tmp_path / "cells.h5ad", tmp_path / "copy.h5ad")
    check_annotation(read(tmp_path / "copy.h5ad"))


@pytest.mark.parametrize("is_backed", [False, True])
def test_an_anndata_gets_the_annotation_itself_when_all_is_done(tmp_path, is_backed):
    path = write(given_cells(), tmp_path / "cells.h5ad")
    before = path.read_bytes()
    adata = anndata.read_h5ad(path, backed="r" if is_backed else None)
    with open_query(adata) as query, open_output(query) as output:
        array = output.array("X_hce", EMBEDDING.shape)
        array[0:30] = EMBEDDING
        assert "X_hce" not in adata.obsm
        output.finish(columns_of(query.barcodes), UNS)
    check_annotation(adata)
    if is_backed:
        adata.file.close()
    else:
        check_same(without_annotation(adata), read(path))
    assert path.read_bytes() == before


def test_a_backed_anndata_may_be_written_to_a_file(tmp_path):
    path = write(given_cells(), tmp_path / "cells.h5ad")
    for mode in ("r", None):
        annotate(anndata.read_h5ad(path, backed=mode), tmp_path / f"copy{mode}.h5ad")
        found = read(tmp_path / f"copy{mode}.h5ad")
        check_annotation(found)
        check_same(without_annotation(found), read(path))


def test_a_file_needs_a_name_for_its_copy(tmp_path):
    with open_query(write(given_cells(), tmp_path / "cells.h5ad")) as query:
        with pytest.raises(ValueError, match=r"cells.h5ad is no AnnData: name the file"), open_output(query):
            pass


@pytest.mark.parametrize("path", [None, "copy.h5ad"])
def test_other_cells_than_those_given_are_an_error(tmp_path, path):
    adata = given_cells()
    with open_query(adata) as query:
        with pytest.raises(ValueError, match="barcodes are not those of the 30 cells"):
            with open_output(query, path and tmp_path / path) as output:
                output.finish(columns_of(query.barcodes[::-1]), UNS)
        with pytest.raises(ValueError, match="an array of 29 rows for 30 cells"):
            with open_output(query, path and tmp_path / path) as output:
                output.array("X_hce", (29, 3))
    nothing_but(tmp_path)
    assert "hce_label" not in adata.obs


# --- what is refused, and what is left --------------------------------------------------------------------------------


def refused(source, path, says, **options):
    before = {each.name for each in path.parent.iterdir()} if path.parent.is_dir() else set()
    with pytest.raises(SourceError, match=says) as caught:
        annotate(source, path, **options)
    assert "\n" not in str(caught.value)
    if path.parent.is_dir():
        assert {each.name for each in path.parent.iterdir()} == before


def test_names_that_cannot_be_used_are_refused(tmp_path):
    source = write(plain_cells(), tmp_path / "cells.h5ad")
    (tmp_path / "there.h5ad").write_text("")
    (tmp_path / "broken.h5ad").symlink_to("nowhere")
    (tmp_path / "folder.zarr").mkdir()
    refused(source, tmp_path / "copy.csv", "copy.csv': an annotated copy is written as .h5ad or .zarr; name it so")
    refused(source, tmp_path / "no" / "copy.h5ad", "the folder of .*copy.h5ad does not exist; make it, or name")
    for name in ("there.h5ad", "broken.h5ad", "folder.zarr"):
        refused(source, tmp_path / name, rf"{name} exists already; name another file \(-o\), or remove it")
    refused(source, tmp_path / "folder.zarr", "folder.zarr is a folder, and none of zarr; name", overwrite=True)
    (tmp_path / "folder.h5ad").mkdir()
    refused(source, tmp_path / "folder.h5ad", "folder.h5ad is a folder, and none of zarr; name", overwrite=True)
    (tmp_path / "file.zarr").write_text("")
    refused(source, tmp_path / "file.zarr", "file.zarr is a file, and zarr is a folder; name", overwrite=True)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_the_input_is_never_written_to_also_by_another_name(tmp_path, suffix):
    source = write(plain_cells(), tmp_path / f"cells{suffix}")
    link = tmp_path / f"link{suffix}"
    link.symlink_to(source)
    for given, path in ((source, source), (source, link), (link, source)):
        refused(given, path, "is the input itself, which stays as it is; name another file", overwrite=True)
    if suffix == ".zarr":
        refused(source, source / "copy.h5ad", "copy.h5ad lies within the input .*cells.zarr, which stays as it is")
    else:
        backed = anndata.read_h5ad(source, backed="r")
        refused(backed, source, "is the input itself", overwrite=True)
        os.link(source, tmp_path / "hard.h5ad")
        refused(source, tmp_path / "hard.h5ad", "is the input itself", overwrite=True)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_what_is_there_may_be_replaced_when_the_copy_is_complete(tmp_path, suffix):
    source = write(plain_cells(), tmp_path / "cells.h5ad")
    path = write(AnnData(np.eye(3)), tmp_path / f"copy{suffix}")
    with pytest.raises(KeyboardInterrupt), open_query(source) as query:
        with open_output(query, path, overwrite=True):
            raise KeyboardInterrupt
    assert read(path).shape == (3, 3)
    annotate(source, path, overwrite=True)
    check_annotation(read(path))
    nothing_but(tmp_path, source.name, path.name)


@pytest.mark.parametrize(("suffix", "copy_suffix"), [(".h5ad", ".h5ad"), (".h5ad", ".zarr"), (".zarr", ".h5ad")])
def test_nothing_is_left_when_it_does_not_end_well(tmp_path, suffix, copy_suffix):
    def annotate_until(end):
        with open_query(source) as query, open_output(query, tmp_path / f"copy{copy_suffix}") as output:
            output.array("X_hce", EMBEDDING.shape)[0:5] = EMBEDDING[:5]
            if end:
                output.finish(columns_of(query.barcodes), UNS)
            raise KeyboardInterrupt

    source = write(plain_cells(), tmp_path / f"cells{suffix}")
    for end in (False, True):
        with pytest.raises(KeyboardInterrupt):
            annotate_until(end)
        nothing_but(tmp_path, source.name)


@pytest.fixture
def small_files():
    """Let files grow no further than some bytes, as on a full disk."""

    def limit(n_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield limit
    limit(soft)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_copy_that_cannot_be_made_is_one_line_and_leaves_nothing(tmp_path, small_files, suffix):
    source = write(plain_cells(), tmp_path / f"cells{suffix}")
    with open_query(source) as query:
        small_files(100)
        with pytest.raises(
            SourceError, match=r"copy.* cannot be written \(File too large\); see to it, or name another"
        ):
            with open_output(query, tmp_path / f"copy{suffix}"):
                pass
    nothing_but(tmp_path, source.name)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_an_array_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, small_files, suffix):
    def fill():
        with open_query(source) as query, open_output(query, tmp_path / f"copy{suffix}") as output:
            array = output.array("X_large", values.shape)
            small_files(source.stat().st_size + 10_000)
            try:
                array[0:30] = values
            finally:
                small_files(-1)

    source = write(plain_cells(), tmp_path / f"cells{suffix}")
    values = np.random.default_rng(0).random((N_CELLS, 100_000))
    with pytest.raises(SourceError, match=r"copy.* cannot be written \(File too large\)") as caught:
        fill()
    assert "\n" not in str(caught.value)
    nothing_but(tmp_path, source.name)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_full_disk_is_noticed_before_something_is_written_in_vain(tmp_path, monkeypatch, suffix):
    def usage(folder):
        return SimpleNamespace(free=free.pop())

    def go(*said):
        free[:] = said
        with open_query(source) as query, open_output(query, tmp_path / "copy.h5ad") as output:
            write_annotation(output, query)

    free = []
    source = write(plain_cells(), tmp_path / f"cells{suffix}")
    monkeypatch.setattr(output_module.shutil, "disk_usage", usage)
    plenty, begin = 10**9, 0 if suffix == ".h5ad" else 1  # where all is written anew, one looks before that too
    go(*[plenty] * (2 + begin))
    (tmp_path / "copy.h5ad").unlink()
    for asked in range(2 + begin):
        with pytest.raises(SourceError, match=rf"copy.h5ad cannot be written \({os.strerror(errno.ENOSPC)}\)"):
            go(0, *[plenty] * asked)
        assert free == []
        nothing_but(tmp_path, source.name)


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path, monkeypatch):
    def denied(source, target):
        raise PermissionError(errno.EACCES, "Permission denied", str(target))

    source = write(plain_cells(), tmp_path / "cells.h5ad")
    monkeypatch.setattr(output_module.shutil, "copyfile", denied)  # root may write anywhere
    refused(source, tmp_path / "copy.h5ad", r"/copy.h5ad cannot be written \(Permission denied\); see to it, or name")
