import gzip
import math

import numpy as np
import pandas as pd
import pytest
from memory_source import MemorySource, many_cells

from hce_jax.errors import SourceError
from hce_jax.store.split_cells import SplitTable, draw_splits

KEYS = ("soma_joinid", "tech_sample", "donor_id", "dataset_id")


def published_splits(samples, seed):
    """The published split of tech_samples, in order of appearance: {tech_sample: split}."""
    rng = np.random.default_rng(seed)
    shuffled = np.array(samples)
    rng.shuffle(shuffled)
    n_val, n_test = math.ceil(0.15 * len(samples)), math.ceil(0.15 * len(samples))
    n_train = len(samples) - n_val - n_test
    names = ["train"] * n_train + ["val"] * n_val + ["test"] * n_test
    return dict(zip(shuffled.tolist(), names, strict=True))


@pytest.mark.parametrize("n_samples", [3, 4, 6, 7, 13, 19, 20, 21, 27, 40, 60, 100, 333, 1000])
def test_splits_are_exactly_those_of_the_published_code(n_samples):
    names = [f"study_{7 * number % n_samples}_D{number % 5}" for number in range(n_samples)]
    for seed in (0, 1, 2, 3, 1234):
        rng = np.random.default_rng(n_samples + seed)
        cells = pd.Series(rng.permutation([*names, *rng.choice(names, 2 * n_samples)]))
        expected = published_splits(list(dict.fromkeys(cells)), seed)
        splits = draw_splits(cells.astype("category"), seed)
        assert list(splits.categories) == ["train", "val", "test"]
        assert splits.tolist() == [expected[name] for name in cells]


def test_categories_that_no_cell_has_are_no_tech_samples():
    cells = pd.Series(["c", "a", "b", "a"], index=[9, 8, 7, 6])
    expected = published_splits(["c", "a", "b"], 1)
    splits = draw_splits(cells.astype(pd.CategoricalDtype(["z", "a", "y", "b", "c"])), 1)
    assert splits.tolist() == [expected[name] for name in cells]


@pytest.mark.parametrize("n_samples", [1, 2])
def test_too_few_tech_samples_are_refused(n_samples):
    with pytest.raises(SourceError, match=rf"the cells come from {n_samples} tech_samples .* \(--split-column\)"):
        draw_splits(pd.Series(list("ab"[:n_samples]) * 3, dtype="category"), 1)


def obs_and_splits(key):
    """Cells, and the split that each has by a rule on a key; None where the table does not name it."""
    obs = next(MemorySource(many_cells(120)).obs_batches())
    text = obs.astype({"dataset_id": str, "donor_id": str})
    values = text["dataset_id"] + "_" + text["donor_id"] if key == "tech_sample" else text[key]
    names = sorted(set(values))
    split_of = {name: ("train", "val", "test", None)[number % 4] for number, name in enumerate(names)}
    table = pd.DataFrame({key: names, "split": list(split_of.values()), "batch": "x"}).dropna()
    return obs, table.sample(frac=1, random_state=0), values.map(split_of)


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet"])
@pytest.mark.parametrize("key", KEYS)
def test_cells_get_the_split_of_their_key_and_the_others_are_left_out(tmp_path, key, suffix):
    obs, table, expected = obs_and_splits(key)
    path = tmp_path / f"splits.{suffix}"
    (table.to_parquet if suffix == "parquet" else table.to_csv)(path, index=False)
    read = SplitTable.read(str(path))
    assert read.name == path.name
    for batch in (obs, obs.iloc[50:], obs.iloc[:0]):
        assigned = read.assign(batch)
        kept = batch[expected[batch.index].notna()]
        pd.testing.assert_frame_equal(assigned.drop(columns="split"), kept)
        assert assigned["split"].tolist() == expected[kept.index].tolist()
        assert list(assigned["split"].cat.categories) == ["train", "val", "test"]


def test_the_first_key_counts_that_a_table_has(tmp_path):
    obs, table, expected = obs_and_splits("donor_id")
    table.assign(dataset_id="late").to_csv(tmp_path / "splits.csv", index=False)
    assigned = SplitTable.read(tmp_path / "splits.csv").assign(obs)
    assert assigned["split"].tolist() == expected.dropna().tolist()


def test_names_that_look_like_numbers_or_like_nothing_are_names(tmp_path):
    names = ["007", "7", "1.0", "NA", "nan", "None", "1e3", "True"]
    table = pd.DataFrame({"donor_id": names, "split": np.resize(["train", "val"], len(names))})
    table.to_csv(tmp_path / "splits.csv", index=False)
    obs = pd.DataFrame({"donor_id": pd.Categorical([*reversed(names), "1", "1000"])})
    assigned = SplitTable.read(tmp_path / "splits.csv").assign(obs)
    assert assigned["donor_id"].tolist() == names[::-1]
    assert assigned["split"].tolist() == table["split"].tolist()[::-1]


