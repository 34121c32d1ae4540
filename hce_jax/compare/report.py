"""The report of a comparison: comparison.md for reading, comparison.tex for a paper, and every table as CSV.

F1 are given in per cent and differences in points, with one decimal; the CSV files have shares of 1 and all digits.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hce_jax import __version__
from hce_jax.compare.figures import Figure
from hce_jax.compare.numbers import MACRO_LABELLED, PUBLISHED, PUBLISHED_GAIN, Tables
from hce_jax.compare.trained import Comparison
from hce_jax.evaluation.reports import decoder_name

#: How a report names the splits.
SPLITS = {"id": "held-out donors (id)", "ood": "new studies (ood)"}
AVERAGES = ("macro", MACRO_LABELLED, "micro", "weighted")
#: The adjusted p below which a type is said to differ.
SIGNIFICANT = 0.05
#: Types in a table of losses, beside those that are significant.
MOST_LOSSES = 10
#: What stands for a number that there is none of, and the minus of numbers that are read.
NOTHING, MINUS, PLUS_MINUS = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{PLUS-MINUS SIGN}"
#: Fields of a configuration that say how a model was trained, whether the models differ in them or not.
FIELDS = ("model_type", "learning_rate", "weight_decay", "batch_size", "max_epochs", "early_stopping_patience")
#: Those that say which run it is, or where and how it ran, and not what was trained.
NO_RECIPE = {"model_name", "seed", "seeds", "losses", "use_hierarchical_loss", "epsilon", "log_dir", "data_path"}
NO_RECIPE |= {"cells_in", "log_every_n_steps", "checkpoint_every_minutes", "profile_steps", "save_top_k"}

TABLES = {
    "overall": "macro, micro and weighted F1 over seeds, differences and their intervals",
    "by_seed": "the F1 of each run",
    "per_type": "each cell type: F1, difference, test, numbers of cells",
    "by_class": "the difference by depth, of leaves and others, of connected and isolated types, for each seed",
    "decoders": "every number of each decoder",
    "calibration": "temperature, and the calibration error before and after",
    "reliability": "confidence and accuracy in 15 bins",
}


def write(comparison: Comparison, tables: Tables, figures: Sequence[Figure], folder: Path) -> None:
    """Write the report and the tables.

    Parameters
    ----------
    comparison, tables
        What was compared, and its numbers.
    figures
        The pictures that lie in the folder.
    folder
        Where ``comparison.md``, ``comparison.tex`` and a CSV file for each table go; it must be there.

    Raises
    ------
    OSError
        If a file cannot be written.

    Examples
    --------
    >>> write(comparison, tables, draw(comparison, tables, folder), folder)  # doctest: +SKIP
    """
    for name, table in tables._asdict().items():
        table.to_csv(folder / f"{name}.csv", index=False)
    (folder / "comparison.md").write_text(markdown(comparison, tables, figures), encoding="utf-8")
    (folder / "comparison.tex").write_text(latex(comparison, tables), encoding="utf-8")


# --- numbers as a person reads them


def number(value: float, digits: int = 1, scale: float = 100.0) -> str:
    """Write a share in per cent, or another number by its scale.

    Examples
    --------
    >>> number(0.1234), number(1.2345, 2, scale=1.0), number(float("nan")) == NOTHING
    ('12.3', '1.23', True)
    """
    return NOTHING if np.isnan(value) else f"{scale * value:.{digits}f}".replace("-", MINUS)


def spread(mean: float, sd: float) -> str:
    """Write a mean in per cent with its standard deviation, if there is one.

    Examples
    --------
    >>> spread(0.7012, float("nan")), spread(0.7012, 0.004) == "70.1 " + PLUS_MINUS + " 0.4"
    ('70.1', True)
    """
    return number(mean) if np.isnan(sd) else f"{number(mean)} {PLUS_MINUS} {number(sd)}"


def gain(difference: float, low: float = np.nan, high: float = np.nan) -> str:
    """Write a difference in points with its sign, and its interval, if there is one.

    Examples
    --------
    >>> gain(0.1234, 0.0912, 0.152), gain(0.05)
    ('+12.3 (9.1 to 15.2)', '+5.0')
    """
    if np.isnan(difference):
        return NOTHING
    interval = "" if np.isnan(low) else f" ({number(low)} to {number(high)})"
    return f"{100 * difference:+.1f}".replace("-", MINUS) + interval


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]], n_names: int = 1) -> str:
    r"""Lay out a Markdown table: the first columns, of names, to the left, the others, of numbers, to the right.

    Examples
    --------
    >>> print(markdown_table(["type", "F1"], [["B|T cell", 1.5]]))
    | type | F1 |
    | :-- | --: |
    | B\|T cell | 1.5 |
    """
    lines = [header, [":--"] * n_names + ["--:"] * (len(header) - n_names), *rows]
    return "\n".join("| " + " | ".join(_cell(str(text)) for text in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Keep a text from ending its cell, or being taken for a tag or emphasis."""
    return re.sub(r"([\\|<*`])", r"\\\1", " ".join(text.split()))


