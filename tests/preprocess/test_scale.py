"""Counts in every disguise, made by scanpy or by hand, and what is no disguise of counts."""

import anndata
import numpy as np
import pytest
import scanpy
from scipy import sparse

from hce_jax.errors import SourceError
from hce_jax.preprocess import normalize_log1p
from hce_jax.preprocess.scale import Scale, choose_matrix, recognise

N_CELLS, N_GENES = 60, 400


def some_counts(n_cells=N_CELLS, n_genes=N_GENES, seed=0):
    """Give counts of cells of very different sizes; a third of the values is not 0."""
    rng = np.random.default_rng(seed)
    rate = rng.gamma(0.3, 4, n_genes) * rng.lognormal(0, 0.7, (n_cells, 1))
    return sparse.csr_array(rng.poisson(rate).astype(np.float32))


COUNTS = some_counts()


def by_scanpy(counts, total=1e4, base=None, logarithms=1):
    cells = anndata.AnnData(sparse.csr_matrix(counts, copy=True))  # scanpy normalises matrices, not arrays
    if total is not False:
        scanpy.pp.normalize_total(cells, target_sum=total)
    if logarithms:
        scanpy.pp.log1p(cells, base=base)
    if logarithms == 2:
        cells.X = np.log1p(cells.X)
    return sparse.csr_array(cells.X)


def tpm(counts=COUNTS):
    """Give the values of a protocol that divides by the length of genes: no multiples of anything, one total."""
    length = np.random.default_rng(1).lognormal(0, 1, counts.shape[1])
    values = counts.toarray() / length
    return sparse.csr_array((values / values.sum(axis=1, keepdims=True) * 1e6).astype(np.float32))


def changed(values, change):
    result = values.copy()
    result.data = change(result.data.astype(np.float64)).astype(np.float32)
    return result


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (by_scanpy(COUNTS), "ln(1 + x) of counts scaled to 10,000 per cell"),
        (by_scanpy(COUNTS, 1e6), "ln(1 + x) of counts scaled to 1,000,000 per cell"),
        (by_scanpy(COUNTS, 321), "ln(1 + x) of counts scaled to 321 per cell"),
        (by_scanpy(COUNTS, 1e4, 2), "log2(1 + x) of counts scaled to 10,000 per cell"),
        (by_scanpy(COUNTS, 1e6, 10), "log10(1 + x) of counts scaled to 1,000,000 per cell"),
        (by_scanpy(COUNTS, 1e4, 3), "log3(1 + x) of counts scaled to 10,000 per cell"),
        (by_scanpy(COUNTS, 1e4, None, 2), "ln(1 + x), taken twice, of counts scaled to 10,000 per cell"),
        (by_scanpy(COUNTS, False), "ln(1 + x) of raw counts"),
        (by_scanpy(COUNTS, 1e4, None, 0), "counts scaled to 10,000 per cell"),
        (by_scanpy(COUNTS, 1e6, None, 0), "counts scaled to 1,000,000 per cell"),
        (by_scanpy(COUNTS, 1, None, 0), "counts scaled to 1 per cell"),
        (changed(COUNTS, lambda x: x * (1 - 1e-6)), "raw counts"),
        (changed(by_scanpy(COUNTS), lambda x: x.round(4)), "ln(1 + x) of counts scaled to 10,000 per cell, rounded to 0.0001"),  # noqa: E501
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)  # fmt: skip
def test_disguised_counts_are_recognised_and_come_back_to_the_last_bit(values, what):
    scale = recognise(values, "X", 3.0 if what.startswith("log3") else None)
    assert (scale.what, scale.kind) == (what, "multiples")
    assert scale.words == f"{what}, taken back to whole counts"
    counts = scale.to_counts(values)
    assert counts.dtype == np.float32
    np.testing.assert_array_equal(counts.toarray(), COUNTS.toarray())
    assert normalize_log1p(counts).data.tobytes() == normalize_log1p(COUNTS).data.tobytes()


