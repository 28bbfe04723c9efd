"""Build ``.venv`` from the pinned requirements, or bring it up to date.

``make setup``, ``make demo`` and ``make test`` call this program; it needs Python 3.11, gcc, g++,
make and git, and nothing from a package index. A finished ``.venv`` is reused until the requirement
files, the Python version or this program change. After an interruption the same command goes on
where it stopped. The one slow step, compiling mmcv, happens once: its wheel is kept in the cache
folder, ``$MMSOFT_CACHE`` or else ``$XDG_CACHE_HOME/mmsoft`` or ``~/.cache/mmsoft``.

Only the standard library is used, and no syntax newer than Python 3.6, so that an older Python
reaches the line that says it is too old.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STATE = VENV / "mmsoft-setup.json"  # its presence also marks .venv as ours to delete
LOG = VENV / "mmsoft-setup.log"

WANTED_PYTHON = (3, 11)
NEEDED_TOOLS = ("gcc", "g++", "make", "git")
NEEDED_GB = 3
RETRY_AFTER = (5, 20)  # seconds
HEARTBEAT = 30  # seconds
FORCED = ("--no-deps", "--force-reinstall")

AGAIN = "then give the same command again; what is done is kept"
NETWORK_TROUBLE = re.compile(
    "NewConnectionError|Connection(Reset|Refused|Aborted)?Error|Max retries exceeded|ProxyError"
    "|[Cc]onnection (broken|reset|refused|aborted)|ReadTimeout|Read timed out|ConnectTimeout"
    "|IncompleteRead|RemoteDisconnected|ProtocolError|50[234] Server Error"
    "|Temporary failure in name resolution|Name or service not known|Network is unreachable"
)
DISK_TROUBLE = re.compile("No space left on device|Disk quota exceeded")


class SetupError(Exception):
    """A failure that the user reads as one line."""


class BrokenEnvironmentError(SetupError):
    """Every step ran, yet the packages do not work."""


def main() -> int:
    """Run the set-up and return the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        check_python()
        with only_one_at_a_time():
            set_up()
        return 0
    except SetupError as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted; the same command goes on from here"
    except OSError as error:
        message = disk_message() if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
    print("setup: " + message, file=sys.stderr, flush=True)
    return 1


def set_up() -> None:
    """Find out what is missing, and do it."""
    key = environment_key()
    done = recorded_steps(key)
    reason = None
    if all(name in done for _, name, _ in steps()):
        if intact():
            return
        reason = "something in .venv was changed or removed; building it again"
        done = []
    elif done:
        reason = "bringing .venv up to date"
    elif STATE.exists():
        reason = "the requirements, Python or the set-up changed; building .venv again"
    check_machine()
    if reason:
        say(reason)
    start = time.time()
    try:
        build(key, done)
    except BrokenEnvironmentError as error:
        say(f"{error}; building everything once more")
        for wheel in wheel_folder().glob("*.whl"):
            wheel.unlink()
        build(key, [])
    say(f"set-up finished in {time.time() - start:.0f} s")


def steps() -> list:
    """List the steps: title, name under which its end is recorded, action."""
    package = package_key()
    return [
        ("create .venv", "venv", create_venv),
        ("install torch and the build tools", "torch", lambda: pip_install("build.txt")),
        ("install the packages", "packages", lambda: pip_install("packages.txt")),
        ("install mmcv", "mmcv", install_mmcv),
        # Without what they would bring or replace. Forced, because a resumed run may find the
        # headless OpenCV under the full one.
        ("install OpenCV and torchvision", "no-deps", lambda: pip_install("no-deps.txt", *FORCED)),
        ("install mmsoft, editable", package, install_mmsoft),
        ("check that everything imports", "checked " + package, check_imports),
    ]


def build(key: str, done: list) -> None:
    """Run the steps that are not done, recording each."""
    if done and not quiet_run(PYTHON, "-m", "pip", "--version"):
        done = []
    if done:
        remove_half_installed()
    else:
        clear_the_place()
        VENV.mkdir()
        record(key, done)
    for number, (title, name, action) in enumerate(steps(), 1):
        if name in done:
            continue
        start = time.time()
        say(f"[{number}/{len(steps())}] {title}")
        action()
        say(f"      {time.time() - start:.0f} s")
        done = [*done, name]
        record(key, done)


# ------------------------------------------------------------------- what is there already


def environment_key() -> str:
    """Hash all that decides what .venv holds, mmsoft itself left out."""
    files = [*sorted(REQUIREMENTS.glob("*.txt")), Path(__file__).resolve()]
    # The path too: a virtual environment does not survive being moved.
    return digest([platform.python_version(), sys.base_prefix, str(VENV)], files)


def package_key() -> str:
    """Hash what installing mmsoft copies into .venv; other edits take effect by themselves."""
    names = ["pyproject.toml", "setup.cfg", "setup.py", "mmsoft/version.py"]
    files = [ROOT / name for name in names] + [Path(__file__).with_name("torchvision_schemas.py")]
    return "mmsoft " + digest([], files)