# --- Markdown


def markdown(comparison: Comparison, tables: Tables, figures: Sequence[Figure]) -> str:
    """Write the report as Markdown.

    Parameters
    ----------
    comparison, tables, figures
        As :func:`write`.

    Examples
    --------
    >>> print(markdown(comparison, tables, []).splitlines()[0])  # doctest: +SKIP
    # HCE against CE: linear, mlp, tabnet on atlas
    """
    pictures = _Pictures(figures)
    parts = [
        *_overall(comparison, tables, pictures),
        *_cell_types(comparison, tables, pictures),
        *_ontology(comparison, tables, pictures),
        *_decoders(comparison, tables),
        *_calibration(tables, pictures),
        *_making(comparison),
        *pictures.left(),
    ]
    return "\n\n".join(parts) + "\n"


class _Pictures:
    """The pictures, each shown once: where its kind belongs, or at the end."""

    def __init__(self, figures: Sequence[Figure]):
        self._waiting = list(figures)

    def of(self, *kinds: str) -> Iterator[str]:
        """Give those whose names begin with a kind."""
        for figure in list(self._waiting):
            if any(re.fullmatch(rf"{kind}(_.*)?", figure.name) for kind in kinds):
                self._waiting.remove(figure)
                yield f"![{figure.name}]({figure.name}.png)\n\n*{_cell(figure.caption)}* ([PDF]({figure.name}.pdf))"

    def left(self) -> Iterator[str]:
        """Give those that have not been shown."""
        if self._waiting:
            yield "## Further pictures"
            yield from self.of(".*")


def _overall(comparison: Comparison, tables: Tables, pictures: _Pictures) -> Iterator[str]:
    yield f"# {_cell(_title(comparison))}"
    yield "\n".join(f"- {_cell(sentence)}" for sentence in (*_findings(comparison, tables), *comparison.notes))
    yield "## F1"
    header = _overall_header(comparison)
    for split in comparison.splits:
        yield f"**{SPLITS[split].capitalize()}**, F1 in per cent, differences in points:"
        yield markdown_table(header, _overall_rows(comparison, tables.overall, split), n_names=2)
    several = "" if len(comparison.seeds) < 2 else f"{PLUS_MINUS}: standard deviation over {_seeds(comparison)}. "
    yield (
        f"{several}In parentheses: 95 % interval of the difference by bootstrap over studies, the same studies for all "
        "runs: how far the difference hangs on which studies there are."
    )
    if _has_published(comparison):
        yield (
            "Published: macro F1 in Cultrera di Montesano et al., Nat Comput Sci 2026, on the published data. Ours is "
            f"on {_cell(comparison.store)}: these are other cells. The paper states one range of gains on new studies "
            "for its three models, and its id figures are very probably over its 80 shared types."
        )
    yield from pictures.of("overall")


def _title(comparison: Comparison) -> str:
    losses = f"{_list(comparison.losses[1:])} against {comparison.losses[0]}"
    return f"{losses}: {_list(comparison.models)} on {comparison.store}"


def _findings(comparison: Comparison, tables: Tables) -> Iterator[str]:
    """Say in a sentence for each loss and split what macro F1 gains."""
    averages = {"macro": "macro F1", MACRO_LABELLED: "macro F1 over labelled types alone"}
    for loss, split, average in itertools.product(comparison.losses[1:], reversed(comparison.splits), averages):
        rows = _where(tables.overall, loss=loss, split=split, average=average)
        if not rows.empty:
            gains = [f"{row['model']} {gain(row['difference'], row['low'], row['high'])}" for _, row in rows.iterrows()]
            what = f"{loss} {MINUS} {comparison.losses[0]} in points of {averages[average]}"
            yield f"On {SPLITS[split]}, {what}: {_list(gains)}."


def _overall_header(comparison: Comparison) -> list[str]:
    baseline, *others = comparison.losses
    differences = [f"{loss} {MINUS} {baseline}" for loss in others]
    return ["model", "F1", baseline, *others, *differences] + ["published"] * _has_published(comparison)


