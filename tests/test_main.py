"""The verbs of `python -m hce_jax`, as a person runs them."""

import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
from messages import one_line_error
from stores import write_tiny_store
from verbs import in_process

import hce_jax.__main__
import hce_jax.verbs.convert
from hce_jax import command
from hce_jax.errors import ConfigError

ROOT = Path(__file__).parents[1]
LINEAR = f"--config={ROOT / 'configs' / 'linear_hce.py'}"

# How ml_collections loads a file.
reads_a_configuration = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def run(cwd, *arguments, devices="none"):
    return subprocess.run(
        [sys.executable, "-m", "hce_jax", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": devices, "DATA_PATH": ""},
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
        ((), "new-studies, ontology, find-lr, import-torch, compare, reproduce (see python -m hce_jax --help)"),
        (("convert",), "required: SOURCE, DESTINATION; see python -m hce_jax convert --help"),
        (("convert", "merlin", "new", "--verifi"), "unrecognized arguments: --verifi; see python -m hce_jax convert"),
        (("convert", "merlin", "new", "--workers=some"), "--workers: invalid int value: 'some'; see"),
        (("convert", "merlin", "new", "--workers=0"), "--workers=0: at least one is needed"),
        (("convert", "nowhere", "new"), "nowhere is not a folder; name the folder of a merlin store"),
        (("convert", "merlin", "merlin/new"), "merlin and merlin/new lie in one another"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(folder, arguments, says, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert says in in_process(monkeypatch, capsys, *arguments)
    assert not (folder / "new").exists()


def test_a_mistake_is_one_line_and_exit_2_of_a_process(folder):
    assert "no verb 'conver'; there is convert (see" in one_line_error(run(folder, "conver"))


def test_help_of_both_levels_has_exit_0(folder):
    for arguments, says in (
        (("--help",), "convert       make a fast cell store"),
        (("convert", "-h"), "--workers N"),
        (("find_lr", "--help"), "--config.field=value changes a field"),
    ):
        done = run(folder, *arguments)
        assert done.returncode == 0
        assert says in done.stdout


def test_find_lr_suggests_a_learning_rate_and_draws_how_the_loss_went(folder, tmp_path):
    changes = (f"--config.data_path={folder / 'merlin'}", "--config.batch_size=30", "--config.seeds=(4, 5)")
    done = run(tmp_path, "find_lr", LINEAR, *changes, "--num_training=40", "--min-lr=1e-5", devices="cpu")
    assert done.returncode == 0, done.stderr
    for line in (
        r"data        \S+/merlin: 90 training and 23 validation cells, 12 genes, 5 cell types; cells in files on disk",
        r"steps       40 of 40, learning rate up to 1.0e\+00",
        r"suggested   --config.learning_rate=\d\.\de-0[1-3]",
        r"plot        find_lr_linear.png",
    ):
        assert re.search(f"^{line}$", done.stdout, re.MULTILINE), (line, done.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["find_lr_linear.png"]
    assert not (folder / "merlin" / "tb_logs").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("find-lr",), "the following arguments are required: --config; see python -m hce_jax find-lr --help"),
        (("find-lr", "--config=absent.py"), "the configuration file cannot be read"),
        (("find-lr", LINEAR, "--config.batch_siz=1"), "no field 'batch_siz'; did you mean 'batch_size'?"),
        (("find-lr", LINEAR, "--config.batch_size=many"), "--config.batch_size=many: invalid literal for int()"),
        (("find-lr", LINEAR, "--config.batch_size=0"), "config.batch_size is 0; it must be 1 or more"),
        (("find-lr", LINEAR, "--config.data_path=nowhere"), "nowhere does not exist; set DATA_PATH"),
        (("find-lr", LINEAR, "--num-training=19"), "19 steps are too few"),
        (("find-lr", LINEAR, "--min_lr=2"), "learning rates from 2.0 to 1.0: both must be finite, and 0 < min_lr"),
        (("find-lr", LINEAR, "--plot=there.jpg"), "there.jpg is no name for a picture; it must end in .png or .pdf"),
        (("find-lr", LINEAR, "--plot=no/plot.png"), "no/plot.png cannot be written: the folder no does not exist"),
        (("convert", "merlin", "new", "--config.x=1"), "unrecognized arguments: --config.x=1; see"),
    ],
)
@reads_a_configuration
def test_a_mistake_with_a_configuration_is_one_line(arguments, says, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert says in in_process(monkeypatch, capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@reads_a_configuration
def test_find_lr_says_where_it_has_no_suggestion(folder, monkeypatch, capsys, tmp_path):
    changes = (f"--config.data_path={folder / 'merlin'}", "--config.batch_size=30")
    rates = ("--min-lr=1e3", "--max-lr=1e6")
    said = in_process(monkeypatch, capsys, "find-lr", LINEAR, *changes, *rates, f"--plot={tmp_path / 'plot.svg'}")
    assert re.search(r"^steps       [2-9] of 100, .*: then the loss diverged$", said, re.MULTILINE)
    assert "\nsuggested   none: too few steps to see where the loss falls; lower --min-lr" in said
    assert [path.name for path in tmp_path.iterdir()] == ["plot.svg"]


@reads_a_configuration
def test_a_configuration_may_use_others_in_its_folder_wherever_the_command_is_run(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep" / "my_configs").mkdir(parents=True)
    own = tmp_path / "deep" / "my_configs" / "own.py"
    own.with_name("other.py").write_text("STEPS = 7\n")
    own.write_text(
        "from ml_collections import ConfigDict\nfrom my_configs import other\n"
        "def get_config():\n    return ConfigDict({'steps': other.STEPS, 'batch_size': 1})\n"
    )
    assert command.read_config(str(own), ["--config.batch_size=30"]).to_dict() == {"steps": 7, "batch_size": 30}
    own.write_text("def get_config():\n    return {}\n")
    with pytest.raises(ConfigError, match="returns a dict; it must return a ConfigDict"):
        command.read_config(str(own), [])


def test_an_interrupted_verb_says_what_is_kept_and_has_exit_130(folder, monkeypatch, capsys):
    def interrupted(*arguments, **flags):
        raise KeyboardInterrupt("interrupted; 3 of 5 files are finished")

    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(hce_jax.verbs.convert, "convert", interrupted)
    monkeypatch.setattr(sys, "argv", ["hce_jax", "convert", "a", "b"])
    with pytest.raises(SystemExit) as ended:
        hce_jax.__main__.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted; 3 of 5 files are finished\n"


def test_hyphens_and_underscores_are_alike_but_not_in_values(monkeypatch):
    said = {}
    verb = types.SimpleNamespace(
        PURPOSE="",
        describe=lambda parser: parser.add_argument("--gene-column"),
        run=lambda arguments: said.update(vars(arguments)),
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
