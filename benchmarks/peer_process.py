"""The process of a peer (peers.py), as seen by a measurement."""

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class PeerError(Exception):
    """A peer could not do what it was asked.

    Parameters
    ----------
    peer
        Its name.
    why
        What happened.
    """

    def __init__(self, peer: str, why: str):
        super().__init__(f"{peer} did not run: {why}")
        self.peer = peer


class PeerProcess:
    """A process of its own for PyTorch: its memory, its libraries and its end are no matter of ours.

    It is started when it is first asked, and again when it has ended.

    Parameters
    ----------
    name
        Of the peer.
    genes, types
        Sizes of the models.
    """

    def __init__(self, name: str, genes: int, types: int):
        self.name = name
        self._command = [sys.executable, str(Path(__file__).with_name("peers.py"))]
        self._command += ["--genes", str(genes), "--types", str(types)]
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def prepare(self, request: dict[str, Any], seconds: float) -> None:
        """Let it prepare a step (the fields of peers.Request) and take it once.

        Raises
        ------
        PeerError
            If it cannot, or not in that time; in the latter case the process is at its end.
        """
        self._ask({"prepare": request}, seconds)

    def run(self, n_steps: int) -> float:
        """Let it take some steps; return the seconds they took.

        Raises
        ------
        PeerError
            If it cannot.
        """
        return self._ask({"run": n_steps}, 300)["seconds"]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # waits, and closes the pipes
            self._process = None

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._rest = b""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._answer(time.monotonic() + seconds))
        except (OSError, ValueError) as error:
            self.close()
            raise PeerError(self.name, str(error)) from error
        if "error" in answer:
            raise PeerError(self.name, answer["error"])
        return answer

    def _answer(self, until: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            if not select.select([self._process.stdout], [], [], max(until - time.monotonic(), 0))[0]:
                raise TimeoutError("no answer in time")
            read = os.read(self._process.stdout.fileno(), 2**16)
            if not read:
                raise BrokenPipeError("its process has ended")
            self._rest += read
        line, self._rest = self._rest.split(b"\n", 1)
        return line
