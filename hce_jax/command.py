"""What every command shares: flags, and a user's mistake as one line and exit code 2."""

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

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
    with exit_codes():
        _parse_flags()
        main()


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
        # At once: threads that read ahead may be inside native code, which Python's own way to end would crash.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)


@contextmanager
def sigterm_as_ctrl_c(left: str = "nothing was written") -> Iterator[None]:
    """End as by Ctrl-C when told to end (SIGTERM), so that nothing half done is left; ``left`` says what is.

    Examples
    --------
    >>> with sigterm_as_ctrl_c():
    ...     signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    False
    """

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(f"told to end (SIGTERM); {left}")

    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _parse_flags() -> None:
    if {"--help", "-h", "-help"} & set(sys.argv[1:]):
        print(sys.modules["__main__"].__doc__, flags.FLAGS.main_module_help(), sep="\n")
        sys.exit(0)
    with _configuration_mistakes():
        rest = flags.FLAGS([sys.argv[0], *map(_with_underscores, sys.argv[1:])])[1:]
        if "config" in flags.FLAGS:
            _check_readable(flags.FLAGS.config)
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}; flags are written --name=value (see --help)")


def _with_underscores(argument: str) -> str:
    """Take --label-column for --label_column: the verbs' flags, which messages name, have hyphens."""
    flag, equals, value = argument.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if flag.startswith("--") else argument


def read_config(path: str, changes: Sequence[str]) -> ConfigDict:
    """Read a configuration file, and change fields of it as ``--config FILE --config.field=value`` does.

    Parameters
    ----------
    path
        The Python file; its ``get_config()`` gives the configuration.
    changes
        ``--config.field=value`` each.

    Raises
    ------
    ConfigError
        If the file cannot be read, or has no such field.

    Examples
    --------
    >>> read_config("configs/linear_hce.py", ["--config.batch_size=4096"]).batch_size  # doctest: +SKIP
    4096
    """
    arguments = ["", f"--config={path}", *changes]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    sys.path.append(str(Path(path).absolute().parent.parent))  # a file in configs/ imports others from configs
    with _configuration_mistakes():
        values(arguments)
        _check_readable(config.value)
    if not isinstance(config.value, ConfigDict):
        raise ConfigError(
            f"get_config() of {path} returns a {type(config.value).__name__}; it must return a ConfigDict"
        )
    return config.value


def _check_readable(config: Any) -> None:
    getattr(config, "to_dict", None)  # only now ml_collections tells that a file was not readable


@contextmanager
def _configuration_mistakes() -> Iterator[None]:
    try:
        yield
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    except (AttributeError, KeyError) as error:  # ml_collections: an override of a field that the configuration lacks
        raise ConfigError(_unknown_field(str(error))) from error
    except Exception as error:  # a user's own configuration file may raise anything
        raise ConfigError(f"the configuration file cannot be read: {type(error).__name__}: {error}") from error


def _unknown_field(message: str) -> str:
    if "get_config" in message:
        return "the configuration file has no function get_config(); see configs/linear_hce.py"
    field, near = re.search(r"'(\w+)", message), re.search(r"Did you mean \W*(\w+)", message)
    name = f" {field[1]!r}" if field else ""
    remedy = f"did you mean {near[1]!r}?" if near else "configs/common.py lists the fields"
    return f"the configuration has no field{name}; {remedy}"