def test_raw_counts_stay_what_they_are():
    for counts in (COUNTS, COUNTS[:1], COUNTS[:, :5], sparse.csr_array([[0.0, 2]])):
        scale = recognise(counts, "X")
        assert (scale.words, scale.kind) == ("raw counts", "counts")
        np.testing.assert_array_equal(scale.to_counts(counts).toarray(), counts.toarray())


def test_values_rounded_to_3_decimals_come_back_to_counts():
    # the values that most genes have in scanpy's pbmc68k_reduced: ln(1 + k 3.908), k = 1, 2, 3, ...
    worked = [[1.591, 2.177, 2.544, 2.811, 3.022], [2.177, 2.177, 3.022, 1.591, 3.474]]
    scale = recognise(sparse.csr_array(np.array(worked * 5, np.float32)), "raw")
    assert (scale.bases, scale.step) == ((np.e,), 0.001)
    counts = scale.to_counts(sparse.csr_array(np.array(worked, np.float32)))
    assert counts.toarray().tolist() == [[1, 2, 3, 4, 5], [2, 2, 5, 1, 8]]
    # whatever the unit, and so the error of the smallest value
    units, given = np.linspace(0.3, 6, 500)[:, None], np.arange(1, 31)
    values = sparse.csr_array(np.log1p(units * given).round(3).astype(np.float32))
    np.testing.assert_array_equal(recognise(values, "X").to_counts(values).toarray(), np.tile(given, (500, 1)))


def test_counts_come_back_where_the_smallest_of_a_cell_is_not_1():
    given = np.array([[2, 3, 7], [5, 8, 0], [6, 4, 10], [3, 9, 30]], np.float32)
    scale = Scale("", "", "multiples", (np.e,))
    counts = scale.to_counts(sparse.csr_array(np.log1p(given * 3.3)))
    assert counts.toarray().tolist() == [[2, 3, 7], [5, 8, 0], [3, 2, 5], [1, 3, 10]]  # up to a factor of the cell


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda x: x, "values scaled to 1,000,000 per cell"),
        (np.log1p, "ln(1 + x) of values scaled to 1,000,000 per cell"),
        (lambda x: np.log2(1 + x), "log2(1 + x) of values scaled to 1,000,000 per cell"),
        (lambda x: np.log10(1 + x), "log10(1 + x) of values scaled to 1,000,000 per cell"),
    ],
    ids=["linear", "ln", "log2", "log10"],
)
def test_where_values_are_no_multiples_the_total_tells_the_logarithm(change, what):
    values = changed(tpm(), change)
    scale = recognise(values, "X")
    assert (scale.what, scale.kind) == (what, "proportional")
    np.testing.assert_allclose(scale.to_counts(values).data, tpm().data, rtol=1e-5)
    done = ", taken back to what is proportional to counts"
    assert scale.words == (what if what.startswith("values") else what + done)


def test_counts_without_ambient_rna_are_taken_as_they_are():
    values = changed(COUNTS, lambda x: x * np.random.default_rng(2).uniform(0.7, 1, len(x)))
    scale = recognise(values, "X")
    assert scale.words == "counts that are not whole numbers, as taking ambient RNA away leaves them"
    np.testing.assert_array_equal(scale.to_counts(values).toarray(), values.toarray())


def without_ambient_rna(counts, share):
    """Take away from each cell a share of its counts as they are in all cells together, to 0 at least."""
    counts = counts.toarray()
    ambient = counts.sum(axis=0) / counts.sum()
    return sparse.csr_array(np.maximum(counts - share * counts.sum(axis=1, keepdims=True) * ambient, 0))


@pytest.mark.parametrize("shallower", [1, 2], ids="1 of {} counts".format)
def test_counts_without_ambient_rna_of_small_cells_too_are_no_logarithms(shallower):
    counts = sparse.csr_array(np.floor(COUNTS.toarray() / shallower))
    values = without_ambient_rna(counts, 0.1)
    assert (values.max(axis=1).toarray() < 20).mean() > 0.4  # so that most alone do not tell
    assert recognise(values, "X").words.startswith("counts that are not whole numbers")
    one = values[[int(values.max(axis=1).toarray().argmax())]]
    assert recognise(one, "X").words.startswith("counts that are not whole numbers")
    whole = stacked(counts[:20], values[20:])
    np.testing.assert_array_equal(recognise(whole, "X").to_counts(whole).toarray(), whole.toarray().astype(np.float32))