def digest(texts: list, files: list) -> str:
    """Hash texts and files."""
    result = hashlib.sha256("\0".join(texts).encode())
    for path in files:
        result.update(path.name.encode() + b"\0" + path.read_bytes())
    return result.hexdigest()[:16]


def recorded_steps(key: str) -> list:
    """List the steps that are done, none if they were done for another key."""
    try:
        state = json.loads(STATE.read_text())
        done = state["done"] if state["key"] == key else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if (ROOT / "mmsoft" / ".mim").is_dir():
        return done
    return [name for name in done if "mmsoft" not in name]


def record(key: str, done: list) -> None:
    """Write down the steps that are done, all or nothing."""
    temporary = STATE.with_suffix(".tmp")
    temporary.write_text(json.dumps({"key": key, "done": done}))
    temporary.replace(STATE)


def intact() -> bool:
    """Tell whether every pinned package is in .venv in its version."""
    program = (
        "import sys\n"
        "from importlib.metadata import version\n"
        "version('mmsoft')\n"
        "for pin in sys.argv[1:]:\n"
        "    name, wanted = pin.split('==')\n"
        "    assert version(name).split('+')[0] == wanted\n"
    )
    lines = "\n".join(path.read_text() for path in REQUIREMENTS.glob("*.txt")).splitlines()
    return quiet_run(PYTHON, "-c", program, *(line for line in lines if "==" in line))


def remove_half_installed() -> None:
    """Let pip see as missing what it was installing when it was killed."""
    for folder in VENV.glob("lib/python*/site-packages/*.dist-info"):
        # pip writes this file after all the package's modules and scripts.
        if not (folder / "INSTALLER").exists():
            shutil.rmtree(str(folder))


def clear_the_place() -> None:
    """Remove our old .venv; move aside one that somebody else made."""
    if VENV.is_symlink() or (VENV.exists() and not STATE.exists() and os.listdir(str(VENV))):
        aside = ROOT / time.strftime(".venv.old-%Y%m%d-%H%M%S")
        VENV.rename(aside)
        say("found a .venv that this program did not make; moved it to " + aside.name)
    elif VENV.exists():
        # The state goes last, so that after an interruption the folder is still known as ours.
        for path in sorted(VENV.iterdir(), key=lambda path: path == STATE):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(str(path))
            else:
                path.unlink()
        VENV.rmdir()


# ---------------------------------------------------------------------- what the machine has


def check_python() -> None:
    """Refuse any Python but the one that the pins were tried on."""
    if sys.version_info[:2] != WANTED_PYTHON:
        wanted = ".".join(map(str, WANTED_PYTHON))
        raise SetupError(
            f"needs Python {wanted}, but {sys.executable} is {platform.python_version()}; "
            f"install it, or name it: make PYTHON=/path/to/python{wanted} ..."
        )


def check_machine() -> None:
    """Say in one line all that is missing for the steps to come."""
    missing = [tool for tool in NEEDED_TOOLS if not shutil.which(tool)]
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("python3.11-dev")
    if not (importlib.util.find_spec("ensurepip") and importlib.util.find_spec("venv")):
        missing.append("python3.11-venv")
    if missing:
        raise SetupError(
            f"missing: {', '.join(missing)}; install with your system's package manager "
            f"(on Debian or Ubuntu: apt install {' '.join(missing)}), {AGAIN}"
        )
    if not STATE.exists() and shutil.disk_usage(str(ROOT)).free < NEEDED_GB * 2**30:
        raise SetupError(disk_message())


def disk_message() -> str:
    """Say that the disk is full."""
    free = shutil.disk_usage(str(ROOT)).free / 2**30
    return (
        f"the disk is full: .venv needs about {NEEDED_GB} GB in {ROOT}, where {free:.1f} GB are "
        "free; free some (MMSOFT_CACHE and TMPDIR move the cache and temporary files), " + AGAIN
    )


