"""The verbs of `python -m hce_jax`, as a person runs them."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from messages import one_line_error
from stores import write_tiny_store

import hce_jax.__main__

ROOT = Path(__file__).parents[1]


def run(cwd, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "hce_jax", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "none"},  # no verb here needs a device
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("main")
    write_tiny_store(folder / "merlin")
    return folder


def test_convert_reports_what_it_did_and_what_comes_next(folder):
    done = run(folder, "convert", "merlin", "my cells", "--verify", "--workers=2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    size = sum(path.stat().st_size for path in (folder / "my cells").rglob("*.arrow"))
    for line in (
        r"store       my cells, compared with its source: no difference",
        r"cells       130 \(train 90, val 23, test 17\)",
        rf"size        0\.\d MB in 5 files, {size / 130:,.0f} bytes a cell",
        r"kept as     counts \d+ \([\d.]+%\), values \d+",
        r"time        \d+ s for 130 cells, [\d,]+ cells/s",
        r"next        DATA_PATH='my cells' python train.py --config configs/tabnet_hce.py",
    ):
        assert re.search(f"^{line}$", done.stdout, re.MULTILINE), (line, done.stdout)
    assert not (folder / "my cells.partial").exists()
    again = run(folder, "convert", "merlin", "my cells", "--verify")
    assert again.returncode == 0
    assert again.stdout.startswith("my cells exists: comparing it with merlin, converting nothing\n")
    assert "\ntime" not in again.stdout
    assert "my cells exists already" in one_line_error(run(folder, "convert", "merlin", "my cells"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "a verb is needed; there is convert (see python -m hce_jax --help)"),
        (("conver",), "no verb 'conver'; there is convert (see"),
        (("convert",), "required: SOURCE, DESTINATION; see python -m hce_jax convert --help"),
        (("convert", "merlin", "new", "--verifi"), "unrecognized arguments: --verifi; see python -m hce_jax convert"),
        (("convert", "merlin", "new", "--workers=some"), "--workers: invalid int value: 'some'; see"),
        (("convert", "merlin", "new", "--workers=0"), "--workers=0: at least one is needed"),
        (("convert", "nowhere", "new"), "nowhere is not a folder; name the folder of a merlin store"),
        (("convert", "merlin", "merlin/new"), "merlin and merlin/new lie in one another"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(folder, arguments, says):
    assert says in one_line_error(run(folder, *arguments))
    assert not (folder / "new").exists()


def test_help_of_both_levels_has_exit_0(folder):
    for arguments, says in ((("--help",), "convert     make a fast cell store"), (("convert", "-h"), "--workers N")):
        done = run(folder, *arguments)
        assert done.returncode == 0
        assert says in done.stdout


def test_an_interrupted_verb_says_what_is_kept_and_has_exit_130(folder, monkeypatch, capsys):
    def interrupted(*arguments, **flags):
        raise KeyboardInterrupt("interrupted; 3 of 5 files are finished")

    monkeypatch.setattr(hce_jax.__main__, "convert", interrupted)
    monkeypatch.setattr(sys, "argv", ["hce_jax", "convert", "a", "b"])
    with pytest.raises(SystemExit) as ended:
        hce_jax.__main__.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted; 3 of 5 files are finished\n"


def test_hyphens_and_underscores_are_alike_but_not_in_values(monkeypatch):
    said = {}
    verb = hce_jax.__main__.Verb(
        "", lambda parser: parser.add_argument("--gene-column"), lambda arguments: said.update(vars(arguments))
    )
    monkeypatch.setitem(hce_jax.__main__.VERBS, "build-store", verb)
    for arguments in (["build_store", "--gene_column=my_name"], ["build-store", "--gene-column", "my_name"]):
        said.clear()
        monkeypatch.setattr(sys, "argv", ["hce_jax", *arguments])
        hce_jax.__main__.main()
        assert said == {"gene_column": "my_name"}


def test_the_console_script_is_the_same(folder):
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["hce-jax"]
    assert script == f"{hce_jax.__main__.main.__module__}:{hce_jax.__main__.main.__name__}"
