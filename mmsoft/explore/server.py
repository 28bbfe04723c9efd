"""The page's server: a Flask application over an :class:`Explorer`, on waitress."""

import base64
import csv
import io
import logging
import os
import re
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import cv2
import numpy as np
import torch
from flask import Flask, Response, abort, jsonify, request

from mmsoft.visualization import (
    draw_attention,
    draw_landmarks,
    draw_predictions,
    draw_spectrum,
)

from .looking import UPLOAD_BYTES, Explorer, NotFoundError, Settings, View, picture_bytes

HERE = ("127.0.0.1", "localhost", "[::1]")
TYPES = dict(png="image/png", svg="image/svg+xml")
THUMBNAIL = 160  # pixels


def make_app(explorer: Explorer, hosts: tuple[str, ...] | None = HERE) -> Flask:
    """The application.

    Args:
        explorer: what it shows.
        hosts: names under which it may be asked for, so that no page from elsewhere reaches it
            under a name of its own; ``None`` for any.
    """
    app = Flask(__name__, static_folder="static", static_url_path="/static")
    app.config["MAX_CONTENT_LENGTH"] = UPLOAD_BYTES
    app.json.sort_keys = False

    @app.before_request
    def check_host() -> None:
        if hosts is not None and re.sub(r":\d+$", "", request.host) not in hosts:
            abort(403, "this address is not one that the explorer was started for")
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != request.host:
            abort(403, "another page may not ask")

    @app.after_request
    def harden(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = (
            "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
            "frame-ancestors 'none'"
        )
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"
        return response

    @app.errorhandler(ValueError)
    def refuse(error: ValueError) -> tuple[Response, int]:
        status = 404 if isinstance(error, NotFoundError) else 400
        return jsonify(error=str(error)), status

    @app.errorhandler(OSError)
    def unreadable(error: OSError) -> tuple[Response, int]:
        why = error.strerror or type(error).__name__  # without the path
        return jsonify(error=f"the image cannot be read: {why}"), 404

    @app.errorhandler(413)
    def too_large(error: Any) -> tuple[Response, int]:
        return jsonify(error=f"a picture may have {UPLOAD_BYTES // 1_000_000} MB"), 413

    def view() -> View:
        asked = request.args
        try:
            budget = asked.get("budget", "own")
            settings = Settings(
                explorer.own.budget
                if budget == "own"
                else None
                if budget == "all"
                else int(budget),
                explorer.own.solver
                if explorer.by_content
                else asked.get("solver", explorer.own.solver),
            )
            return View(
                asked.get("image", ""),
                settings,
                int(asked.get("stage", 0)),
                int(asked.get("block", -1)),
                int(asked.get("head", -1)),
                float(asked.get("x", 0)),
                float(asked.get("y", 0)),
            )
        except ValueError as error:
            raise ValueError(f"the address has no number where one should be: {error}") from None

    @app.get("/")
    def page() -> Response:
        return app.send_static_file("index.html")

    @app.get("/api/about")
    def about() -> Response:
        from matplotlib import colormaps

        colours = (colormaps["viridis"](np.linspace(0, 1, 256))[:, :3] * 255).round()
        return jsonify(**explorer.about(), viridis=colours.astype(int).tolist())

    @app.get("/api/image")
    def image() -> Response:
        captured = explorer.captured(view().image, explorer.own)
        return Response(picture_bytes(captured.image.picture), mimetype="image/png")

    @app.get("/api/thumbnail")
    def thumbnail() -> Response:
        name = view().image
        picture = cv2.imread(str(explorer.path(name)))  # turned as in the pipelines
        if picture is None:
            raise ValueError(f"{name} is not an image that can be read")
        picture = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        return Response(picture_bytes(picture, THUMBNAIL), mimetype="image/png")

    @app.post("/api/upload")
    def upload() -> Response:
        return jsonify(image=explorer.upload(request.get_data()))

    def answers(question: Callable[[View], dict[str, Any]]) -> Callable[[], Response]:
        return lambda: jsonify({key: _plain(value) for key, value in question(view()).items()})

    for name in ("attention", "usage", "landmarks", "spectrum", "predictions"):
        app.add_url_rule(f"/api/{name}", name, answers(getattr(explorer, name)))

    @app.get("/numbers.csv")
    def numbers() -> Response:
        found = explorer.usage(view())
        stream = io.StringIO()
        rows = csv.writer(stream)
        rows.writerow(["head", *found])
        rows.writerows((head, *row) for head, row in enumerate(zip(*found.values(), strict=True)))
        return Response(stream.getvalue(), mimetype="text/csv")

    @app.get("/figure/<name>.<kind>")
    def figure(name: str, kind: str) -> Response:
        if name not in FIGURES or kind not in TYPES:
            abort(404)
        drawn = FIGURES[name](explorer, view())
        stream = io.BytesIO()
        drawn.savefig(stream, format=kind)
        return Response(stream.getvalue(), mimetype=TYPES[kind])

    return app


def _plain(value: Any) -> Any:
    """Tensors as their bytes, which a page reads at once; the rest as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.int() if value.dtype == torch.int64 else value
    value = value.float() if value.is_floating_point() else value
    array = value.contiguous().numpy()
    return dict(
        shape=array.shape,
        dtype=str(array.dtype),
        bytes=base64.b64encode(array.tobytes()).decode(),
    )


def _name(view: View) -> str:
    return f"stage {view.stage}, block {view.block}"


def _attention(explorer: Explorer, view: View) -> Any:
    captured, state = explorer.state(view)
    found = explorer.attention(view)
    kinds = {"SOFT++" if state.layer.normalize else "SOFT": "rows", "softmax": "softmax"}
    maps: dict[str, np.ndarray] = {}
    for name, kind in kinds.items():
        rows = found[kind].unflatten(-1, state.hw_shape).numpy()
        heads = range(len(rows)) if view.head < 0 else [view.head]
        maps |= {f"{name}, head {head}": rows[head][None] for head in heads}
        if view.head < 0:
            maps[f"{name}, mean"] = rows.mean(0)[None]
    title = f"{_name(view)}: {max(found['landmarks'])} landmarks"
    point = [(view.x, view.y)]
    return draw_attention(captured.image.picture, point, maps, found["extent"], title)


def _landmarks(explorer: Explorer, view: View) -> Any:
    captured, found = explorer.captured(view.image, view.settings), explorer.landmarks(view)
    return draw_landmarks(
        captured.image.picture,
        found["regions"].numpy(),
        found["strength"].numpy(),
        found["centres"].numpy(),
        found["extent"],
        title=f"{_name(view)}, head {found['head']}",
    )


def _spectrum(explorer: Explorer, view: View) -> Any:
    found = explorer.spectrum(view)
    eigenvalues, x, filters = (found[name].numpy() for name in ("eigenvalues", "x", "filters"))
    solver = f"{view.settings.solver} solver"
    return draw_spectrum(
        eigenvalues, x, filters, title=f"{_name(view)}: A of the landmarks, {solver}"
    )


def _predictions(explorer: Explorer, view: View) -> Any:
    picture = explorer.captured(view.image, view.settings).image.picture
    return draw_predictions(picture, explorer.predictions(view), title=view.image[:60])


FIGURES = dict(
    attention=_attention, landmarks=_landmarks, spectrum=_spectrum, predictions=_predictions
)


def _is_here(host: str) -> bool:
    """Whether no other machine reaches an address, or any of those of a name."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None)
    except OSError:  # `*`, or what waitress refuses
        return False
    return all(ip_address(address[0]).is_loopback for *_, address in found)


def _in_url(host: str) -> str:
    host = host.strip("[]")
    return f"[{host}]" if ":" in host else host


def make_server(explorer: Explorer, host: str, port: int) -> Any:
    """Waitress on an address; ``run()`` serves."""
    from waitress import create_server

    hosts = (*HERE, _in_url(host)) if _is_here(host) else None
    # A browser asks six things at once, and waiting a moment is nothing to warn of.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    return create_server(
        make_app(explorer, hosts),
        host=host,
        port=port,
        threads=8,
        max_request_body_size=UPLOAD_BYTES + 1,  # which it takes for the first too large
    )


