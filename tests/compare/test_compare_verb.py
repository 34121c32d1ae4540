import pandas as pd
import pytest
from run_folders import write_run, write_runs, write_store
from verbs import in_process

from hce_jax.compare import figures
from hce_jax.compare.load import load_comparison
from hce_jax.compare.numbers import MACRO_LABELLED, Tables, overall
from hce_jax.verbs import compare

TEXTS = {"comparison.md", "comparison.tex", *(f"{name}.csv" for name in Tables._fields)}


@pytest.fixture
def tb_logs(tmp_path):
    write_runs(tmp_path / "tb_logs", seeds=(1, 2))
    return tmp_path / "tb_logs"


@pytest.fixture
def verb(monkeypatch, capsys):
    return lambda *arguments: in_process(monkeypatch, capsys, "compare", *map(str, arguments))


@pytest.fixture
def one_picture(monkeypatch):
    """Have one empty picture instead of those that take seconds to draw."""

    def draw(comparison, tables, folder):
        for suffix in ("png", "pdf"):
            (folder / f"overall.{suffix}").touch()
        return [figures.Figure("overall", "F1.")]

    monkeypatch.setattr(figures, "draw", draw)


def test_runs_are_compared_and_the_numbers_said_and_written(tb_logs, tmp_path, verb, one_picture):
    said = verb(tb_logs, "--out", tmp_path / "out").splitlines()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*TEXTS, "overall.png", "overall.pdf"}
    expected = load_comparison([tb_logs])
    numbers = overall(expected)
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "out/overall.csv", float_precision="round_trip"), numbers, check_exact=True
    )
    assert said[0].split() == "model split F1 loss per cent seeds difference, points (95 % over studies)".split()
    macro = numbers[numbers["average"].isin(["macro", MACRO_LABELLED])]
    for line, (_, row) in zip(said[1:7], macro.iterrows(), strict=True):
        f1 = [f"{100 * row['mean']:.1f}", "+-", f"{100 * row['sd']:.1f}", "2"]
        gain = [f"{100 * row['difference']:+.1f}", f"({100 * row['low']:+.1f}", "to", f"{100 * row['high']:+.1f})"]
        names = [row["model"], row["split"], *row["average"].split(), row["loss"]]
        assert line.split() == [*names, *f1, *(gain if row["loss"] == "HCE" else [])]
    assert said[7] == ""
    assert said[8:-1] == [f"note        {note}" for note in expected.notes]
    assert said[-1] == f"written     {tmp_path / 'out/comparison.md'}"
    assert "overall.png" in (tmp_path / "out/comparison.md").read_text()


def test_every_file_of_a_comparison_is_known_as_one_by_the_next(tb_logs, tmp_path, verb, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda picture, path, *rest: path.touch())  # its pictures, all of them empty
    verb(tb_logs / "linear", tb_logs / "linear_hierarchical_loss", "--out", tmp_path / "out")
    compare.check_place(tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files > {*TEXTS, "overall.png", "by_class.pdf", "calibration.png"}
    assert any(name.startswith("waterfall_linear_") for name in files)


def test_an_older_comparison_is_replaced_as_a_whole(tb_logs, tmp_path, verb, one_picture):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("waterfall_mlp_id_hce_exact.png", "overall.csv", "comparison.md", ".DS_Store"):
        (out / name).write_text("old")
    verb(tb_logs, "--out", out)
    assert {path.name for path in out.iterdir()} == {*TEXTS, "overall.png", "overall.pdf", ".DS_Store"}
    assert "old" not in {path.read_text() for path in out.glob("*.csv")}


@pytest.mark.parametrize("name", ["notes.txt", "overall.csv.bak", "my_waterfall_linear.png", "tb_logs"])
def test_a_folder_with_other_things_is_refused_before_anything_is_read(tmp_path, verb, name):
    out = tmp_path / "out"
    (out / name).mkdir(parents=True)
    (out / "comparison.md").write_text("old")
    assert verb(tmp_path / "absent", "--out", out) == (
        f"error: {out} holds {name}, which is of no comparison; name another folder: --out DIR"
    )
    assert {path.name for path in out.iterdir()} == {name, "comparison.md"}


def test_a_file_is_refused_as_the_folder(tmp_path, verb):
    (tmp_path / "out").touch()
    assert verb(tmp_path, "--out", tmp_path / "out") == (
        f"error: {tmp_path / 'out'} is a file; name a folder for the comparison: --out DIR"
    )


def test_runs_that_cannot_be_compared_leave_nothing(tb_logs, tmp_path, verb):
    said = verb(tb_logs / "linear", "--out", tmp_path / "out")
    assert said == "error: all 2 runs are of the loss CE, so there is nothing to compare; name others"
    assert not (tmp_path / "out").exists()


def test_a_comparison_that_fails_leaves_the_older_one_as_it_was(tb_logs, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/comparison.md").write_text("old")

    def fail(comparison, tables, folder):
        (folder / "overall.png").touch()
        raise ValueError("no ink")

    monkeypatch.setattr(figures, "draw", fail)
    with pytest.raises(ValueError, match="no ink"):
        compare.write([tb_logs], tmp_path / "out")
    assert [(path.name, path.read_text()) for path in (tmp_path / "out").iterdir()] == [("comparison.md", "old")]


def test_another_baseline_and_a_moved_store_can_be_named(tb_logs, tmp_path, verb, one_picture):
    store = write_store(tmp_path / "moved")
    verb(tb_logs, "--out", tmp_path / "out", "--data-path", store, "--baseline", "HCE")
    assert set(pd.read_csv(tmp_path / "out/per_type.csv")["loss"]) == {"CE"}
    assert pd.read_csv(tmp_path / "out/per_type.csv")["n_train"].notna().all()


def test_one_seed_on_one_split_has_a_table_without_spread(tmp_path, verb, one_picture):
    for loss in ("CE", "HCE"):
        write_run(tmp_path / "logs", loss=loss, splits=("id",))
    said = verb(tmp_path / "logs", "--out", tmp_path / "out")
    assert "+-" not in said.split("\n\n")[0]
    assert len(said.split("\n\n")[0].splitlines()) == 1 + 2 * 2


def test_numbers_that_are_not_there_are_left_out_of_the_table():
    rows = [["mlp", "CE", "ood", "macro", 0.5, 0.01, 2, float("nan"), float("nan"), float("nan")],
            ["mlp", "HCE exact", "ood", "macro", 0.625, 0.02, 2, 0.125, float("nan"), float("nan")],
            ["mlp", "HCE exact", "ood", "micro", 0.9, 0.02, 2, 0.1, 0.0, 0.2]]  # fmt: skip
    columns = ["model", "loss", "split", "average", "mean", "sd", "n_seeds", "difference", "low", "high"]
    assert compare.overall_table(pd.DataFrame(rows, columns=columns)).splitlines() == [
        "model  split  F1     loss       per cent     seeds  difference, points (95 % over studies)",
        "mlp    ood    macro  CE         50.0 +- 1.0  2",
        "mlp    ood    macro  HCE exact  62.5 +- 2.0  2      +12.5",
    ]


def test_the_folder_of_a_comparison_may_be_absent_or_empty(tmp_path):
    compare.check_place(tmp_path)
    compare.check_place(tmp_path / "absent")
