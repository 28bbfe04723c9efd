"""What the explorer's server does on its sockets, before a page is asked."""

import re
import socket
import sys
import threading
from http.client import HTTPConnection
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import torch
from mmengine.config import Config

from mmsoft.analysis import load_model

waitress = pytest.importorskip("waitress")
pytest.importorskip("flask")


def test_what_is_too_large_is_refused_before_it_is_sent(open_server):
    """Of 300 MB that are announced, not one is waited for; in parts, not many more than allowed."""
    from mmsoft.explore.looking import UPLOAD_BYTES

    port = int(open_server("127.0.0.1").effective_port)
    head = f"POST /api/upload HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    for length in (UPLOAD_BYTES + 1, 300_000_000):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    part, sent = bytes(1 << 20), 0
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        try:
            while sent < 300_000_000:
                connection.sendall(b"%x\r\n%b\r\n" % (len(part), part))
                sent += len(part)
        except OSError:  # the server has closed it
            pass
    assert sent < 4 * UPLOAD_BYTES
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/api/upload", bytes(UPLOAD_BYTES))  # just small enough
    answer = connection.getresponse()
    assert answer.status == 400
    assert b"not a picture" in answer.read()
    connection.close()


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True


def status(address, port, host):
    """Of the answer to who asks an address for a name."""
    connection = HTTPConnection(address, port, timeout=60)
    connection.request("GET", "/static/style.css", headers=dict(Host=host))
    found = connection.getresponse().status
    connection.close()
    return found


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.2",
        "localhost",
        pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6")),
    ],
)
def test_the_address_that_is_printed_answers(open_server, host):
    """But not a page from elsewhere, which asks for this machine under a name of its own."""
    from mmsoft.explore.server import addresses

    for address in addresses(open_server(host), host):
        parts = urlsplit(address)
        assert parts.hostname == host
        assert status(parts.hostname, parts.port, parts.netloc) == 200
        for name in ("evil.example", f"evil.example:{parts.port}", f"{host}.evil.example"):
            assert status(parts.hostname, parts.port, name) == 403, name


@pytest.mark.parametrize(
    ("host", "any_name"),
    [("127.0.0.1", False), ("[::1]", False), ("0.0.0.0", True), ("192.0.2.1", True)],
)
def test_other_machines_ask_by_names_that_we_cannot_know(monkeypatch, host, any_name):
    from mmsoft.explore import server

    made = []
    monkeypatch.setattr(server, "make_app", lambda explorer, hosts: made.append(hosts))
    monkeypatch.setattr(waitress, "create_server", lambda app, **options: options)
    assert server.make_server(None, host, 80)["host"] == host
    assert (made == [None]) == any_name


def test_the_documented_line_opens_the_explorer_to_this_machine_alone(
    root, workplace, listening, tmp_path
):
    """That of after `make demo`: in its folder, with nothing but what the demo made."""
    pytest.importorskip("mmseg")
    page = (root / "docs/explorer.md").read_text()
    line = re.search(r"after `make demo`:\n\n```\n(.*?)\n```", page, re.S)[1]
    for name, target in (("configs", root / "configs"), ("data", workplace / "data")):
        (tmp_path / name).symlink_to(target)
    config = Config.fromfile(root / re.search(r"configs/\S+", line)[0])
    torch.save(dict(state_dict=load_model(config).state_dict()), tmp_path / "model.pth")
    last = tmp_path / re.search(r"work_dirs/\S+/last_checkpoint", line)[0]
    python = tmp_path / ".venv/bin/python"
    for path, content in ((last, "model.pth"), (python, f'#!/bin/sh\nexec {sys.executable} "$@"')):
        path.parent.mkdir(parents=True)
        path.write_text(content)
    python.chmod(0o755)
    command = ["bash", "-c", f"exec {line} --port 0 --no-browser"]
    with listening(command, env=dict(PATH="/usr/bin:/bin"), cwd=tmp_path) as address:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        port = urlsplit(address).port
        assert status("127.0.0.1", port, f"127.0.0.1:{port}") == 200
        assert status("127.0.0.1", port, "evil.example") == 403
        with pytest.raises(ConnectionRefusedError):  # as at every address but one
            socket.create_connection(("127.0.0.2", port), timeout=60)