@contextlib.contextmanager
def only_one_at_a_time() -> Iterator:
    """Wait while another set-up runs in this checkout."""
    handle = os.open(str(ROOT), os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is running here; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# --------------------------------------------------------------------------------- the steps


def create_venv() -> None:
    """Create an empty virtual environment."""
    status, output = logged_run([sys.executable, "-m", "venv", str(VENV)])
    if status:
        raise SetupError(diagnosis(output))


def pip_install(requirements: str, *options: str) -> None:
    """Install a requirement file under the constraints."""
    constraints = ["-c", str(REQUIREMENTS / "constraints.txt")]
    pip("install", *options, "-r", str(REQUIREMENTS / requirements), *constraints)


def install_mmcv() -> None:
    """Install mmcv from the wheel in the cache, compiling it first if there is none."""
    folder = wheel_folder()
    folder.mkdir(parents=True, exist_ok=True)
    system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    found = [wheel for wheel in folder.glob(f"mmcv-*-{system}.whl") if is_sound(wheel)]
    pip("install", *FORCED, str(found[0] if found else compile_mmcv(folder)))


def wheel_folder() -> Path:
    """Give the folder of the mmcv wheel built with this Python and this torch."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = Path(os.environ.get("MMSOFT_CACHE") or Path(home, "mmsoft")).expanduser().resolve()
    program = "from importlib.metadata import version; print(version('torch'))"
    torch = subprocess.check_output([str(PYTHON), "-c", program], env=clean_environment())
    tag = "cp{}{}".format(*sys.version_info[:2])
    mmcv = (REQUIREMENTS / "mmcv.txt").read_text().split()[-1].replace("==", "-")
    return cache / "wheels" / f"{tag}-torch{torch.decode().strip()}" / mmcv


def compile_mmcv(folder: Path) -> Path:
    """Compile mmcv with its CPU operators into `folder`, and return the wheel's path."""
    jobs = os.cpu_count() or 1
    say(f"      compiling it with {jobs} job(s): about {max(1, 18 // jobs)} minutes, once")
    # Without -g0 it takes three times as long. No visible GPU: with one, mmcv would want nvcc.
    settings = dict(CFLAGS="-g0", CXXFLAGS="-g0", MAX_JOBS=str(jobs), MMCV_WITH_OPS="1")
    settings.update(FORCE_CUDA="0", CUDA_VISIBLE_DEVICES="")
    temporary = tempfile.mkdtemp(prefix=".building-", dir=str(folder))
    try:
        options = ["--no-cache-dir", "--no-deps", "--no-build-isolation", "-w", temporary]
        pip("wheel", *options, "-r", str(REQUIREMENTS / "mmcv.txt"), **settings)
        (wheel,) = Path(temporary).glob("*.whl")
        if not is_sound(wheel):
            raise SetupError(f"mmcv was built without its operators; see {LOG}")
        os.replace(str(wheel), str(folder / wheel.name))
        return folder / wheel.name
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_sound(wheel: Path) -> bool:
    """Tell whether a wheel is whole and has mmcv's compiled operators."""
    try:
        with zipfile.ZipFile(str(wheel)) as archive:
            operators = any(name.startswith("mmcv/_ext") for name in archive.namelist())
            return operators and archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def install_mmsoft() -> None:
    """Install this checkout, so that edits take effect, and the torchvision workaround."""
    pip("install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    (site_packages,) = VENV.glob("lib/python*/site-packages")
    hook = "_mmsoft_torchvision_schemas"
    source = Path(__file__).with_name("torchvision_schemas.py")
    shutil.copyfile(str(source), str(site_packages / (hook + ".py")))
    (site_packages / (hook + ".pth")).write_text(f"import {hook}\n")


def check_imports() -> None:
    """Import what the packages are used for."""
    names = "cv2, mmcv.ops, mmdet.models, mmpretrain.models, mmseg.models, torchvision"
    status, output = logged_run([str(PYTHON), "-c", "import " + names])
    if status:
        raise BrokenEnvironmentError("a package does not work: " + output.strip().splitlines()[-1])


# ------------------------------------------------------------------------------ running things


def pip(*arguments: str, **settings: str) -> None:
    """Run pip in .venv, trying again when the network fails."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    for wait in (*RETRY_AFTER, None):
        status, output = logged_run(command, **settings)
        if status == 0:
            return
        if wait is None or not NETWORK_TROUBLE.search(output) or DISK_TROUBLE.search(output):
            raise SetupError(diagnosis(output))
        say(f"      the network failed; trying again in {wait} s")
        time.sleep(wait)


def diagnosis(output: str) -> str:
    """Say in one line what a failed command's output means and what to do."""
    if DISK_TROUBLE.search(output):
        return disk_message()
    if NETWORK_TROUBLE.search(output):
        return "the network failed; check the connection, " + AGAIN
    if "Python.h: No such file" in output:
        return "the Python headers are missing; install python3.11-dev, " + AGAIN
    if re.search("Killed signal|signal 9", output):
        return "the compiler ran out of memory; free some, " + AGAIN
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match("ERROR:|error:|fatal error:", line)]
    cause = (errors or lines or ["no output"])[-1]
    return f"{cause} (all of it in {LOG})"


def logged_run(command: list, **settings: str) -> tuple:
    """Run a command into the log, with a sign of life; returns its status and output."""
    with LOG.open("a+", errors="replace") as log:
        log.seek(0, os.SEEK_END)
        log.write("\n$ {}\n".format(" ".join(command)))
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=clean_environment(**settings),
            start_new_session=True,  # so that compilers can be stopped with it
        )
        start = time.time()
        try:
            while process.returncode is None:
                try:
                    process.wait(timeout=HEARTBEAT)
                except subprocess.TimeoutExpired:
                    say(f"      still at it after {time.time() - start:.0f} s")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        log.seek(begin)
        return process.returncode, log.read()


def quiet_run(*command: object) -> bool:
    """Tell whether a command succeeds."""
    try:
        return not subprocess.call(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=clean_environment(),
        )
    except OSError:
        return False


def clean_environment(**settings: str) -> dict:
    """Give the environment without what would lead Python or pip out of .venv."""
    leading_out = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
    environment = {name: value for name, value in os.environ.items() if name not in leading_out}
    environment.update(PYTHONNOUSERSITE="1", **settings)
    return environment


def say(text: str) -> None:
    """Print a line of progress at once."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