def _overall_rows(comparison: Comparison, overall: pd.DataFrame, split: str) -> Iterator[list[str]]:
    """Give a line for each model and average: F1 with each loss, each difference, and what is published."""
    for model in comparison.models:
        for average in AVERAGES:
            chosen = _where(overall, model=model, average=average, split=split)
            if chosen.empty:  # the same as macro in this split
                continue
            rows = [_where(chosen, loss=loss).iloc[0] for loss in comparison.losses]
            line = [model, average, *(spread(row["mean"], row["sd"]) for row in rows)]
            line += [gain(row["difference"], row["low"], row["high"]) for row in rows[1:]]
            if _has_published(comparison):
                line.append(_published(comparison, model, split) if average == "macro" else "")
            yield line


def _published(comparison: Comparison, model: str, split: str) -> str:
    """Say what the paper states of a model, or nothing."""
    model_type = comparison.of(model, comparison.losses[0])[0].config["model_type"]
    known = [loss for loss in comparison.losses if (model_type, loss, split) in PUBLISHED]
    texts = [f"{loss} {number(PUBLISHED[model_type, loss, split], 0)}" for loss in known]
    if known == ["CE"] and split == "ood" and "HCE" in comparison.losses:
        least, most = (f"{100 * points:+.0f}" for points in PUBLISHED_GAIN)
        texts.append(f"HCE {least} to {most}")
    return _list(texts)


def _has_published(comparison: Comparison) -> bool:
    return any(_published(comparison, model, split) for model in comparison.models for split in comparison.splits)


