"""A Python that has imported the libraries: what it runs is a fork of one process, not a new one.

    python warm_python.py PROGRAM MODULE [MODULE ...]

writes PROGRAM and says "ready"; ``PROGRAM ARGUMENTS`` is then as ``python ARGUMENTS``, without the
seconds that the imports of the modules take, and so are the Pythons that it starts. It ends when
its standard input does.
"""

import atexit
import contextlib
import fcntl
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import struct
import sys
import traceback
from pathlib import Path

# Hands over what a process inherits, and ends as the fork does.
CLIENT = """#!{python} -IS
import json, os, socket, struct, sys
there = map(int, os.listdir("/proc/self/fd"))
files = [fd for fd in there if os.path.exists(f"/proc/self/fd/{{fd}}") and os.get_inheritable(fd)]
told = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ), files]).encode()
server = socket.socket(socket.AF_UNIX)
server.connect("{address}")
socket.send_fds(server, [struct.pack("I", len(told))], files)
server.sendall(told)
status = server.recv(1)
os._exit(status[0] if status else 255)
"""
FREE = 200  # a number of files beyond those of a process


def run(arguments: list[str]) -> None:
    """As ``python ARGUMENTS``."""
    while arguments[0].startswith("-") and arguments[0] not in ("-m", "-c"):
        arguments = arguments[2 if arguments[0] in ("-X", "-W") else 1 :]
    if arguments[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], dict(__name__="__main__"))
    else:
        sys.path.insert(0, str(Path(arguments[0]).parent))
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def become(connection: socket.socket) -> None:
    """Run what a client tells, with its files, folder and environment."""
    told, files, _, _ = socket.recv_fds(connection, 4, 64)
    (left,) = struct.unpack("I", told)
    arguments, folder, environment, numbers = json.loads(connection.recv(left, socket.MSG_WAITALL))
    out = fcntl.fcntl(connection.detach(), fcntl.F_DUPFD_CLOEXEC, FREE)
    files = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FREE) for fd in files]
    os.closerange(3, FREE)
    for fd, number in zip(files, numbers):
        os.dup2(fd, number)
    fcntl.fcntl(out, fcntl.F_SETOWN, os.getpid())  # end with the client, by SIGIO
    fcntl.fcntl(out, fcntl.F_SETFL, os.O_ASYNC)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    status: object = 0
    try:
        run(arguments)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):  # it is closed
            stream.flush()
    os.write(out, bytes([status & 255]))


def main() -> None:
    """Run the command line."""
    program, *modules = sys.argv[1:]
    address = f"{program}.socket"
    Path(program).write_text(CLIENT.format(python=sys.executable, address=address))
    os.chmod(program, 0o755)
    sys.executable = program
    multiprocessing.set_executable(program)
    for module in modules:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            if os.fork() == 0:
                try:
                    become(connection)
                finally:
                    os._exit(0)
            connection.close()


if __name__ == "__main__":
    main()