def imputed():
    rng = np.random.default_rng(3)
    return sparse.csr_array(np.log1p(rng.gamma(2, 5, (30, 1000))).astype(np.float32))


def scaled():
    values = by_scanpy(COUNTS).toarray()
    return sparse.csr_array((values - values.mean(axis=0)) / (values.std(axis=0) + 1))


def with_bad_values():
    values = by_scanpy(COUNTS)
    values.data[[5, 6]] = np.nan, np.inf
    return values


def stacked(*parts):
    return sparse.csr_array(sparse.vstack(parts))


def with_one_value(values, value):
    values = values.copy()
    values.data[values.indptr[7]] = value
    return values


LN, LOG2, SCALED = by_scanpy(COUNTS), by_scanpy(COUNTS, base=2), by_scanpy(COUNTS, logarithms=0)
LN_TPM, AMBIENT = changed(tpm(), np.log1p), without_ambient_rna(COUNTS, 0.1).astype(np.float32)
ROUNDED = changed(LN, lambda x: x.round(3))


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        (scaled(), r"negative values, -\d.* to \d.*, as scaling and regression leave them"),
        (with_bad_values(), r"2 of the values looked at are not finite \(NaN or infinite\)"),
        (sparse.csr_array((5, 7), dtype=np.float32), "only zeros"),
        (sparse.csr_array((0, 7), dtype=np.float32), "only zeros"),
        (changed(tpm(), np.log1p)[:, ::2], "not whole numbers, .*, neither multiples .* nor of one total"),
        (0.5 * (by_scanpy(COUNTS)[:30] + by_scanpy(COUNTS)[30:]), "not whole numbers, .*, neither multiples"),
        (imputed(), "hardly any of them 0, as imputation and correction leave them"),
        (changed(COUNTS, np.sqrt), "square roots of counts"),
        (stacked(COUNTS[:30], by_scanpy(COUNTS)[30:]), r"30 of 60 on another than the others \(raw counts\)"),
        (stacked(COUNTS[:6], by_scanpy(COUNTS)[6:]), r"different scales, 6 of 60 on another than the others \(ln\(1 "),
        (stacked(by_scanpy(COUNTS)[:40], by_scanpy(COUNTS, 1e4, 2)[40:]), r"20 of 60 on another than the others \(ln"),
        (stacked(SCALED[:50], changed(tpm(), np.log1p)[50:]), r"10 of 60 on another than the others \(counts scaled"),
        (with_one_value(changed(tpm(), np.log1p)[:, ::2], 30), "not whole numbers, .* to 30, neither multiples"),
        (stacked(tpm()[:8], LN_TPM[8:])[:, ::2], "not whole numbers, .*, neither multiples"),
        (stacked(COUNTS[:27], LN_TPM[27:])[:, ::2], "not whole numbers, .*, neither multiples"),
        (by_scanpy(COUNTS)[:, :2], "not whole numbers"),  # two values of a cell tell nothing
    ],
    ids=["scaled", "not finite", "zeros", "no cells", "subset of TPM", "means of logarithms", "imputed", "square roots",
         "half raw", "a tenth raw", "two bases", "a sixth logarithms of TPM", "subset of TPM and an odd value",
         "subset of two scales of TPM", "raw and a subset of TPM", "two genes"],
)  # fmt: skip
def test_what_is_no_disguise_of_counts_is_refused(values, seen):
    with pytest.raises(SourceError, match=f"^X of my.h5ad: .*{seen}.*; give raw counts, or log1p values of them$"):
        recognise(values, "X of my.h5ad")


