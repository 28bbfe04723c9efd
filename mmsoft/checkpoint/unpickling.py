"""Limit the memory that unpickling a checkpoint may claim to what the file stores.

torch's ``weights_only`` keeps a checkpoint from running code, but not from claiming memory: a call
such as ``bytearray(2**40)`` takes a few bytes of a file, and so does an array of any shape.
:class:`ClaimCheck` follows a pickle before it is loaded. It neither prints nor multiplies what it
has not checked: tuples of tuples may be exponentially large when printed.
"""

import math
import pickletools
import re
from pickle import UnpicklingError
from typing import Any

import torch

from mmsoft.safe_globals import RESTRICTED

_ELEMENT_BYTES = dict(
    Untyped=1, Byte=1, Char=1, Bool=1, QInt8=1, QUInt8=1, QUInt4x2=1, QUInt2x4=1, Half=2,
    BFloat16=2, Short=2, Float=4, Int=4, QInt32=4, Double=8, Long=8, ComplexFloat=8,
    ComplexDouble=16,
)  # fmt: skip
_NUMPY_BYTES = dict(f8=8, f4=4, i8=8)  # of the kinds of numbers that MMEngine's statistics are
_CONSTANTS = dict(NONE=None, NEWTRUE=True, NEWFALSE=False, EMPTY_TUPLE=())
_PLAIN_DTYPE = (None, None, None, -1, -1, 0)  # the state of a dtype, after version and byte order
_LITERALS = {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"}


def _are_sizes(values: Any) -> bool:
    return type(values) in (tuple, list) and all(type(n) is int and n >= 0 for n in values)


def _refusal(reason: str) -> UnpicklingError:
    return UnpicklingError(f"refused: {reason}")


class _Global(str):
    """The last part of a global's name."""


class _Made:
    """What a call made, and the number of bytes if that is a storage."""

    def __init__(self, by: str, stored: int = 0, element: int = 1):
        self.by, self.stored, self.element = by, stored, element


def _is_number(made: Any) -> bool:
    return isinstance(made, _Made) and made.by == "dtype"


class ClaimCheck:
    """Follows the pickles of a file without building anything, and adds up what they claim.

    Everything that a file of torch's stores costs it at least as many bytes as it takes in memory,
    up to a constant for small objects. What a call claims beyond is bounded by the file's size:
    the storages together, the tensors that overlap themselves together, and the arguments that
    calls copy together.

    Only the opcodes that torch's own restricted unpickler knows are followed. It stops at others.

    Args:
        size: of the file, in bytes.
    """

    def __init__(self, size: int):
        self.size = size
        self.claimed = dict(storages=0, overlapping=0, arguments=0)
        self.storages: dict[Any, _Made] = {}  # by key, as torch keeps them

    def follow(self, file: Any) -> None:
        """Read one pickle of a file that is open for reading, up to its end.

        Raises:
            EOFError: its tensors take more bytes than the file has.
        UnpicklingError: it claims too much, or is not a pickle that torch would write.
        """
        try:
            self._follow(file)
        except UnpicklingError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise UnpicklingError(f"corrupt pickle, {str(error).splitlines()[0]}") from None

    def _follow(self, file: Any) -> None:
        stack: list[Any] = []
        marks: list[list] = []
        memo: dict[Any, Any] = {}
        for opcode, argument, _ in pickletools.genops(file):
            match opcode.name:
                case "PROTO":
                    continue
                case "STOP":
                    stack.pop()
                case "MARK":
                    marks.append(stack)
                    stack = []
                case name if name in _LITERALS:
                    stack.append(argument)
                case name if name in _CONSTANTS:
                    stack.append(_CONSTANTS[name])
                case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                    stack.append([])  # of a dict, the values
                case "GLOBAL":
                    stack.append(_Global(re.split(r"[ .]", str(argument))[-1]))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "TUPLE":
                    items, stack = stack, marks.pop()
                    stack.append(tuple(items))
                case "APPEND":
                    item = stack.pop()
                    self._add(stack[-1], [item])
                case "APPENDS":
                    items, stack = stack, marks.pop()
                    self._add(stack[-1], items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _check_keys([key])
                    self._add(stack[-1], [value])
                case "SETITEMS":
                    items, stack = stack, marks.pop()
                    _check_keys(items[::2])
                    self._add(stack[-1], items[1::2])
                case "REDUCE" | "NEWOBJ":
                    arguments, function = stack.pop(), stack.pop()
                    # Where it is an item of a dict, its key is what precedes it.
                    what = stack[-1] if stack and type(stack[-1]) is str else "a tensor"
                    stack.append(self._call(function, arguments, what))
                case "BUILD":
                    state = stack.pop()
                    self._build(stack[-1], state)
                case "BINPERSID":
                    stack.append(self._storage(*stack.pop()))
                case _ if RESTRICTED:  # where torch stops too
                    return
                case _:
                    raise _refusal(f"torch writes no {opcode.name}")

    def _claim(self, kind: str, amount: int, reason: str) -> None:
        self.claimed[kind] += amount
        if self.claimed[kind] > self.size:
            raise _refusal(reason)

    @staticmethod
    def _add(target: Any, items: list) -> None:
        if type(target) is list:
            target += items

    def _copy(self, values: Any) -> None:
        copied = sum(len(value) for value in values if type(value) in (str, list, tuple))
        self._claim("arguments", copied, "it unpacks to more than the file's size")

    def _call(self, function: Any, arguments: Any, what: str) -> Any:
        if type(function) is not _Global or type(arguments) is not tuple:
            raise _refusal("it calls what is not named in it")
        self._copy(arguments)
        if function.endswith(("Tensor", "Storage")) or function.startswith("_rebuild_device_"):
            raise _refusal(f"a call of {function}, which stores nothing")
        match function:
            case "_rebuild_from_type_v2":
                return self._call(arguments[0], arguments[2], what)
            case "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_qtensor":
                self._tensor(what, arguments)
            case "_rebuild_tensor_v3":
                self._tensor(what, arguments, getattr(torch, arguments[6]).itemsize)
            case "Size":
                return arguments[0]
            case "encode":  # how torch's protocol spells bytes
                if len(arguments) != 2 or arguments[1] != "latin1":
                    raise _refusal("a call of encode with another codec")
                return arguments[0]
            case "bytearray" if arguments and type(arguments[0]) is not str:
                raise _refusal("a call of bytearray that stores no bytes")
            case "_reconstruct" if arguments[:2] != ("ndarray", (0,)):
                raise _refusal("a NumPy array that stores nothing")
            case "ndarray":
                raise _refusal("a NumPy array that stores nothing")
            case "HistoryBuffer" if arguments:  # pickles only fill them
                raise _refusal("a call of HistoryBuffer")
            case "dtype":
                if type(arguments[0]) is not str or arguments[0] not in _NUMPY_BYTES:
                    raise _refusal("a NumPy dtype other than float64, float32 and int64")
                return _Made("dtype", element=_NUMPY_BYTES[arguments[0]])
            case "scalar":
                dtype: Any
                dtype, data = arguments if len(arguments) == 2 else (None, None)
                if not _is_number(dtype) or type(data) is not str or len(data) != dtype.element:
                    raise _refusal("a NumPy number that is not stored whole")
            case "set" | "Counter" if arguments:
                _check_keys(arguments[0])
            case "OrderedDict" if arguments:
                _check_keys([pair[0] for pair in arguments[0]])
        return _Made(function)

    def _build(self, target: Any, state: Any) -> None:
        self._copy([state])
        by = target.by if isinstance(target, _Made) else ""
        if by == "_reconstruct":
            _, shape, dtype, _, data = state
            if not _are_sizes(shape) or not _is_number(dtype) or type(data) is not str:
                raise _refusal("a NumPy array that is not of plain numbers")
            if len(shape) > 32 or math.prod(shape) * dtype.element != len(data):
                raise _refusal(
                    f"a NumPy array claims the shape {tuple(shape[:32])} but the checkpoint stores "
                    f"{len(data)} bytes of it"
                )
        if by == "dtype" and (state[1] not in ("<", ">") or state[2:] != _PLAIN_DTYPE):
            raise _refusal("a NumPy dtype that is not a plain number")
        if isinstance(target, _Made) and re.match(r"_rebuild_|Parameter$", target.by):
            raise _refusal(f"a state for what {target.by} made")

    def _storage(
        self, kind: str, dtype: Any, key: Any, _: Any, numel: int, view: Any = None
    ) -> Any:
        element = _ELEMENT_BYTES[dtype.removesuffix("Storage")]
        if kind != "storage" or type(dtype) is not _Global or not _are_sizes([numel]):
            raise _refusal("a storage without a size")
        _check_storage_key(key)
        if key not in self.storages:
            self.storages[key] = _Made("storage", numel * element, element)
            self.claimed["storages"] += numel * element
            if self.claimed["storages"] > self.size:
                raise EOFError("truncated, or its tensors claim more bytes than the file has")
        if view is None:
            return self.storages[key]
        view_key, offset, numel = view
        _check_storage_key(view_key)
        if view_key not in self.storages:
            if not _are_sizes([offset, numel]):
                raise _refusal("a storage without a size")
            stored = min(max(self.storages[key].stored - offset * element, 0), numel * element)
            self.storages[view_key] = _Made("storage", stored, element)
        return self.storages[view_key]

    def _tensor(self, what: str, arguments: tuple, element: int = 0) -> None:
        storage, offset, size, stride = arguments[:4]
        what = f"{what:.99} claims the shape"
        if not (_are_sizes(size) and _are_sizes(stride) and _are_sizes([offset])):
            raise _refusal(f"{what} by values other than sizes")
        if len(size) > 64:  # torch's own limit
            raise _refusal(f"{what} of {len(size)} dimensions")
        element = element or storage.element
        numel = math.prod(size)
        end = numel and 1 + offset + sum((n - 1) * step for n, step in zip(size, stride))
        stored = f"but the checkpoint stores only {storage.stored} bytes of it"
        reason = f"{what} {tuple(size)} {stored}"
        if end * element > storage.stored:
            raise _refusal(reason)
        if numel * element > storage.stored:
            self._claim("overlapping", numel * element, reason)


def _check_keys(keys: Any) -> None:
    """Refuse tuples in tuples: hashing them recurses without limit."""
    for key in keys:
        if type(key) is tuple and any(type(item) is tuple for item in key):
            raise _refusal("nested tuples as the key of a dict")


def _check_storage_key(key: Any) -> None:
    if type(key) is not str:
        raise _refusal("a storage whose key is not text")