def test_a_name_of_several_addresses(monkeypatch):
    """As `localhost` is, where there is IPv6: waitress then has a server of another kind."""
    from mmsoft.explore.server import addresses

    listen = "127.0.0.1:0 127.0.0.1:0"
    server = waitress.create_server(lambda environ, start: [], listen=listen)
    try:
        ports = [port for _, port in server.effective_listen]
        assert addresses(server, "localhost") == [f"http://localhost:{port}/" for port in ports]
        server.effective_listen = [("127.0.0.1", "8765"), ("::1", "8765")]
        assert addresses(server, "localhost") == ["http://localhost:8765/"]
        assert addresses(server, "::1") == ["http://[::1]:8765/"]
    finally:
        server.close()


class Stopped:
    """A server that ends when the page has been opened, or at once."""

    effective_port = "80"

    def __init__(self, opened=None):
        self.opened = opened

    def run(self):
        assert self.opened is None or self.opened.wait(60)
        raise KeyboardInterrupt

    def close(self):
        print("closed")


@pytest.fixture
def displays(monkeypatch):
    """Set what tells of a display and a browser."""

    def displays(**found):
        for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in found.items():
            monkeypatch.setenv(name, value)

    displays()
    return displays


def test_the_command_says_where_it_is(explorer, monkeypatch, capsys, displays):
    from mmsoft.explore import server

    monkeypatch.setattr(server, "make_server", lambda *args: Stopped())
    server.serve(explorer, "::1", 80)
    assert re.findall(r"\S+", capsys.readouterr().out) == ["http://[::1]:80/", "closed"]


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("127.0.0.1", dict(DISPLAY=":0")),
        ("localhost", dict(WAYLAND_DISPLAY="wayland-0")),
        ("127.0.0.1", dict(BROWSER="mine")),
    ],
)
def test_the_page_is_opened(explorer, monkeypatch, displays, host, found):
    """Once, at the address that is printed; what goes wrong there stops nothing."""
    from mmsoft.explore import server

    asked, opened = [], threading.Event()

    def fail(address):
        asked.append(address)
        opened.set()
        raise OSError("no such program")

    displays(**found)
    monkeypatch.setattr(server.webbrowser, "open", fail)
    monkeypatch.setattr(server, "make_server", lambda *args: Stopped(opened))
    server.serve(explorer, host, 80)
    assert asked == [f"http://{host}:80/"]


@pytest.mark.parametrize(
    ("host", "found", "options"),
    [
        ("127.0.0.1", dict(DISPLAY=":0"), ["--no-browser"]),
        ("0.0.0.0", dict(DISPLAY=":0"), []),
        pytest.param(
            "127.0.0.1",
            {},
            [],
            marks=pytest.mark.skipif(sys.platform != "linux", reason="always has a display"),
        ),
    ],
    ids=["--no-browser", "other machines", "no display"],
)
def test_the_page_is_not_opened(
    explorer, monkeypatch, displays, config_path, images, host, found, options
):
    """When nobody wants it, or on a machine that is not the visitor's, or without a display."""
    from mmsoft.explore import __main__, server

    displays(**found)
    begun = []
    threads = SimpleNamespace(Thread=lambda **options: begun.append(options))
    monkeypatch.setattr(server, "threading", threads)
    monkeypatch.setattr(server, "make_server", lambda *args: Stopped())
    monkeypatch.setattr(__main__, "load_model", lambda *args: explorer.model)
    monkeypatch.setattr(__main__.signal, "signal", lambda *args: None)  # of this process
    command = ["explore", config_path, "--images", images, "--host", host, *options]
    monkeypatch.setattr("sys.argv", [str(word) for word in command])
    assert __main__.main() == 0
    assert not begun


def test_nothing_is_left_of_what_was_sent(listening, config_path, images, tmp_path):
    """When the command is ended as a service manager, or `kill`, ends it."""
    command = [sys.executable, "-m", "mmsoft.explore", config_path, "--images", images]
    command += ["--port", "0", "--no-browser"]
    with listening(command, env=dict(TMPDIR=str(tmp_path))) as address:
        connection = HTTPConnection("127.0.0.1", urlsplit(address).port, timeout=60)
        connection.request("POST", "/api/upload", next(images.glob("*.jpg")).read_bytes())
        assert connection.getresponse().status == 200
        connection.close()
        assert len(list(tmp_path.glob("mmsoft-explore-*/*.png"))) == 1
    assert not list(tmp_path.glob("mmsoft-explore-*"))