ODD = {
    "raw among ln": (COUNTS, LN),
    "scaled among ln": (SCALED, LN),
    "log2 among ln": (LOG2, LN),
    "ln among scaled": (LN, SCALED),
    "log2 among scaled": (LOG2, SCALED),
    "ln among raw": (LN, COUNTS),
    "scaled among raw": (SCALED, COUNTS),
    "raw among ln of TPM": (COUNTS, LN_TPM),
    "TPM among ln of TPM": (tpm(), LN_TPM),
    "log2 among ln of TPM": (LOG2, LN_TPM),
    "ln among TPM": (LN, tpm()),
    "ln among counts without ambient RNA": (LN, AMBIENT),
    "raw among rounded ln": (COUNTS, ROUNDED),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("n_odd", [1, 3])
def test_a_few_cells_on_another_scale_are_refused_with_their_number_wherever_they_are(name, n_odd):
    """Cell 12 has the most counts, cells 20 and 40 some."""
    odd, most = ODD[name]
    values = most.copy().tolil()
    cells = [12, 20, 40][:n_odd]
    values[cells] = odd[cells]
    with pytest.raises(SourceError) as caught:
        recognise(values.tocsr(), "X")
    what = recognise(most, "X").what
    assert f": cells on different scales, {n_odd} of 60 on another than the others ({what}), where all" in str(
        caught.value
    )
    # not among those looked at
    scale = recognise(most, "X of my.h5ad")
    with pytest.raises(SourceError) as caught:
        scale.to_counts(sparse.csr_array(values))
    assert str(caught.value) == (
        f"X of my.h5ad: {n_odd} of 60 cells read together are on another scale than those looked at first, {what}; "
        "give one matrix in which all cells are on one scale"
    )


@pytest.mark.parametrize("most", [LN, ROUNDED, LN_TPM], ids=["ln", "rounded", "TPM"])
def test_one_value_that_is_no_logarithm_does_not_make_counts_of_all(most):
    with pytest.raises(SourceError, match=r"scales, 1 of 60 on another than the others \(ln\(1 \+ x\) of"):
        recognise(with_one_value(most, 30), "X")


@pytest.mark.parametrize("kind", ["no", "raw", "rounded"])
def test_cells_with_too_few_values_to_tell_are_taken(kind):
    few = np.zeros((4, N_GENES), np.float32)
    few[0, 3], few[1, 5:9] = 5, 5  # the same value in all genes: up to a factor, any scale will do
    few[2, [1, 4]], few[3, [2, 6]] = [9, 10], [11, 12]  # no small multiples of the smallest
    few = sparse.csr_array(few)
    odd = {"no": by_scanpy(few), "raw": few[:2], "rounded": changed(by_scanpy(few), lambda x: x.round(3))}[kind]
    values = stacked(ROUNDED if kind == "rounded" else LN, odd)
    counts = recognise(values, "X").to_counts(values).toarray()
    np.testing.assert_array_equal(counts[:N_CELLS], COUNTS.toarray())
    largest = counts[N_CELLS:].max(axis=1, keepdims=True)
    expected = few.toarray()[: len(largest)]
    np.testing.assert_allclose(counts[N_CELLS:] / largest, expected / expected.max(axis=1, keepdims=True), rtol=6e-3)


def test_a_cell_that_could_be_on_another_scale_by_accident_is_taken():
    pair = np.zeros((1, N_GENES), np.float32)
    pair[0, 1], pair[0, 4:14] = 1.2345, 2.469  # twice as much; without the logarithm 4.437 times, no simple fraction
    values = stacked(LN, sparse.csr_array(pair))
    counts = recognise(values, "X").to_counts(values)
    np.testing.assert_allclose(counts[[N_CELLS]].toarray(), np.expm1(pair), rtol=1e-6)


def test_whole_numbers_among_logarithms_are_refused_even_where_any_would_be_multiples():
    raw = np.zeros((1, N_GENES), np.float32)
    raw[0, :3] = 1, 12, 15  # exp(12) is so many times exp(1) that it is as near to a multiple as float32 can tell
    with pytest.raises(SourceError, match="1 of 61 on another"):
        recognise(stacked(LN, sparse.csr_array(raw)), "X")


def test_a_cell_on_another_scale_is_found_where_one_value_alone_is_the_unit():
    counts = 20 + np.arange(N_GENES, dtype=np.float32)[None] % 37
    counts[0, 203] = 1  # of 20 and more nothing tells of which they are multiples
    values = stacked(LN, changed(sparse.csr_array(counts), lambda x: np.log2(1 + 1.7 * x)))
    with pytest.raises(SourceError, match="1 of 61 on another"):
        recognise(values, "X")


def test_raw_counts_among_scaled_ones_are_their_multiples_too():
    values = stacked(COUNTS[:10], SCALED[10:])
    np.testing.assert_array_equal(recognise(values, "X").to_counts(values).toarray(), COUNTS.toarray())


def test_zeros_and_ones_are_not_called_counts():
    scale = recognise(sparse.csr_array((COUNTS > 0).astype(np.float32)), "X")
    assert scale.words == "zeros and ones, which say what is expressed and not how much"


def test_values_of_scanpys_own_cells_rounded_to_3_decimals_are_taken():
    values = sparse.csr_array(scanpy.datasets.pbmc68k_reduced().raw.X)
    scale = recognise(values, "raw")
    assert (scale.kind, scale.bases, scale.step) == ("multiples", (np.e,), 0.001)
    assert (scale.to_counts(values).data >= 1).all()


def test_the_base_that_a_file_states_is_taken_where_values_do_not_tell_and_only_there():
    few = sparse.csr_array(np.log2(1 + np.array([[0, 1.7, 0], [2.9, 0, 0], [0, 3.3, 0]], np.float32)))
    for none in (None, 1.0):
        with pytest.raises(SourceError, match="X: not whole numbers"):
            recognise(few, "X", none)
    scale = recognise(few, "X", 2.0)
    assert scale.what == "log2(1 + x) of values, as the file states"
    np.testing.assert_allclose(scale.to_counts(few).toarray(), [[0, 1.7, 0], [2.9, 0, 0], [0, 3.3, 0]], rtol=1e-6)
    assert recognise(by_scanpy(COUNTS), "X", 2.0).bases == (np.e,)
    with pytest.raises(SourceError, match="neither multiples"):
        recognise(changed(tpm(), np.log1p)[:, ::2], "X", 2.0)


def test_cells_of_a_study_without_counts_are_kept_beside_those_with_counts():
    ours, theirs = COUNTS[:40], tpm(COUNTS[40:])
    values = stacked(by_scanpy(ours), by_scanpy(theirs))
    scale = recognise(values, "X")
    assert scale.what == "ln(1 + x) of counts scaled to 10,000 per cell (in 67% of cells)"
    counts = scale.to_counts(values).toarray()
    np.testing.assert_array_equal(counts[:40], ours.toarray())
    np.testing.assert_allclose(counts[40:], theirs.toarray() / 100, rtol=1e-5)


def test_large_blocks_with_empty_cells_and_stored_zeros_come_back_and_stay_as_they_were():
    raw = some_counts(400, 800, seed=4)
    assert raw.nnz > 1 << 16  # so that it takes several turns
    keep = np.ones(400, bool)
    keep[[0, 7, 8, 399]] = False
    raw = sparse.csr_array(sparse.diags_array(keep.astype(np.float32)) @ raw)
    values = changed(raw, lambda x: np.log1p(x * 0.7))
    values.data[::97] = 0  # stored
    before = values.data.copy()
    scale = Scale("", "", "multiples", (np.e,))
    expected = raw.toarray() * (values.toarray() > 0)
    np.testing.assert_array_equal(scale.to_counts(values).toarray(), expected)
    np.testing.assert_array_equal(values.data, before)
    assert recognise(values, "X").bases == (np.e,)
    np.testing.assert_array_equal(values.data, before)
    assert scale.to_counts(values[:0]).shape == (0, 800)
    assert scale.to_counts(values[7:9]).nnz == 0


def test_cells_without_counts_tell_nothing():
    empty = sparse.csr_array((20 * N_CELLS, N_GENES), dtype=np.float32)
    values = stacked(empty, by_scanpy(COUNTS), empty)
    assert recognise(values, "X").what == "ln(1 + x) of counts scaled to 10,000 per cell"


def test_cells_that_cannot_be_on_the_scale_are_refused_with_their_number():
    logarithms, counts = Scale("ln(1 + x)", "X of my.h5ad", "multiples", (np.e,)), Scale("raw", "raw of b", "counts")
    for scale in (logarithms, counts):
        with pytest.raises(SourceError, match=f"^{scale.where}: 2 values are negative or not finite \\(first: -1\\)"):
            scale.to_counts(sparse.csr_array([[1, -1.0], [0, np.nan]]))
    with pytest.raises(SourceError, match=r"^X of my.h5ad: 1 of 2 cells .*first, ln\(1 \+ x\); give one matrix"):
        logarithms.to_counts(sparse.csr_array([[1.0, 5000], [0, 1]]))
    with pytest.raises(SourceError, match=r"^raw of b: 2 of 3 cells .* first, raw; give one matrix"):
        counts.to_counts(sparse.csr_array([[1.0, 2.5], [3, 0], [0.5, 0.5]]))


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["other", "counts", "X", "raw"], "raw"),
        (["other", "counts", "X"], "X"),
        (["other", "counts"], "counts"),
        (["other"], "other"),
    ],
)
def test_of_several_matrices_with_counts_the_first_in_the_order_raw_x_counts_others_is_taken(names, taken):
    choice = choose_matrix({**dict.fromkeys(names, COUNTS), "scaled": scaled()}, "my.h5ad")
    assert (choice.name, choice.scale.words) == (taken, "raw counts")
    others = {"other": "layers/other", "counts": "layers/counts"}
    looked_at = {others.get(name, name) for name in names if name != taken}
    assert {note.split(":")[0] for note in choice.notes} == looked_at | {"layers/scaled"}
    assert next(note for note in choice.notes if "scaled" in note).startswith("layers/scaled: negative values")


