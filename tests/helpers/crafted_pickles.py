"""Pickles that call functions, and, opcode by opcode, some that no program would write."""

import io
import pickle
import zipfile

import torch

GIB = 1 << 30


class Call:
    """Pickled, an instruction to call `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def text(value):
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value):
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(values):
    return group(*map(number, values))


def group(*values):
    return b"(" + b"".join(values) + b"t"


def shared(value, times, memo, opcodes=b"]e"):
    """A list, or another container, with the same value `times` times."""
    index = bytes([memo])
    return opcodes[:-1] + b"(" + value + b"q" + index + (b"h" + index) * (times - 1) + opcodes[-1:]


def name(path):
    module, attribute = path.rsplit(".", 1)
    return f"c{module}\n{attribute}\n".encode()


def call(path, *arguments):
    return name(path) + group(*arguments) + b"R"


def new(path, *arguments):
    return name(path) + group(*arguments) + b"\x81"


def build(value, state):
    return value + state + b"b"


def data(value):
    return call("_codecs.encode", text(value), text("latin1"))


# ---------------------------------------------------------------------------------------- tensors


def storage(kind="Byte", size=8, key=None, view=b""):
    kind = name(f"torch.{kind}Storage")
    return group(text("storage"), kind, key or text("0"), text("cpu"), number(size), view) + b"Q"


def tensor(stored, size, stride, by="_rebuild_tensor_v2", before=(), after=()):
    hooks = name("collections.OrderedDict") + b")R"
    return call(
        f"torch._utils.{by}", stored, number(0), numbers(size), numbers(stride),
        *before, b"\x89", hooks, *after,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ NumPy


def dtype(code, state=None):
    plain = group(number(3), text("<"), b"NNN", number(-1), number(-1), number(0))
    return build(call("numpy.dtype", text(code), b"\x89", b"\x88"), state or plain)


def array(shape, stored, kind=None, core="core"):
    ndarray = name("numpy.ndarray")
    made = call(f"numpy.{core}.multiarray._reconstruct", ndarray, numbers([0]), data("b"))
    return build(made, group(number(1), numbers(shape), kind or dtype("f8"), b"\x89", stored))


# ------------------------------------------------------------------------------------------ files


def save(path, value, legacy=False, storages=None):
    """A checkpoint whose state dict has one entry, and the bytes of its storages by key."""
    storages = storages or {}
    pickled = b"\x80\x02}" + text("state_dict") + b"}" + text("weight") + value + b"ss."
    if legacy:
        content = io.BytesIO()
        for header in (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}):
            pickle.dump(header, content, 2)
        content.write(pickled)
        pickle.dump(sorted(storages), content, 2)
        for _, stored in sorted(storages.items()):
            content.write(len(stored).to_bytes(8, "little") + stored)
        path.write_bytes(content.getvalue())
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("crafted/data.pkl", pickled)
        archive.writestr("crafted/byteorder", "little")
        for key, stored in storages.items():
            archive.writestr(f"crafted/data/{key}", stored)
        archive.writestr("crafted/version", "3\n")


# -------------------------------------------------------------- what takes more than it brings

FEW = data("\0" * 8)
MANY = numbers([GIB // 8])
NOTHING = "a NumPy array that stores nothing"
DEEP = b")" + b"\x85" * 9  # tuples in tuples: to hash 99,999 of these would end the process
_FLAGS = group(number(3), text("<"), b"NNN", number(-1), number(-1), number(63))
_FIELDS = group(
    number(3), text("<"), b"N", group(text("x")),
    b"}" + text("x") + group(dtype("f8"), number(0)) + b"s", number(8), number(8), number(63),
)  # fmt: skip
_SUBARRAY = group(
    number(3), text("<"), group(dtype("f8"), MANY), b"NN", number(-1), number(-1), number(0)
)

# What MMEngine's checkpoints need beyond torch's own list; (pickle, what the refusal says).
NUMPY_CLAIMS = {
    "_reconstruct": (
        call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), MANY, text("d")), NOTHING
    ),
    "_reconstruct of NumPy 2": (
        call("numpy._core.multiarray._reconstruct", name("numpy.ndarray"), MANY, text("d")), NOTHING
    ),
    "ndarray": (call("numpy.ndarray", MANY, text("d")), NOTHING),
    "new ndarray": (new("numpy.ndarray", MANY, text("d")), NOTHING),
    "shape": (
        array([GIB // 8], FEW),
        r"a NumPy array claims the shape \(134217728,\) but the checkpoint stores 8 bytes of it",
    ),
    "elements for bytes": (array([8], FEW), "a NumPy array claims the shape"),
    "overflowing shape": (array([1 << 32, 1 << 32], FEW), "a NumPy array claims the shape"),
    "dimensions": (array([1] * 40, FEW), "a NumPy array claims the shape"),
    "objects": (
        array([GIB // 8], b"]", dtype("O8")), "a NumPy dtype other than float64, float32 and int64"
    ),
    "list": (array([GIB // 8], b"]"), "a NumPy array that is not of plain numbers"),
    "void": (
        call("numpy.core.multiarray.scalar", call("numpy.dtype", text(f"V{GIB}"))),
        "a NumPy dtype other than",
    ),
    "scalar": (
        call("numpy.core.multiarray.scalar", dtype("f8"), data("1")), "a NumPy number that is not"
    ),
    # The real dtype takes these, and NumPy then takes floats for pointers.
    "flags": (array([1], FEW, dtype("f8", _FLAGS)), "a NumPy dtype that is not a plain number"),
    "fields": (array([1], FEW, dtype("f8", _FIELDS)), "a NumPy dtype that is not a plain number"),
    "subarray": (array([1], FEW, dtype("f8", _SUBARRAY)), "a NumPy dtype that is not a plain"),
    "history": (
        call(
            "mmengine.logging.history_buffer.HistoryBuffer",
            shared(shared(shared(b"K\1", 500, 1), 500, 2), 500, 3) + b"q\4",
            b"h\4",
        ),
        "a call of HistoryBuffer",
    ),
}  # fmt: skip


def _nested(value, times, wrap):
    for _ in range(times):
        value = wrap(value)
    return value


def _overlapping(size, after=(), by="_rebuild_tensor_v2", kind="Byte", before=()):
    return tensor(storage(kind), [size], [0], by, before, after)


_TO_FLOAT = (name("torch.float32"), text("cpu"), b"\x89")
_QUANTIZER = group(name("torch.per_tensor_affine"), b"G" + b"\0" * 8, number(0))
CLAIMS = {
    "bytearray": (call("__builtin__.bytearray", number(GIB)), "a call of bytearray that stores no"),
    "encode": (
        _nested(data("a" * 64), 24, lambda value: call("_codecs.encode", value, text("hex"))),
        "a call of encode with another codec",
    ),
    "text encoded again": (
        b"](" + text("a" * 100_000) + b"q\1"
        + call("_codecs.encode", b"h\1", text("latin1")) * 10_000 + b"e",
        "it unpacks to more than the file's size",
    ),
    "Tensor": (call("torch.Tensor", number(GIB // 4)), "a call of Tensor, which stores nothing"),
    "new Tensor": (new("torch.Tensor", number(GIB // 4)), "a call of Tensor, which"),
    "FloatTensor": (call("torch.FloatTensor", number(GIB // 4)), "a call of FloatTensor, which"),
    "UntypedStorage": (call("torch.storage.UntypedStorage", number(GIB)), "a call of UntypedStora"),
    "storage": (
        tensor(storage(size=GIB), [GIB], [1]), "its tensors claim more bytes than the file has"
    ),
    "shape": (
        tensor(storage(), [GIB], [1]),
        r"weight claims the shape \(1073741824,\) but the checkpoint stores only 8 bytes of it",
    ),
    "offset": (tensor(storage(), [2], [GIB]), "weight claims the shape"),
    "overlapping": (_overlapping(GIB), "weight claims the shape"),
    "overlapping together": (b"](" + _overlapping(400) * 99 + b"e", "claims the shape"),
    "elements of another type": (
        tensor(storage("Untyped"), [8], [1], "_rebuild_tensor_v3", after=[name("torch.float64")]),
        r"weight claims the shape \(8,\) but the checkpoint stores only 8 bytes",
    ),
    "another type of the same storage": (
        b"](" + storage("Double", 1) + tensor(storage("Byte", 8), [8], [1]) + b"e", "claims the sha"
    ),
    "quantized": (
        _overlapping(GIB, by="_rebuild_qtensor", kind="QInt8", before=[_QUANTIZER]), "weight claims"
    ),
    "converted": (
        call("torch._utils._rebuild_device_tensor_from_cpu_tensor", _overlapping(250), *_TO_FLOAT),
        "a call of _rebuild_device_tensor_from_cpu_tensor, which stores nothing",
    ),
    "called by another": (
        call("torch._tensor._rebuild_from_type_v2", *[name("__builtin__.bytearray")] * 2,
             group(number(GIB)), b"}"),
        "a call of bytearray that stores no",
    ),
    "sizes that are tuples": (
        call("torch._utils._rebuild_tensor_v2", storage(), number(0), group(number(GIB), b")"),
             numbers([0, 0]), b"\x89", b"N"),
        "weight claims the shape by values other than sizes",
    ),
    "strides that are text": (
        call("torch._utils._rebuild_tensor_v2", storage(), number(0), numbers([GIB]),
             group(text("a")), b"\x89", b"N"),
        "weight claims the shape by values other than sizes",
    ),
    "100 dimensions": (tensor(storage(), [1] * 100, [1] * 100), "the shape of 100 dimensions"),
    "state of a tensor": (
        build(tensor(storage(), [8], [1]), group(storage(), number(0), MANY, numbers([1]))),
        "a state for what _rebuild_tensor_v2 made",
    ),
    "state of a parameter": (
        build(new("torch.nn.parameter.Parameter"), group(storage(), number(0), MANY, numbers([1]))),
        "a state for what Parameter made",
    ),
    "deep key": (b"}" + DEEP + b"Ns", "nested tuples as the key of a dict"),
    "deep keys": (b"}(" + DEEP + b"Nu", "nested tuples as the key of a dict"),
    "wide key": (
        b"}" + _nested(b")", 9, lambda value: value + b"q\1h\1\x86") + b"Ns", "nested tuples as"
    ),
    "deep set": (call("__builtin__.set", b"](" + DEEP + b"e"), "nested tuples as the key"),
    "deep Counter": (call("UserDict.Counter", b"](" + DEEP + b"e"), "nested tuples as the key"),
    "deep storage key": (tensor(storage(key=DEEP), [8], [1]), "a storage whose key is not text"),
    "dtype of a list": (call("numpy.dtype", b"]"), "a NumPy dtype other than float64"),
    "deep OrderedDict": (
        call("UserDict.OrderedDict", b"](" + group(DEEP, b"N") + b"e"), "nested tuples as the key"
    ),
}  # fmt: skip
# Of torch's older format alone, whose storages may be a part of others.
LEGACY_CLAIMS = {
    "view": (
        tensor(storage(view=group(text("1"), number(4), number(4))), [8], [1]),
        r"weight claims the shape \(8,\) but the checkpoint stores only 4 bytes of it",
    ),
    "view of another": (
        b"](" + storage(size=4, key=text("1"))
        + tensor(storage(view=group(text("1"), number(0), number(8))), [8], [1]) + b"e",
        "claims the shape",
    ),
    "deep view key": (
        tensor(storage(view=group(DEEP, number(4), number(4))), [8], [1]),
        "a storage whose key is not text",
    ),
    "view beyond": (
        tensor(storage(view=group(text("1"), number(4), number(GIB))), [GIB], [1]), "claims the sha"
    ),
}  # fmt: skip
