"""The text of a compiled program (HLO), as instructions of computations."""

import math
import re
from typing import NamedTuple

_OPENING = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLED = re.compile(
    r"\b(?:to_apply|calls|body|condition|branch_computations|called_computations|true_computation|false_computation)"
    r"=\{?((?:%[\w.\-]+(?:, )?)+)"
)


class Instruction(NamedTuple):
    r"""One line: name, shape, operation, what it is given, the rest, and whether it is the root of its computation.

    Examples
    --------
    >>> computations("ENTRY %f (x: f32[2]) -> f32[2] {\n  ROOT %y = f32[2]{0} negate(%x), metadata={}\n}")["f"]["y"]
    Instruction(name='y', shape='f32[2]{0}', op='negate', arguments='%x', attributes='metadata={}', is_root=True)
    """

    name: str
    shape: str
    op: str
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """The instructions whose results it is given."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def source(self) -> str:
        """Where it comes from: the path of its op_name."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def called(self) -> list[str]:
        """The computations that it calls."""
        return re.findall(r"%([\w.\-]+)", " ".join(_CALLED.findall(self.attributes)))

    def attribute(self, pattern: str) -> str | None:
        """Return the group of a pattern that its attributes are searched for."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


Computation = dict[str, Instruction]


class Computations(dict[str, Computation]):
    """The computations by name, and the name of the first to run."""

    entry: str = ""


def computations(text: str) -> Computations:
    """Read the text of a compiled program."""
    found, body = Computations(), Computation()
    for line in text.splitlines():
        if opening := _OPENING.match(line):
            body = found[opening[2]] = {}
            if opening[1]:
                found.entry = opening[2]
        elif match := _INSTRUCTION.match(line):
            root, name, shape, op, rest = match.groups()
            arguments, _, attributes = rest.partition("), ")
            body[name] = Instruction(name, shape, op, arguments.removesuffix(")"), attributes, bool(root))
    return found


def n_bytes(shape: str) -> int:
    """Return the bytes of a shape, which may be a tuple.

    Examples
    --------
    >>> n_bytes("f32[2,3]{1,0}"), n_bytes("(pred[4]{0}, bf16[], /*index=2*/u4[6]{0})")
    (24, 9)
    """
    arrays = re.findall(r"\b(?:(pred)|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape)
    lengths = [math.prod(sizes(axes)) for *_, axes in arrays]
    return sum(n if pred else n * int(bits) // 8 for n, (pred, bits, _) in zip(lengths, arrays, strict=True))


def sizes(axes: str) -> list[int]:
    """Return the numbers of a list that may be empty: ``2,3``."""
    return [int(n) for n in re.findall(r"\d+", axes)]