def test_raw_counts_go_before_logarithms_and_these_before_what_has_lost_the_counts():
    logarithms = by_scanpy(COUNTS)
    choice = choose_matrix({"X": logarithms, "counts": COUNTS}, "my.h5ad")
    assert (choice.name, choice.scale.where) == ("counts", "layers/counts of my.h5ad")
    assert choice.notes == ("X: ln(1 + x) of counts scaled to 10,000 per cell, taken back to whole counts",)
    assert choose_matrix({"X": tpm(), "log": logarithms}, "my.h5ad").name == "log"
    assert choose_matrix({"X": tpm(), "scaled": scaled()}, "my.h5ad").name == "X"
    # raw has all genes, X and its layers the variable ones
    assert choose_matrix({"raw": logarithms, "X": scaled(), "counts": COUNTS[:, :100]}, "my.h5ad").name == "raw"


def test_a_file_without_counts_is_refused_saying_what_was_seen():
    with pytest.raises(SourceError) as caught:
        choose_matrix({"bad": with_bad_values(), "X": scaled()}, "my.h5ad")
    assert str(caught.value).startswith(
        "my.h5ad has no counts, and no values from which they follow; looked in X: negative values"
    )
    assert "; layers/bad: 2 of the values looked at are not finite" in str(caught.value)
    assert str(caught.value).endswith("or name another matrix (--counts NAME)")


@pytest.mark.parametrize("name", ["kang2018", "zilionis2019"])
def test_real_cells_in_any_disguise_come_back_to_the_last_bit(real_dir, name):
    counts = sparse.csr_array(anndata.read_h5ad(next(real_dir.glob(f"*/{name}.h5ad"))).X)[:200]
    for values in (
        by_scanpy(counts),
        by_scanpy(counts, 1e6, 2),
        by_scanpy(counts, None),
        by_scanpy(counts, logarithms=2),
    ):
        np.testing.assert_array_equal(recognise(values, name).to_counts(values).toarray(), counts.toarray())
