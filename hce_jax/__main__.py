"""The verbs of hce_jax.

    python -m hce_jax VERB ...        or, the same, hce-jax VERB ...
    python -m hce_jax VERB --help     the arguments and flags of a verb

In verbs and flags, hyphens and underscores are alike. The verbs:
"""

import argparse
import sys
from difflib import get_close_matches
from typing import NoReturn

from hce_jax import command
from hce_jax.errors import ConfigError
from hce_jax.verbs import (
    annotate,
    build_store,
    compare,
    convert,
    find_lr,
    import_torch,
    new_studies,
    ontology,
    reproduce,
)

#: How a flag begins that changes a field of the configuration.
_CHANGE = "--config."


class _Parser(argparse.ArgumentParser):
    """A parser that raises a user's mistake, for the one line that every command ends with."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


#: Each verb is a module of hce_jax.verbs: what it is for (PURPOSE), its arguments (describe), and what it does (run).
#: Where there is an argument ``config``, run gets the configuration, with changed fields.
VERBS = {
    "annotate": annotate,
    "build-store": build_store,
    "convert": convert,
    "new-studies": new_studies,
    "ontology": ontology,
    "find-lr": find_lr,
    "import-torch": import_torch,
    "compare": compare,
    "reproduce": reproduce,
}


def main() -> None:
    """Run the verb that the command line names.

    Examples
    --------
    >>> sys.argv[1:] = ["convert", "merlin", "cells"]  # doctest: +SKIP
    >>> main()  # doctest: +SKIP
    """
    with command.exit_codes():
        name, arguments = _hyphened(sys.argv[1:])
        if name in ("--help", "-h", "help"):
            print(__doc__, *(f"    {name:14}{verb.PURPOSE}" for name, verb in VERBS.items()), sep="\n")
            return
        if name not in VERBS:
            near = get_close_matches(name, VERBS, n=1) or VERBS
            problem = f"no verb {name!r}" if name else "a verb is needed"
            raise ConfigError(f"{problem}; there is {', '.join(near)} (see python -m hce_jax --help)")
        parser = _Parser(prog=f"python -m hce_jax {name}", allow_abbrev=False)
        VERBS[name].describe(parser)
        VERBS[name].run(_parsed(parser, arguments))


def _hyphened(arguments: list[str]) -> tuple[str, list[str]]:
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    flags = [each.partition("=") for each in rest]
    rest = [f.replace("_", "-") + eq + value if _is_own_flag(f) else f + eq + value for f, eq, value in flags]
    return verb.replace("_", "-"), rest


def _is_own_flag(name: str) -> bool:
    return name.startswith("--") and not name.startswith(_CHANGE)


def _parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse; where the verb has --config, give the configuration in place of its file."""
    changes = [each for each in arguments if each.startswith(_CHANGE)]
    parsed = parser.parse_args([each for each in arguments if each not in changes])
    if "config" in parsed:
        parsed.config = command.read_config(parsed.config, changes)
    elif changes:
        parser.error(f"unrecognized arguments: {' '.join(changes)}")
    return parsed


if __name__ == "__main__":
    main()