def _where(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """Give the rows with these values."""
    for column, value in values.items():
        table = table[table[column] == value]
    return table


def _cell_types(comparison: Comparison, tables: Tables, pictures: _Pictures) -> Iterator[str]:
    yield "## Cell types"
    yield (
        f"Tested: paired t-test over {_seeds(comparison)}, p adjusted for all types of a line (Holm); significant: "
        f"below {SIGNIFICANT}. A type whose difference is the same with every seed is not tested."
        if len(comparison.seeds) > 1
        else "With one seed no type is tested."
    )
    groups = [
        ((model, loss, SPLITS[split]), _where(tables.per_type, model=model, loss=loss, split=split))
        for model in comparison.models
        for loss in comparison.losses[1:]
        for split in comparison.splits
    ]
    header = ["model", "loss", "cells", "types", "higher F1", "lower F1", "tested", "gain significantly"]
    lines = ([*names, *_counted(rows)] for names, rows in groups)
    yield markdown_table([*header, "lose significantly"], lines, n_names=3)
    yield "### Which types lose"
    yield f"The {MOST_LOSSES} largest losses of each, and all that are significant:"
    for names, rows in groups:
        yield from _losses(comparison, _list(names), rows)
    yield from pictures.of("waterfall")


def _counted(rows: pd.DataFrame) -> list[int]:
    """Count the types, those that gain, lose and are tested, and those that gain and lose significantly."""
    differs = rows["p_holm"] < SIGNIFICANT
    higher, lower = rows["difference"] > 0, rows["difference"] < 0
    counted = [higher, lower, rows["p_holm"].notna(), differs & higher, differs & lower]
    return [len(rows), *(int(each.sum()) for each in counted)]


def _losses(comparison: Comparison, title: str, rows: pd.DataFrame) -> Iterator[str]:
    """Give the table of the types that lose, the largest loss first."""
    lost = rows[rows["difference"] < 0].sort_values("difference", kind="stable")
    shown = lost[(np.arange(len(lost)) < MOST_LOSSES) | (lost["p_holm"] < SIGNIFICANT)]
    if shown.empty:
        yield f"**{_cell(title)}**: none."
        return
    yield f"**{_cell(title)}**"
    baseline = comparison.losses[0]
    header = ["cell type", "id", "difference", f"F1 {baseline}", f"F1 {rows['loss'].iloc[0]}", "p (Holm)", "cells"]
    lines = [
        [
            row["label"],
            row["cl_id"] or "",
            gain(row["difference"]),
            spread(row["f1_baseline"], row["f1_baseline_sd"]),
            spread(row["f1"], row["f1_sd"]),
            _p(row["p_holm"]),
            f"{row['n_cells']:,}",
            row["n_studies"],
            NOTHING if np.isnan(row["n_train"]) else f"{row['n_train']:,.0f}",
            row["depth"],
        ]
        for _, row in shown.iterrows()
    ]
    yield markdown_table([*header, "studies", "training cells", "depth"], lines, n_names=2)


def _p(value: float) -> str:
    if np.isnan(value):
        return NOTHING
    return "below 0.001" if value < 0.001 else f"{value:.3f}"


def _ontology(comparison: Comparison, tables: Tables, pictures: _Pictures) -> Iterator[str]:
    yield "## On the ontology"
    yield from pictures.of("ontology", "dag")
    for loss in comparison.losses[1:]:
        rows = tables.by_class[tables.by_class["loss"] == loss]
        groups = [(model, split) for model in comparison.models for split in comparison.splits]
        what = f"{_cell(loss)} {MINUS} {_cell(comparison.losses[0])}"
        yield f"**{what}**, mean difference in F1 of the types of a kind, points (in parentheses: how many they are):"
        header = ["types", *(f"{model}, {split}" for model, split in groups)]
        yield markdown_table(header, _class_rows(rows, groups))
    yield (
        "Depth: ancestors among the types. A leaf has no type below it; an isolated type has no relative at all: HCE "
        "is cross entropy for its cells, and only what other types do can change it."
    )
    yield from pictures.of("by_class")


def _class_rows(rows: pd.DataFrame, groups: Sequence[tuple[str, str]]) -> Iterator[list[str]]:
    """Give a line for each class of types, those by depth first."""
    classes = list(dict.fromkeys(zip(rows["grouping"], rows["value"], strict=True)))
    order = ("depth", "leaf", "connected")
    for grouping, value in sorted(classes, key=lambda of: (order.index(of[0]), int(of[1]) if of[1].isdigit() else 0)):
        chosen = _where(rows, grouping=grouping, value=value)
        name = f"depth {value}" if grouping == "depth" else value
        yield [name, *(_class_cell(_where(chosen, model=model, split=split)) for model, split in groups)]


def _class_cell(chosen: pd.DataFrame) -> str:
    """Write mean and spread over seeds, and the number of types."""
    if chosen.empty:
        return NOTHING
    sd = "" if len(chosen) < 2 else f" {PLUS_MINUS} {number(chosen['difference'].std())}"
    return f"{gain(chosen['difference'].mean())}{sd} ({chosen['n_types'].iloc[0]})"


def _decoders(comparison: Comparison, tables: Tables) -> Iterator[str]:
    yield "## Decoders"
    temperatures = tables.calibration.set_index(["model", "loss", "split"])["temperature"]
    shares = ["wrong", "descendant", "ancestor", "unassigned"]
    header = ["model", "loss", "decoder", "macro F1", "accuracy", "hierarchical F1", "distance", "wrong"]
    header += ["over-specific", "under-specific", "unassigned", "ECE", "AURC"]
    for split in comparison.splits:
        lines = []
        for _, row in tables.decoders[tables.decoders["split"] == split].iterrows():
            asked = {"confidence": row["confidence"], "max_error": row["max_error"]}
            temperature = temperatures[(row["model"], row["loss"], split)]
            name = decoder_name(row["decoder"], **asked, temperature=temperature)
            line = [row["model"], row["loss"], name, *(number(row[score]) for score in ("f1_macro", "accuracy"))]
            line += [number(row["hierarchical_f1"]), number(row["ontology_distance"], 2, scale=1.0)]
            line += [number(row[share]) for share in shares]
            lines.append(line + [number(row[score], 3, scale=1.0) for score in ("ece", "aurc")])
        yield f"**{SPLITS[split].capitalize()}**, means over seeds; F1, accuracy and shares in per cent:"
        yield markdown_table(header, lines, n_names=3)
    yield (
        "The same probabilities, decided in other ways. Over-specific: below the label, which macro F1 and accuracy "
        "count as right; under-specific: above it; unassigned: named no type. Wrong: of the cells whose label says "
        "whether the answer is right, those whose answer is neither the label nor above it. Distance: edges from the "
        "label in the ontology, of assigned cells. ECE: expected calibration error; AURC: area under the risk-coverage "
        "curve; both are better the lower. T: temperature, the mean over seeds."
    )


def _calibration(tables: Tables, pictures: _Pictures) -> Iterator[str]:
    yield "## Calibration"
    header = ["model", "loss", "cells", "T", "ECE before", "ECE after"]
    lines = []
    for _, row in tables.calibration.iterrows():
        errors = [number(row[name], 3, scale=1.0) for name in ("ece_before", "ece_after")]
        lines.append(
            [row["model"], row["loss"], SPLITS[row["split"]], number(row["temperature"], 2, scale=1.0), *errors]
        )
    yield markdown_table(header, lines, n_names=3)
    if tables.calibration["temperature"].isna().all():
        yield "No temperature was fitted: `python evaluate.py --calibrate_on val` does so."
    else:
        yield (
            "Before and after temperature scaling, means over seeds: softmax(ln p / T) with the T that is likeliest on "
            f"validation cells. It changes no prediction. {NOTHING}: no temperature was fitted."
        )
    yield from pictures.of("calibration")


def _making(comparison: Comparison) -> Iterator[str]:
    yield "## How it was made"
    yield (
        f"hce_jax {__version__}; hierarchy of the Cell Ontology, release {comparison.ontology_release or 'not known'}; "
        f"{_seeds(comparison)} ({_list(map(str, comparison.seeds))}) of each model with each loss. Of the "
        "configurations the main fields, and those in which the models differ:"
    )
    recipes = [_recipe(comparison, model) for model in comparison.models]
    names = dict.fromkeys(name for recipe in recipes for name in recipe)
    texts = {name: [recipe.get(name, "") for recipe in recipes] for name in (*FIELDS, *names)}
    shown = [name for name, each in texts.items() if (name in FIELDS and any(each)) or len({*each}) > 1]
    yield markdown_table(["field", *comparison.models], ([name, *texts[name]] for name in shown))
    yield "Runs, in the order of the seeds:"
    lines = [
        [model, loss, _list("/".join(run.folder.parts[-3:]) for run in comparison.of(model, loss))]
        for model in comparison.models
        for loss in comparison.losses
    ]
    yield markdown_table(["model", "loss", "runs"], lines, n_names=3)
    yield "Files, with shares of 1 in place of per cent and points:"
    files = {f"{name}.csv": what for name, what in TABLES.items()} | {"comparison.tex": "the table of F1 for LaTeX"}
    yield "\n".join(f"- [{name}]({name}): {what}" for name, what in files.items())


def _recipe(comparison: Comparison, model: str) -> dict[str, str]:
    """Give what the configurations of a model say of its training, as text; of runs that differ, all of it."""
    configs = [run.config for run in comparison.runs if run.model == model]
    names = dict.fromkeys(name for config in configs for name in config if name not in NO_RECIPE)
    return {name: ", ".join(dict.fromkeys(str(config.get(name, "")) for config in configs)) for name in names}


def _seeds(comparison: Comparison) -> str:
    return f"{len(comparison.seeds)} seeds" if len(comparison.seeds) > 1 else "one seed"


def _list(texts: Iterable[str]) -> str:
    return ", ".join(texts)


# --- LaTeX

_LATEX = {character: "\\" + character for character in "&%$#_{}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}"}
_LATEX |= {">": r"\textgreater{}", MINUS: "$-$", PLUS_MINUS: r"$\pm$", NOTHING: "--", "|": r"\textbar{}"}


def escape_latex(text: str) -> str:
    r"""Write a text so that LaTeX sets it as it is.

    Examples
    --------
    >>> print(escape_latex("80 % of CD4_a & b"))
    80 \% of CD4\_a \& b
    """
    return "".join(_LATEX.get(character, character) for character in text)


def latex(comparison: Comparison, tables: Tables) -> str:
    r"""Write the table of F1 for LaTeX, with the rules of booktabs.

    Parameters
    ----------
    comparison, tables
        As :func:`write`.

    Examples
    --------
    >>> print(latex(comparison, tables).splitlines()[0])  # doctest: +SKIP
    % In the preamble: \usepackage{booktabs}; where the table is to stand: \input{comparison.tex}
    """
    header = _overall_header(comparison)
    lines = [
        r"% In the preamble: \usepackage{booktabs}; where the table is to stand: \input{comparison.tex}",
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{escape_latex(_caption(comparison))}}}",
        r"\label{tab:hce-comparison}",
        rf"\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}",
        r"\toprule",
        _latex_row(header),
    ]
    for split in comparison.splits:
        heading = escape_latex(SPLITS[split].capitalize())
        lines += [r"\midrule", rf"\multicolumn{{{len(header)}}}{{l}}{{\emph{{{heading}}}}} \\"]
        for model, average, *texts in _overall_rows(comparison, tables.overall, split):
            lines.append(_latex_row([model if average == AVERAGES[0] else "", average, *texts]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(escape_latex, cells)) + r" \\"


def _caption(comparison: Comparison) -> str:
    sd = "" if len(comparison.seeds) < 2 else f" {PLUS_MINUS} standard deviation over {_seeds(comparison)}"
    published = " Published: macro F1 on the published data (Cultrera di Montesano et al., 2026)."
    return (
        f"F1 in per cent{sd}, and differences in points with their 95 % interval by bootstrap over studies. Trained on "
        f"{comparison.store}.{published * _has_published(comparison)}"
    )
