"""Compile what the Triton kernels are launched with, without a GPU: one line of JSON for each.

    python compiled_kernels.py ARCH:CASE [ARCH:CASE ...]

The launching functions run on meta tensors; what they would launch is compiled for the compute
capability ARCH, such as 90. Registers and spills are what the assembler reports to Triton.
"""

import json
import math
import re
import sys
import tempfile
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO

import torch

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TYPES |= {torch.int64: "*i64", torch.int8: "*i8"}


class Recorder:
    """In the place of a kernel: what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def record(case):
    """The launches of a case of :data:`CASES`."""
    from triton.runtime.jit import JITFunction

    module, name, arguments = CASES[case]
    module, launches = import_module(f"mmsoft.ops.{module}.triton"), []
    kernels = {key: each for key, each in vars(module).items() if isinstance(each, JITFunction)}
    for key, kernel in kernels.items():
        if key.endswith("_kernel"):
            setattr(module, key, Recorder(kernel, launches))
    getattr(module, name)(*arguments())
    for key, kernel in kernels.items():
        setattr(module, key, kernel)
    return launches


LOGS = {}  # of the assembler, by what it assembled


def compiled(kernel, args, options, arch):
    """Registers, spilled bytes, shared memory and more of one launch, as Triton specializes it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = dict(zip(kernel.arg_names, args))
    options = dict(options)
    given |= {name: options.pop(name) for name in list(options) if name in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name], aligned = "fp32", False
        else:
            signature[parameter.name], aligned = "i32", value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    with redirect_stdout(StringIO()) as printed:
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    log = LOGS.setdefault(built.hash, printed.getvalue())  # empty where it was compiled before
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    ptx, warps = built.asm["ptx"], built.metadata.num_warps
    return dict(
        triton=triton.__version__,
        kernel=kernel.__name__,
        registers=registers,
        spilled=int(re.search(r"(\d+) bytes spill stores", log)[1]),
        shared=built.metadata.shared,
        resident=warps * programs(arch, registers, warps, built.metadata),
        products="mma" in ptx,
        rounded="cvt.rna.tf32" in ptx,  # as tf32x3 alone does
        barriers=ptx.count("bar.sync"),
        # Whether all warps have read global memory before the last store to it.
        waited="bar.sync" in ptx.split("st.global")[-2].rsplit("ld.global", 1)[-1],
    )


def programs(arch, registers, warps, metadata):
    """How many fit in a multiprocessor, by the CUDA programming guide's table."""
    shared = 164 if arch == 80 else 228  # KiB, of which each program takes one itself
    return min(
        64 // warps,
        65536 // (warps * math.ceil(registers * 32 / 256) * 256),
        shared * 1024 // (metadata.shared + 1024),
        512 // max(1, metadata.tmem_size or 0),  # columns of tensor memory, from 10.0 on
    )


def _inside(n, d, dtype=torch.float32):
    """Tokens as the attention layers lay them: heads inside."""
    return torch.empty(2, n, 10, d, dtype=dtype, device="meta").transpose(1, 2)


def _odd(n, d, dtype=torch.float32):
    """The same after a class token, in three heads: neither address nor stride is aligned."""
    tokens = torch.empty(2, n + 1, 3, d, dtype=dtype, device="meta")[:, 1:]
    return tokens.transpose(1, 2)


def _first(n, d, dtype=torch.float32):
    """As an image has them: channels first."""
    return torch.empty(2, 10, d, n, dtype=dtype, device="meta").mT


ALL = (True, True, True)


def _products(n, m, dtype=torch.float32, d=32, needs=None, tokens=_inside, units=True):
    """Arguments of both products, of the backward pass if gradients are in need.

    Of queries or values of a ``dtype``, which are the more; landmarks and their values are float32.
    """

    def arguments():
        x, y, w = (
            tokens(count, d, dtype if count == max(n, m) else torch.float32) for count in (n, m, m)
        )
        unit = torch.empty(2, 1, 1, 1, device="meta") if units else None
        if needs is None:
            return x, y, w, unit, m > n
        return tokens(n, d), x, y, w, unit, m > n, needs

    return arguments


