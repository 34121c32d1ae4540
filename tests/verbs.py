"""Verbs, run within the process of a test."""

import subprocess
import sys

from messages import one_line_error

import hce_jax.__main__


def in_process(monkeypatch, capsys, *arguments):
    """Return what a verb printed; quicker than a process of its own where the verb needs jax."""
    monkeypatch.setattr(sys, "argv", ["hce_jax", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        hce_jax.__main__.main()
    except SystemExit as end:
        done = capsys.readouterr()
        return one_line_error(subprocess.CompletedProcess(arguments, end.code, done.out, done.err))
    return capsys.readouterr().out
