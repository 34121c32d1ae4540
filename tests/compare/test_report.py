"""The report: numbers read back from what is written, against the tables and by hand; Markdown and LaTeX that hold."""

import dataclasses
import re
from collections import Counter

import comparisons
import numpy as np
import pandas as pd
import pytest

from hce_jax.compare import numbers, report
from hce_jax.compare.figures import Figure
from hce_jax.compare.report import MINUS, NOTHING, escape_latex, gain, markdown_table, number, spread

KINDS = ["overall", "waterfall_linear_id", "ontology_linear_id", "dag_linear_id", "by_class", "calibration", "odd"]


@pytest.fixture(scope="module")
def made():
    comparison = comparisons.make_comparison()
    return comparison, numbers.tables(comparison)


@pytest.fixture(scope="module")
def text(made):
    return report.markdown(*made, [Figure(kind, f"What {kind} shows.") for kind in KINDS])


def sections(text):
    """What is below each heading."""
    parts = re.split(r"^#+ (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows_of(text):
    """The tables of Markdown, as lists of dictionaries by column."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE):
        cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        header, rule, *lines = [[cell.strip() for cell in line] for line in cells]
        assert {len(line) for line in cells} == {len(header)}, block
        assert all(re.fullmatch(":--|--:", cell) for cell in rule)
        found.append([dict(zip(header, line, strict=True)) for line in lines])
    return found


# --- numbers


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((0.1234, 0.0912, 0.152), "+12.3 (9.1 to 15.2)"),
        ((-0.0306, -0.051, 0.004), f"{MINUS}3.1 ({MINUS}5.1 to 0.4)"),
        ((0.05,), "+5.0"),
        ((np.nan,), NOTHING),
    ],
)
def test_a_difference_has_its_sign_and_its_interval(given, expected):
    assert gain(*given) == expected


def test_a_share_is_written_in_per_cent_with_its_spread():
    assert spread(0.7046, 0.0123) == "70.5 ± 1.2"
    assert spread(0.7046, np.nan) == "70.5"
    assert number(1.2345, 2, scale=1.0) == "1.23"


def test_a_bar_in_a_name_does_not_end_its_cell():
    table = markdown_table(["a|b", "n"], [["x | y\nz", 1], ["<i>*c*", 2]])
    assert table.splitlines() == ["| a\\|b | n |", "| :-- | --: |", "| x \\| y z | 1 |", r"| \<i>\*c\* | 2 |"]


def test_what_latex_would_read_is_escaped():
    assert escape_latex(f"50 % of a_b & c#1 {{x}} ± {MINUS}1 \\") == (
        r"50 \% of a\_b \& c\#1 \{x\} $\pm$ $-$1 \textbackslash{}"
    )


# --- Markdown


def test_the_title_says_what_is_compared_on_what(text):
    assert text.splitlines()[0] == "# HCE against CE: linear, mlp on a store in memory"
    assert "- The cells are made up.\n" in text


def test_the_table_of_f1_has_the_numbers_of_the_tables_and_the_published_ones(made, text):
    _, tables = made
    held_out, new = rows_of(sections(text)["F1"])
    averages = ["macro", "micro", "weighted"]
    for rows, names in ((held_out, ["macro", "macro, labelled types", *averages[1:]]), (new, averages)):
        assert [(row["model"], row["F1"]) for row in rows] == [
            (model, name) for model in ("linear", "mlp") for name in names
        ]
    for split, rows in (("id", held_out), ("ood", new)):
        for row in rows:
            for loss in ("CE", "HCE"):
                of_row = {"model": row["model"], "loss": loss, "split": split, "average": row["F1"]}
                seeds = tables.by_seed[(tables.by_seed[list(of_row)] == of_row.values()).all(axis=1)]["f1"]
                assert row[loss] == f"{100 * seeds.mean():.1f} ± {100 * seeds.std():.1f}"
            baseline, ours = (float(row[loss].split(" ")[0]) for loss in ("CE", "HCE"))
            difference, low, high = map(float, re.findall(r"\d+\.\d", row[f"HCE {MINUS} CE"]))
            assert low <= difference <= high
            assert difference == pytest.approx(ours - baseline, abs=0.11)
    assert [row["published"] for row in held_out] == ["CE 80", "", "", "", "CE 82", "", "", ""]
    assert [row["published"] for row in new] == ["CE 55, HCE +12 to +15", "", "", "CE 57, HCE +12 to +15", "", ""]


def test_types_that_gain_and_lose_are_counted(made, text):
    _, tables = made
    counted, *_ = rows_of(sections(text)["Cell types"])
    rows = tables.per_type.query("model == 'mlp' and split == 'ood'")
    [row] = [row for row in counted if (row["model"], row["cells"]) == ("mlp", "new studies (ood)")]
    assert int(row["types"]) == len(rows) == int(row["higher F1"]) + int(row["lower F1"])
    significant = [each for each in rows.itertuples() if each.p_holm < 0.05]
    assert int(row["gain significantly"]) == sum(each.difference > 0 for each in significant) > 0
    assert int(row["lose significantly"]) == sum(each.difference < 0 for each in significant) == 0
    assert int(row["tested"]) == len(rows)


def test_the_ten_largest_losses_and_all_significant_ones_are_listed(made):
    comparison, tables = made
    n_types = 14
    differences = -np.arange(n_types) / 100  # none, then ever larger losses
    p_holm = np.where(np.arange(n_types) == 2, 0.0004, 0.5)  # of the small ones one is significant
    first = tables.per_type.iloc[[0] * n_types].reset_index(drop=True)
    rows = first.assign(difference=differences, p_holm=p_holm, label=[f"type|{i}" for i in range(n_types)])
    rows["n_train"], rows["n_cells"] = np.nan, 1234
    listed = report.markdown(comparison, tables._replace(per_type=rows), [])
    counted, *_ = rows_of(sections(listed)["Cell types"])
    assert (counted[0]["lower F1"], counted[0]["lose significantly"]) == ("13", "1")
    assert [(row["types"]) for row in counted] == ["14", "0", "0", "0"]
    [shown] = rows_of(sections(listed)["Which types lose"])
    assert [row["cell type"] for row in shown] == [rf"type\|{i}" for i in (13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 2)]
    assert shown[0]["difference"] == f"{MINUS}13.0"
    assert [shown[i]["p (Holm)"] for i in (0, -1)] == ["0.500", "below 0.001"]
    assert (shown[0]["cells"], shown[0]["training cells"], shown[0]["id"]) == ("1,234", NOTHING, "")
    assert "**mlp, HCE, new studies (ood)**: none." in listed


def test_the_change_by_kind_of_type_is_a_mean_over_seeds(made, text):
    _, tables = made
    [rows] = rows_of(sections(text)["On the ontology"])
    assert [row["types"] for row in rows] == [
        *(f"depth {depth}" for depth in range(5)), "leaf", "internal", "connected", "isolated",
    ]  # fmt: skip
    seeds = tables.by_class.query("model == 'mlp' and split == 'id' and value == 'leaf'")
    mean, sd = 100 * seeds["difference"].mean(), 100 * seeds["difference"].std()
    assert rows[5]["mlp, id"] == f"{mean:+.1f} ± {sd:.1f} ({seeds['n_types'].iloc[0]})"


def test_depths_are_in_the_order_of_their_numbers(made):
    comparison, tables = made
    table = tables.by_class.assign(value=tables.by_class["value"].replace({"1": "10", "4": "11"}))
    [rows] = rows_of(sections(report.markdown(comparison, tables._replace(by_class=table), []))["On the ontology"])
    assert [row["types"] for row in rows][:5] == ["depth 0", "depth 2", "depth 3", "depth 10", "depth 11"]


def test_decoders_are_named_with_what_they_ask_for(made, text):
    _, tables = made
    _, new = rows_of(sections(text)["Decoders"])
    names = ["argmax", "backoff 0.5", "min-distance", "argmax, T = 1.5"]
    assert [(row["model"], row["loss"], row["decoder"]) for row in new] == [
        (model, loss, name) for model in ("linear", "mlp") for loss in ("CE", "HCE") for name in names
    ]
    row = tables.decoders.query("model == 'mlp' and loss == 'HCE' and split == 'ood' and decoder == 'backoff'").iloc[0]
    [shown] = [each for each in new if (each["model"], each["loss"], each["decoder"]) == ("mlp", "HCE", "backoff 0.5")]
    assert shown["wrong"] == f"{100 * row['wrong']:.1f}"
    assert shown["over-specific"] == f"{100 * row['descendant']:.1f}"
    assert shown["under-specific"] == f"{100 * row['ancestor']:.1f}"
    assert shown["distance"] == f"{row['ontology_distance']:.2f}"
    assert (shown["ECE"], shown["AURC"]) == (f"{row['ece']:.3f}", f"{row['aurc']:.3f}")


def test_calibration_is_given_before_and_after(made, text):
    _, tables = made
    [rows] = rows_of(sections(text)["Calibration"])
    last = tables.calibration.iloc[-1]
    assert rows[-1] == {
        "model": "mlp", "loss": "HCE", "cells": "new studies (ood)", "T": "1.50",
        "ECE before": f"{last['ece_before']:.3f}", "ECE after": f"{last['ece_after']:.3f}",
    }  # fmt: skip


def test_only_what_differs_between_the_models_is_said_of_their_configurations(made):
    comparison, tables = made
    for run in comparison.runs:
        run.config.update(n_hidden=8 if run.model == "mlp" else 2, shuffle_window=7, seeds=(1, 2), cells_in=run.model)
    fields, runs = rows_of(sections(report.markdown(comparison, tables, []))["How it was made"])
    assert {row["field"]: (row["linear"], row["mlp"]) for row in fields} == {
        "model_type": ("linear", "mlp"), "learning_rate": ("0.0005",) * 2, "batch_size": ("256",) * 2,
        "max_epochs": ("3",) * 2, "n_hidden": ("2", "8"),
    }  # fmt: skip
    assert runs[1]["runs"] == ", ".join(f"linear_hierarchical_loss/default/version_{seed}" for seed in (1, 2, 3, 4))


def test_the_ontology_release_is_said_where_it_is_known(made):
    comparison, tables = made
    assert "release not known" in report.markdown(comparison, tables, [])
    known = dataclasses.replace(comparison, ontology_release="2025-07-30")
    assert "hierarchy of the Cell Ontology, release 2025-07-30;" in report.markdown(known, tables, [])


def test_each_picture_is_shown_once_where_it_belongs(text):
    shown = {heading: re.findall(r"!\[(.*?)\]\((.*?)\.png\)", part) for heading, part in sections(text).items()}
    assert shown["F1"] == [("overall", "overall")]
    assert shown["Which types lose"] == [("waterfall_linear_id",) * 2]
    assert [name for name, _ in shown["On the ontology"]] == ["ontology_linear_id", "dag_linear_id", "by_class"]
    assert shown["Calibration"] == [("calibration",) * 2]
    assert shown["Further pictures"] == [("odd", "odd")]
    assert Counter(name for names in shown.values() for name, _ in names) == Counter(KINDS)
    assert "*What overall shows.*" in text


# --- LaTeX


def check_latex(text, n_columns):
    """Braces balance, environments close, and each row has as many cells as there are columns."""
    body = re.sub(r"(?<!\\)%.*", "", text)
    assert re.sub(r"\\[{}]", "", body).count("{") == re.sub(r"\\[{}]", "", body).count("}")
    assert re.findall(r"\\(begin|end)\{(\w+)\}", body) == [
        ("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table"),
    ]  # fmt: skip
    assert len(re.search(r"\\begin\{tabular\}\{([lr]+)\}", body)[1]) == n_columns
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    for row in rows:
        spans = [int(span) for span in re.findall(r"\\multicolumn\{(\d+)\}", row)]
        assert len(re.findall(r"(?<!\\)&", row)) + 1 == n_columns or spans == [n_columns], row
    assert len(re.sub(r"\\\$|\$-\$|\$\\pm\$", "", body).split("$")) == 1  # no mathematics left open
    assert body.isascii()
    return rows


def test_the_latex_table_can_be_set_and_has_the_numbers_of_the_report(made, text):
    latex = report.latex(*made)
    rows = check_latex(latex, 6)
    assert r"\usepackage{booktabs}" in latex.splitlines()[0]
    assert all(latex.count(rule) == n for rule, n in ((r"\toprule", 1), (r"\midrule", 2), (r"\bottomrule", 1)))
    ours = [row.removesuffix(r" \\").split(" & ") for row in rows if "multicolumn" not in row][1:]
    shown = [row for table in rows_of(sections(text)["F1"]) for row in table]
    assert [[cell.replace(r"$\pm$", "±").replace("$-$", MINUS) for cell in line[1:]] for line in ours] == [
        list(row.values())[1:] for row in shown
    ]
    assert [line[0] for line in ours] == ["linear", *[""] * 3, "mlp", *[""] * 3, "linear", *[""] * 2, "mlp", *[""] * 2]


# --- all of it, of comparisons that lack something


def test_everything_is_written(made, tmp_path):
    comparison, tables = made
    report.write(comparison, tables, [], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "comparison.md", "comparison.tex", *(f"{name}.csv" for name in tables._fields),
    }  # fmt: skip
    assert set(
        re.findall(r"\]\(([\w.]+)\)", sections((tmp_path / "comparison.md").read_text())["How it was made"])
    ) == {path.name for path in tmp_path.iterdir() if path.name != "comparison.md"}
    read = pd.read_csv(tmp_path / "by_seed.csv")
    pd.testing.assert_frame_equal(read, tables.by_seed, check_exact=True, check_dtype=False)


@pytest.mark.parametrize(
    ("changes", "n_columns"),
    [
        pytest.param({"seeds": (3,)}, 6, id="one seed"),
        pytest.param({"models": ("my|net_%",), "splits": ("id",)}, 6, id="one model of an odd name, held-out donors"),
        pytest.param({"losses": ("CE", "HCE", "HCE exact"), "models": ("mlp",)}, 8, id="three losses"),
        pytest.param({"temperature": None, "n_train": False, "models": ("mlp",)}, 6, id="no temperature, no store"),
        pytest.param({"losses": ("HCE", "HCE exact"), "models": ("mlp",)}, 5, id="cross entropy left out"),
    ],
)  # fmt: skip
def test_a_comparison_that_lacks_something_reads_as_well(changes, n_columns):
    comparison = comparisons.make_comparison(**changes)
    tables = numbers.tables(comparison)
    text = report.markdown(comparison, tables, [])
    check_latex(report.latex(comparison, tables), n_columns)
    rows_of(text)
    assert "nan" not in text.lower()
    assert "None" not in text
    assert ("±" in text) == (len(comparison.seeds) > 1)
    assert ("No temperature was fitted" in text) == (changes.get("temperature", 1.5) is None)
    assert ("Published:" in text) == ("CE" in comparison.losses)
