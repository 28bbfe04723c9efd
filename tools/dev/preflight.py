"""What the steps of `make gpu` stand on, each tried by itself: one line says how it went.

    python tools/dev/preflight.py --device cuda

First the versions, and those other than the tests' own, of requirements/constraints.txt. Then an
operator of mmcv, a backbone and a Triton kernel on the device, the C compiler that Triton needs
there, this package as MMEngine finds it, and the imports of the libraries. The exit status is 0 if
all of it works. With TRITON_INTERPRET=1 a CPU tries the kernel too, in Triton's interpreter.
"""

import argparse
import contextlib
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from pathlib import Path

MODULES = (
    *("pytest", "xdist", "hypothesis", "matplotlib.pyplot", "mim.cli"),
    *("mmpretrain.models", "mmdet.apis", "mmseg.apis", "mmsoft.benchmark.kernels"),
)
DISTRIBUTIONS = (
    *("torch", "torchvision", "triton", "numpy", "opencv-python-headless", "mmcv"),
    *("mmengine", "mmdet", "mmsegmentation", "mmpretrain", "setuptools"),
)
CONSTRAINTS = Path(__file__).resolve().parents[2] / "requirements/constraints.txt"


def version(name: str) -> str:
    """Of an installed distribution."""
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"no {name}"


def others(constraints: Path) -> list[str]:
    """Installed distributions of other versions than a file of constraints has."""
    found = []
    pins = [line.split("==") for line in constraints.read_text().splitlines() if "==" in line]
    for name, tested in pins:
        with contextlib.suppress(metadata.PackageNotFoundError):
            # Builds of torch say for what they are after a plus.
            if (here := metadata.version(name)).partition("+")[0] != tested.partition("+")[0]:
                found.append(f"{name} {here} ({tested})")
    return found


def operator(device: str) -> None:
    """RoIAlign of mmcv."""
    import torch
    from mmcv.ops import RoIAlign

    boxes = torch.tensor([[0.0, 1, 1, 9, 9]], device=device)
    if not RoIAlign(7)(torch.ones(1, 2, 16, 16, device=device), boxes).sum().isfinite():
        raise ValueError("RoIAlign of ones is not finite")


def backbone(device: str) -> None:
    """Forward and backward."""
    import torch

    from mmsoft.models import SOFTPlusPlus

    model = SOFTPlusPlus("tiny").to(device)
    loss = sum(out.sum() for out in model(torch.randn(1, 3, 64, 64, device=device)))
    loss.backward()
    if not torch.isfinite(loss):
        raise ValueError("features are not finite")


def kernel(device: str) -> None:
    """A product of the Gaussian kernel by Triton, beside plain torch's."""
    import torch

    from mmsoft.ops import gaussian_kernel_product, use_backend

    x, y, w = (torch.randn(1, 1, n, 32, device=device) for n in (99, 49, 49))
    x, y = 0.3 * x, 0.3 * y  # farther apart, the kernel is zero
    results = []
    for backend in ("eager", "triton"):
        with use_backend(backend):
            results.append(gaussian_kernel_product(x, y, w))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def compiler() -> None:
    """That Triton finds, and ``Python.h``: what launches a kernel is compiled on the machine."""
    named = os.environ.get("CC")
    if not any(map(shutil.which, [named] if named else ["clang", "gcc"])):
        raise FileNotFoundError(f"no {named or 'C compiler'}: install gcc, or name one in CC")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise FileNotFoundError(f"{header}: install the headers of this Python, as of python3-dev")


def package() -> None:
    """Installed, with the folder in which MMEngine finds configs."""
    from mmengine.hub import get_config

    metadata.version("mmsoft")
    get_config("mmsoft::retinanet/retinanet_softpp-t_fpn_1x_coco.py")


def main() -> None:
    """Run the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = p.parse_args().device
    checks: dict[str, Callable[[], object]] = {
        "mmcv's RoIAlign": partial(operator, device),
        "a backbone": partial(backbone, device),
        "a C compiler": compiler,
        "a Triton kernel": partial(kernel, device),  # what it breaks is broken from here on
        "mmsoft, installed": package,
        **{f"import {name}": partial(import_module, name) for name in MODULES},
    }
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        del checks["a Triton kernel"]
    print(f"python {sys.version.split()[0]}", *map(version, DISTRIBUTIONS), sep=", ", flush=True)
    if different := others(CONSTRAINTS):
        print("other than tested (in parentheses):", ", ".join(different), flush=True)
    failed = 0
    for name, check in checks.items():
        start = time.monotonic()
        try:
            check()
        except Exception as error:
            failed += 1
            text = " ".join(str(error).split())[:300]
            print(f"{name}: {type(error).__name__}: {text}", flush=True)
        else:
            print(f"{name}: works ({time.monotonic() - start:.1f} s)", flush=True)
    if failed:
        print(f"{failed} of {len(checks)} do not work")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
