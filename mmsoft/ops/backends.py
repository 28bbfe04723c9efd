"""Which implementation of an operation runs: the first of an ordered list that does not refuse.

The choice is made inside a custom operator, when there are tensors to look at: a compiled or
exported program does not fix it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

EAGER = "eager"  # plain torch, which takes everything
OPERATIONS: dict[str, "Operation"] = {}


def _nothing(*args: Any) -> None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Args:
        name: what :func:`use_backend` knows it by.
        run: called with the arguments of the operation. What it needs is imported when it runs.
        refusal: called with the same; tells why they cannot be computed like this, ``None`` if they
            can. It reads nothing back from a device.
        on_request: whether it runs only where it is asked for by name.
    """

    name: str
    run: Callable[..., Any]
    refusal: Callable[..., str | None] = _nothing
    on_request: bool = False


class Operation:
    """An operation, which runs as the first of its implementations that does not refuse.

    Args:
        name: of the custom operator, if there is one.
        implementations: the preferred one first; results agree in shape, dtype and strides.
    """

    def __init__(self, name: str, *implementations: Implementation):
        self.name = name
        self.implementations = list(implementations)
        self.asked: str | None = None
        self.strict = True  # nothing else than what is asked for may run
        OPERATIONS[name] = self

    def __call__(self, *args: Any) -> Any:
        """Run.

        Raises:
            RuntimeError: every implementation refuses, or the one that was asked for.
        """
        asked = [way for way in self.implementations if way.name == self.asked]
        usual = [way for way in self.implementations if not way.on_request and way not in asked]
        reasons = []
        for implementation in asked if self.asked and self.strict else asked + usual:
            reason = implementation.refusal(*args)
            if reason is None:
                return implementation.run(*args)
            reasons.append(f"{implementation.name}: {reason}")
        raise RuntimeError(f"{self.name} cannot run as {'; '.join(reasons)}")

    def objection(self) -> str | None:
        """Why plain torch outside the operation may not take its place; ``None`` if it may."""
        if self.asked in (None, EAGER) or not self.strict:
            return None
        return f"{self.name} was asked to run as {self.asked}"

    def gives_way(self, transformed: bool) -> bool:
        """Whether plain torch takes the operation's place: under transforms or in forward mode.

        Raises:
            RuntimeError: then another implementation was asked for.
        """
        reason = self.objection() if transformed else None
        if reason is not None:
            raise RuntimeError(f"{reason}, but here torch.func or forward mode needs plain torch")
        return transformed


@contextmanager
def use_backend(name: str, *operations: str, strict: bool = True) -> Iterator[None]:
    """Run operations as ``name`` computes them: where it refuses them, they raise.

    Without it, each operation chooses by itself. The inner of two contexts counts. They hold for
    the whole process, because the backward pass on a GPU runs in a thread of its own; a backward
    pass runs as is asked when it runs.

    Args:
        name: of an implementation, such as ``'eager'``, plain torch.
        operations: the operations meant, such as ``'tikhonov_solve'``; by default all that have an
            implementation of this name.
        strict: if not, operations choose as without this context where ``name`` refuses them.

    Raises:
        RuntimeError: by an operation, with the reason for which ``name`` refuses its arguments, if
            ``strict``.
        ValueError: there is no such implementation or operation; the message lists what there is.
    """
    for operation in operations:
        if operation not in OPERATIONS:
            raise ValueError(f"operation must be one of {tuple(OPERATIONS)}, got {operation!r}")
    known = {
        operation: tuple(way.name for way in OPERATIONS[operation].implementations)
        for operation in operations or OPERATIONS
    }
    chosen = [OPERATIONS[operation] for operation, names in known.items() if name in names]
    if len(chosen) < max(1, len(operations)):
        raise ValueError(f"backend must be one of {known}, got {name!r}")
    before = [(operation.asked, operation.strict) for operation in chosen]
    try:
        for each in chosen:
            each.asked, each.strict = name, strict
        yield
    finally:
        for each, state in zip(chosen, before):
            each.asked, each.strict = state
