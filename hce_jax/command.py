"""What every command shares: flags, and a user's mistake as one line and exit code 2."""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from absl import flags

from hce_jax.errors import ConfigError, UserError

#: Exit code after Ctrl-C, as shells have it.
INTERRUPTED = 130


def run(main: Callable[[], None]) -> None:
    """Parse the command line's absl flags and run ``main``; end as :func:`exit_codes` says.

    Examples
    --------
    >>> if __name__ == "__main__":  # doctest: +SKIP
    ...     run(main)
    """
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        with exit_codes():
            _parse_flags()
            main()
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        # At once: threads that read ahead may be inside native code, which Python's own way to end would crash.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)


@contextmanager
def exit_codes() -> Iterator[None]:
    """End the process as every command does.

    Exit codes: 0 done, 2 a user's mistake (one line on standard error), 1 anything else, 130 interrupted.

    Examples
    --------
    >>> with exit_codes():  # doctest: +SKIP
    ...     main()
    """
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        sys.stdout = open(os.devnull, "w")
        sys.exit(1)
    except OSError as error:  # a place that cannot be read or written, a full disk
        if error.filename is None:
            raise
        print(f"error: cannot use {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _parse_flags() -> None:
    if {"--help", "-h", "-help"} & set(sys.argv[1:]):
        print(sys.modules["__main__"].__doc__, flags.FLAGS.main_module_help(), sep="\n")
        sys.exit(0)
    try:
        rest = flags.FLAGS(sys.argv)[1:]
        if "config" in flags.FLAGS:
            getattr(flags.FLAGS.config, "to_dict", None)  # only now ml_collections tells that a file was not readable
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    except (AttributeError, KeyError) as error:  # ml_collections: an override of a field that the configuration lacks
        raise ConfigError(_unknown_field(str(error))) from error
    except Exception as error:  # a user's own configuration file may raise anything
        raise ConfigError(f"the configuration file cannot be read: {type(error).__name__}: {error}") from error
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}; flags are written --name=value (see --help)")


def _unknown_field(message: str) -> str:
    if "get_config" in message:
        return "the configuration file has no function get_config(); see configs/linear_hce.py"
    field, near = re.search(r"'(\w+)", message), re.search(r"Did you mean \W*(\w+)", message)
    name = f" {field[1]!r}" if field else ""
    remedy = f"did you mean {near[1]!r}?" if near else "configs/common.py lists the fields"
    return f"the configuration has no field{name}; {remedy}"