# module, function, arguments: spread is K w, gather K^T v.
CASES = {}


def _add(label, n, m, *args, **kwargs):
    """Both products, forward and backward, of ``n`` tokens and ``m`` landmarks."""
    for name, *sizes in (("spread", n, m), ("gather", m, n)):
        CASES[f"{name}-{label}"] = "gaussian", "product", _products(*sizes, *args, **kwargs)
        backward = _products(*sizes, *args, needs=ALL, **kwargs)
        CASES[f"{name}-backward-{label}"] = "gaussian", "product_backward", backward


for _dtype in (torch.float32, torch.bfloat16, torch.float16):
    _label = "" if _dtype == torch.float32 else f"-{_dtype}".replace("torch.", "")
    for _m in (16, 49, 64, 128):
        _add(f"{_m}{_label}", 4000, _m, _dtype)
    _add(f"odd{_label}", 4001, 49, _dtype, 30, tokens=_odd)
_add("wide", 4000, 49, d=64)
_add("wide-odd", 4001, 49, d=34, tokens=_odd)
_add("first", 4001, 49, tokens=_first)
_add("unitless", 4000, 49, units=False)
for _label, _needs in (("points", (True, True, False)), ("values", (False, False, True))):
    for _name, *_sizes in (("spread", 4000, 49), ("gather", 49, 4000)):
        _backward = _products(*_sizes, needs=_needs)
        CASES[f"{_name}-backward-{_label}"] = "gaussian", "product_backward", _backward


def _inverses(name, m, d=32):
    """Arguments of the inverses of ``m`` landmarks."""

    def arguments():
        a = torch.empty(2, 10, m, m, device="meta")
        scalar = torch.empty(2, 1, 1, 1, device="meta")
        right = torch.empty(2, 10, m, d, device="meta")
        return dict(
            guarded=(a, None, None, 20),
            newton=(a, scalar, scalar, 20),
            newton_backward=(a, a),
            solve=(a, scalar, right),
            solve_backward=(a, right, right),
        )[name]

    return arguments


for _name in ("guarded", "newton", "newton_backward", "solve", "solve_backward"):
    for _m in (25, 49, 64, 121, 128):
        _function = "newton" if _name == "guarded" else _name
        CASES[f"{_name}-{_m}"] = "inverse", _function, _inverses(_name, _m)
for _name in ("solve", "solve_backward"):
    for _m, _d in ((49, 34), (121, 34), (128, 64)):
        CASES[f"{_name}-{_m}-wide"] = "inverse", _name, _inverses(_name, _m, _d)


def _choice(budget, dtype=torch.float32, d=32, masked=False, total=1050, tokens=_inside):
    """Arguments of the choice: an image of 800x1344."""

    def arguments():
        mask = torch.empty(2, total, dtype=torch.bool, device="meta") if masked else None
        return tokens(total, d, dtype), budget, 0.1, mask

    return arguments


for _label, *_args in (
    ("49", 49),
    ("49-bfloat16", 49, torch.bfloat16),
    ("49-float16", 49, torch.float16),
    ("49-masked", 49, torch.float32, 32, True),
    ("128-wide", 128, torch.bfloat16, 64),
    ("128-wide-masked", 128, torch.float32, 64, True),
    ("odd", 49, torch.float32, 30, True, 1051, _odd),
    ("first", 49, torch.float32, 32, False, 1051, _first),
):
    CASES[f"choice-{_label}"] = "landmarks", "choose", _choice(*_args)


def main():
    from triton import knobs

    from mmsoft.ops import launch

    knobs.nvidia.dump_ptxas_log = True
    launch._processors = lambda device: 132  # of an H100
    with tempfile.TemporaryDirectory() as knobs.cache.dir:
        for each in sys.argv[1:]:
            arch, case = each.split(":")
            launch.capability = lambda device, arch=int(arch): divmod(arch, 10)
            for kernel, args, options in record(case):
                found = compiled(kernel, args, options, int(arch))
                print(json.dumps(dict(case=each, **found)), flush=True)


if __name__ == "__main__":
    main()