def addresses(server: Any, host: str) -> list[str]:
    """Where a server answers: at one port, or where a name has several addresses, maybe more."""
    ports = [port for _, port in getattr(server, "effective_listen", [])]
    ports = ports or [server.effective_port]
    return [f"http://{_in_url(host)}:{port}/" for port in dict.fromkeys(ports)]


def _has_display() -> bool:
    """Whether a browser would have a window, and not take this terminal."""
    named = any(os.environ.get(name) for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"))
    return named or sys.platform in ("darwin", "win32")


def _open_page(address: str) -> None:
    with suppress(Exception):  # the address is printed, and any program may be behind it
        webbrowser.open(address)


def serve(explorer: Explorer, host: str, port: int, browser: bool = True) -> None:
    """Serve until interrupted.

    Args:
        explorer: what the page shows.
        host: address.
        port: 0 for any.
        browser: open the page where only this machine reaches it, and there is a display.
    """
    server = make_server(explorer, host, port)
    found = addresses(server, host)
    print(*found, sep="\n", flush=True)
    if browser and _is_here(host) and _has_display():
        # Some are waited for until they end; what they ask waits, as the socket listens already.
        threading.Thread(target=_open_page, args=(found[0],), daemon=True).start()
    try:
        server.run()
    except KeyboardInterrupt:
        server.close()
