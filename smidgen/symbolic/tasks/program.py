"""Computer program evaluation, in the style of Zaremba and Sutskever, "Learning to execute": what does a program print?

A program is made by `nesting` operations. Each takes operands, puts its result on a stack, and may write a line. An operand is the top of
the stack, or, when that is empty, a number of 1 .. 10^L - 1; operands fill their places in drawn order, so that an earlier result may be
any of them. Operations, each as likely:

    pair        (e1+e2)  (e1-e2)
    product     (e1*b)  (b*e1)                                  b in 1 .. 4L
    identity    e1
    variable    V=e1                                            then (V+e2)  (V-e2)
    loop        V=e1; for x in range(n):V+=e2, or -=            then V; n in 1 .. 4L
    if          (e3 if e1>e2 else e4), or <

V is a letter a .. j not yet used. The last line prints what is on the stack. Train and dev: nesting in 1 .. 2 and L in 1 .. 5, drawn; id:
2 and 5; ood: 2 and 7. Groups are the operations in order; programs of two identities are a bare number and no achievement.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import numpy as np

from smidgen.symbolic.tasks import Examples, Task, hashed
from smidgen.symbolic.vocabulary import Vocabulary

VARIABLES = "abcdefghij"
NESTING, DIGITS, LONGER = 2, 5, 7
LENGTH = 83  # with the end: two nested choices of literals, or two loops
Operand = tuple[str, int]  # an expression and its value


@dataclass
class Program:
    """A program that grows by operations."""

    digits: int
    rng: Random
    stack: list[Operand] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    free: list[str] = field(default_factory=lambda: list(VARIABLES))

    def operands(self, count: int) -> list[Operand]:
        """As many, in their places."""
        taken = [self.stack.pop() if self.stack else self.literal() for _ in range(count)]
        self.rng.shuffle(taken)
        return taken

    def literal(self) -> Operand:
        """A number."""
        value = self.rng.randint(1, 10**self.digits - 1)
        return str(value), value

    def small(self) -> int:
        """A factor or count of turns."""
        return self.rng.randint(1, 4 * self.digits)

    def variable(self, value: str) -> str:
        """A new one, that a line gives a value."""
        name = self.free.pop(self.rng.randrange(len(self.free)))
        self.lines.append(f"{name}={value}")
        return name

    def fair(self) -> bool:
        """Heads or tails."""
        return self.rng.random() < 0.5

    def text(self) -> str:
        """All lines."""
        return "\n".join([*self.lines, f"print({self.stack[-1][0]})"])


def pair(program: Program) -> Operand:
    """Sum or difference."""
    (e1, v1), (e2, v2) = program.operands(2)
    return (f"({e1}+{e2})", v1 + v2) if program.fair() else (f"({e1}-{e2})", v1 - v2)


def product(program: Program) -> Operand:
    """By a small number."""
    ((e1, v1),) = program.operands(1)
    b = program.small()
    return f"({e1}*{b})" if program.fair() else f"({b}*{e1})", v1 * b


def identity(program: Program) -> Operand:
    """The operand."""
    return program.operands(1)[0]


def variable(program: Program) -> Operand:
    """A value by name."""
    (e1, v1), (e2, v2) = program.operands(2)
    name = program.variable(e1)
    return (f"({name}+{e2})", v1 + v2) if program.fair() else (f"({name}-{e2})", v1 - v2)


def loop(program: Program) -> Operand:
    """Repeated sum or difference."""
    (e1, v1), (e2, v2) = program.operands(2)
    name, turns = program.variable(e1), program.small()
    sign, symbol = (1, "+") if program.fair() else (-1, "-")
    program.lines.append(f"for x in range({turns}):{name}{symbol}={e2}")
    return name, v1 + sign * turns * v2


def choice(program: Program) -> Operand:
    """One of two, by comparison."""
    (e1, v1), (e2, v2), (e3, v3), (e4, v4) = program.operands(4)
    if program.fair():
        return f"({e3} if {e1}>{e2} else {e4})", v3 if v1 > v2 else v4
    return f"({e3} if {e1}<{e2} else {e4})", v3 if v1 < v2 else v4


OPERATIONS: dict[str, Callable[[Program], Operand]] = {
    "pair": pair,
    "product": product,
    "identity": identity,
    "variable": variable,
    "loop": loop,
    "if": choice,
}
GROUPS = (*OPERATIONS, *(f"{first}, {second}" for first in OPERATIONS for second in OPERATIONS))


def task() -> Task:
    """The task of all splits."""
    return Task(
        name="program",
        tokens=Vocabulary(tuple(sorted(set("\n 0123456789()+-*=<>:" + VARIABLES + "print for x in range if else")))),
        answers=Vocabulary(tuple("-0123456789")),
        length=LENGTH,
        slots=2 + len(str((1 + 4 * LONGER) ** NESTING * 10**LONGER)),
        splits=dict.fromkeys(("train", "dev", "id", "ood")),
        draw=draw,
        groups=GROUPS,
    )


def draw(split: str, n: int, rng: np.random.Generator) -> Examples:
    """`n` programs."""
    random = Random(int(rng.integers(2**63)))  # ten times as fast as numpy for numbers one by one
    return hashed(split, n, lambda count: programs(split, count, random))


def programs(split: str, n: int, random: Random) -> Examples:
    """`n` programs of any part of the hash."""
    found = Examples([], [], [])
    names = list(OPERATIONS)
    for _ in range(n):
        nesting, digits = NESTING, LONGER if split == "ood" else DIGITS
        if split in ("train", "dev"):
            nesting, digits = random.randint(1, NESTING), random.randint(1, DIGITS)
        chosen = [random.randrange(len(names)) for _ in range(nesting)]
        program = Program(digits, random)
        for operation in chosen:
            program.stack.append(OPERATIONS[names[operation]](program))
        found.inputs.append(program.text())
        found.targets.append(str(program.stack[-1][1]))
        found.groups.append(chosen[0] if nesting == 1 else len(names) * (1 + chosen[0]) + chosen[1])
    return found