def test_labels_of_the_table_take_the_place_of_the_cells_own(tmp_path):
    obs = next(MemorySource(many_cells(30)).obs_batches())
    ids = obs["soma_joinid"].tolist()
    table = pd.DataFrame(
        {"soma_joinid": ids[::-2], "split": "train", "cell_type": np.resize(["NA", "neuron", "T cell"], 15)}
    )
    table.to_csv(tmp_path / "splits.csv", index=False)
    assigned = SplitTable.read(tmp_path / "splits.csv").assign(obs)
    assert assigned["soma_joinid"].tolist() == ids[1::2]
    assert assigned["cell_type"].tolist() == table["cell_type"].tolist()[::-1]
    assert isinstance(assigned["cell_type"].dtype, pd.CategoricalDtype)
    assert "cell_type_ontology_term_id" not in assigned
    others = obs.columns.drop(["cell_type", "cell_type_ontology_term_id"])
    pd.testing.assert_frame_equal(assigned[others], obs.iloc[1::2][others])


def test_labels_of_donors_are_not_taken(tmp_path):
    obs, table, _ = obs_and_splits("donor_id")
    table.assign(cell_type="neuron").to_csv(tmp_path / "splits.csv", index=False)
    assigned = SplitTable.read(tmp_path / "splits.csv").assign(obs)
    assert assigned["cell_type"].tolist() == obs["cell_type"][assigned.index].tolist()


def test_a_row_that_is_there_twice_is_one(tmp_path):
    (tmp_path / "splits.csv").write_text("donor_id,split\na,train\nb,val\na,train\n")
    assert SplitTable.read(tmp_path / "splits.csv").table["split"].to_dict() == {"a": "train", "b": "val"}


EMPTY, TWICE = "has an empty entry in one of the columns", "into two splits, or gives it two labels"
NO_NUMBER = "has entries in the column soma_joinid that are no whole numbers"
UNUSABLE = {
    "an unknown split": (
        "donor_id,split\na,train\nb,dev\n",
        "names the split 'dev'; a split is one of train, val",
    ),
    "no split": ("donor_id,split\na,train\nb,\n", f"{EMPTY} donor_id, split"),
    "no donor": ("donor_id,split\n,train\nb,val\n", f"{EMPTY} donor_id, split"),
    "no number": ("soma_joinid,split\n,train\n1,val\n", f"{EMPTY} soma_joinid, split"),
    "no label": ("soma_joinid,split,cell_type\n1,train,\n", f"{EMPTY} soma_joinid, split, cell_type"),
    "two splits": ("donor_id,split\na,train\na,val\n", f"puts the donor_id a {TWICE}"),
    "two splits that others have": ("donor_id,split\na,train\nb,val\na,val\n", f"puts the donor_id a {TWICE}"),
    "two labels": ("soma_joinid,split,cell_type\n7,val,T cell\n7,val,neuron\n", f"puts the soma_joinid 7 {TWICE}"),
    "numbers that are text": ("soma_joinid,split\n7,val\nB7,val\n", NO_NUMBER),
    "numbers that are not whole": ("soma_joinid,split\n7,val\n7.5,val\n", NO_NUMBER),
    "no key": (
        "donor,split\na,train\n",
        "has the columns 'donor', 'split'; it needs 'split' and one of 'soma_joinid'",
    ),
    "no column of splits": (
        "donor_id,fold\na,val\n",
        "has the columns 'donor_id', 'fold'; it needs 'split'",
    ),
    "nothing at all": ("", r"cannot be read as CSV or parquet \(No columns to parse"),
    "a line too long": ("donor_id,split\na,train\nb,val,1,2\n", r"cannot be read as CSV or parquet \(Error tokenizing"),
}


@pytest.mark.parametrize(("text", "message"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_a_table_that_cannot_be_used_is_refused(tmp_path, text, message):
    path = tmp_path / "splits.csv"
    path.write_text(text)
    with pytest.raises(SourceError, match=f"{path} {message}"):
        SplitTable.read(path)


def test_a_file_that_is_absent_or_damaged_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"the table of splits .*/none.csv does not exist"):
        SplitTable.read(tmp_path / "none.csv")
    whole = gzip.compress(b"donor_id,split\n" + b"a,train\n" * 1000)
    contents = {"a.csv": b"\xff\xfe\x00bad\x00", "b.csv.gz": b"no gzip", "c.csv.gz": whole[:-20],
                "d.csv.gz": whole[:12] + bytes(8) + whole[20:], "e.parquet": b"PAR1 no parquet PAR1"}  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SourceError, match=rf"the table of splits .*/{name} cannot be read as CSV or parquet \("):
            SplitTable.read(tmp_path / name)


def test_the_published_table_of_real_cells_gives_their_splits_and_labels(real_dir):
    table = pd.read_csv(real_dir / "pbmc_store_cells.csv.gz").sort_values("soma_joinid")
    read = SplitTable.read(real_dir / "pbmc_store_cells.csv.gz")
    ids = np.arange(table["soma_joinid"].min() - 5, table["soma_joinid"].max() + 5)
    assigned = read.assign(pd.DataFrame({"soma_joinid": ids, "cell_type": pd.Categorical(["unknown"] * len(ids))}))
    for column in ("soma_joinid", "split", "cell_type"):
        assert assigned[column].tolist() == table[column].tolist()
    assert assigned["split"].value_counts().to_dict() == {"train": 6400, "val": 576, "test": 448}
