"""Compile what the Triton kernels are launched with, without a GPU: one line of JSON for each.

    python compiled_kernels.py ARCH CASE [CASE ...]

The launching functions run on meta tensors; what they would launch is compiled for the compute
capability ARCH, such as 90, and assembled by Triton's own ``ptxas``.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

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


def compiled(kernel, args, options, arch):
    """Registers, spilled bytes, shared memory and more of one launch, as Triton specializes it."""
    import triton
    from triton import knobs
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
            signature[parameter.name], aligned = TYPES[value.dtype], True
        elif isinstance(value, float):
            signature[parameter.name], aligned = "fp32", False
        else:
            signature[parameter.name], aligned = "i32", value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(built.asm["ptx"])
        target = re.search(r"\.target (sm_\w+)", built.asm["ptx"])[1]
        command = [knobs.nvidia.ptxas_blackwell.path, "-v", f"--gpu-name={target}", str(ptx)]
        output = subprocess.run(
            [*command, "-o", str(ptx.with_suffix(".cubin"))], capture_output=True, text=True
        ).stderr
    return dict(
        triton=triton.__version__,
        kernel=kernel.__name__,
        arch=arch,
        registers=int(re.search(r"Used (\d+) registers", output)[1]),
        spilled=int(re.search(r"(\d+) bytes spill stores", output)[1]),
        shared=built.metadata.shared,
        warps=built.metadata.num_warps,
        products="mma" in built.asm["ptx"],
        rounded="cvt.rna.tf32" in built.asm["ptx"],  # as tf32x3 alone does
    )


def _products(n, m, dtype=torch.float32, d=32, backward=False, needs=(True, True, True)):
    """Arguments of both products: as the attention layers lay them, heads inside.

    Of queries or values of a ``dtype``, which are the more; landmarks and their values are float32.
    """

    def tokens(count):
        kind = dtype if count == max(n, m) else torch.float32
        return torch.empty(2, count, 10, d, dtype=kind, device="meta").transpose(1, 2)

    def arguments():
        x, y, w = tokens(n), tokens(m), tokens(m)
        unit = torch.empty(2, 1, 1, 1, device="meta")
        if not backward:
            return x, y, w, unit, m > n
        return tokens(n).float(), x, y, w, unit, m > n, needs

    return arguments


# module, function, arguments: spread is K w, gather K^T v.
CASES = {}
for _dtype in (torch.float32, torch.bfloat16, torch.float16):
    _label = "" if _dtype == torch.float32 else f"-{_dtype}".replace("torch.", "")
    for _m in (16, 49, 64, 128):
        for _name, *_sizes in (("spread", 4000, _m), ("gather", _m, 4000)):
            _forward, _backward = (_products(*_sizes, _dtype, backward=b) for b in (False, True))
            CASES[f"{_name}-{_m}{_label}"] = "gaussian", "product", _forward
            CASES[f"{_name}-backward-{_m}{_label}"] = "gaussian", "product_backward", _backward
CASES["spread-wide"] = "gaussian", "product", _products(4000, 49, d=64)
for _name, *_sizes in (("spread", 4000, 49), ("gather", 49, 4000)):
    _backward = _products(*_sizes, d=64, backward=True)
    CASES[f"{_name}-backward-wide"] = "gaussian", "product_backward", _backward


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
    for _m in (25, 49, 64, 128):
        _function = "newton" if _name == "guarded" else _name
        CASES[f"{_name}-{_m}"] = "inverse", _function, _inverses(_name, _m)
for _name in ("solve", "solve_backward"):
    CASES[f"{_name}-128-wide"] = "inverse", _name, _inverses(_name, 128, 64)


def _choice(budget, dtype=torch.float32, d=32, masked=False):
    """Arguments of the choice: an image of 800x1344."""

    def arguments():
        candidates = torch.empty(2, 5, 1050, d, dtype=dtype, device="meta")
        mask = torch.empty(2, 1050, dtype=torch.bool, device="meta") if masked else None
        return candidates, budget, 0.1, mask

    return arguments


CASES["choice-49"] = "landmarks", "choose", _choice(49)
CASES["choice-49-masked"] = "landmarks", "choose", _choice(49, masked=True)
CASES["choice-128-wide"] = "landmarks", "choose", _choice(128, torch.bfloat16, 64)


def main():
    from mmsoft.ops import launch

    arch, *cases = sys.argv[1:]
    launch._processors = lambda device: 132  # of an H100
    launch.capability = lambda device: divmod(int(arch), 10)
    for case in cases or CASES:
        for kernel, args, options in record(case):
            print(json.dumps(dict(case=case, **compiled(kernel, args, options, int(arch)))))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
