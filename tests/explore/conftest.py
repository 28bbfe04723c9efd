"""An explorer of an untrained detector on generated images, and its server."""

import os
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from browser import Browser, chromium
from mmengine.config import Config
from true_layout import make_demo_data

from mmsoft.analysis import load_model


@pytest.fixture(scope="session")
def config_path(request, root, tmp_path_factory):
    """Released landmarks, which have a spectrum; a test may ask for those by content."""
    path = root / "configs/demo/retinanet_softpp-mini_fpn_shapes.py"
    if getattr(request, "param", "released") == "content":
        return path
    base = str(path)
    backbone = dict(landmarks="released", max_landmarks=None)
    path = tmp_path_factory.mktemp("configs") / "released.py"
    path.write_text(f"_base_ = {base!r}\nmodel = dict(backbone={backbone!r})\n")
    return path


@pytest.fixture(scope="session")
def workplace(config_path, tmp_path_factory):
    """A folder with data and a checkpoint, and the model of the checkpoint."""
    for package in ("flask", "waitress", "matplotlib", "mmdet"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("explore")
    make_demo_data(folder, train=1, val=2, size=64)
    torch.manual_seed(0)
    model = load_model(Config.fromfile(config_path))
    torch.save(dict(state_dict=model.state_dict()), folder / "model.pth")
    return folder


@pytest.fixture(scope="session")
def images(workplace):
    return workplace / "data/shapes/coco/val2017"


@pytest.fixture(scope="session")
def explorer(config_path, workplace, images):
    from mmsoft.explore.looking import Explorer

    config = Config.fromfile(config_path)
    model = load_model(config, str(workplace / "model.pth"))
    with Explorer(config, model, str(images)) as explorer:
        yield explorer


@pytest.fixture(scope="session")
def client(explorer):
    from mmsoft.explore.server import make_app

    return make_app(explorer).test_client()


@pytest.fixture
def open_server(explorer):
    """Servers of the explorer, in this process, which run until the test is over."""
    from mmsoft.explore.server import make_server

    opened = []

    def start(host):
        server = make_server(explorer, host, 0)
        opened.append((server, threading.Thread(target=server.run, daemon=True)))
        opened[-1][1].start()
        return server

    yield start
    for server, thread in opened:
        server.close()
        thread.join(5)


@pytest.fixture
def predicting(explorer, monkeypatch):
    """Let the model say something of every image; returns the settings under which it is asked."""
    from mmengine.structures import BaseDataElement

    def predict(**result):
        seen = []

        def test_step(data):
            seen.append({(layer.max_landmarks, layer.solver) for layer in explorer.layers.values()})
            return [BaseDataElement(**result)]

        explorer.found.values.clear()
        monkeypatch.setattr(explorer.model, "test_step", test_step)
        return seen

    yield predict
    explorer.found.values.clear()


@pytest.fixture(scope="session")
def listening():
    """A command that serves, in a process of its own: a context that gives the address."""

    @contextmanager
    def start(command, env=None, **options):
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        server = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True, **options
        )
        with server:
            try:
                yield next(line.strip() for line in server.stdout if line.startswith("http://"))
            finally:
                server.terminate()

    return start


@pytest.fixture(scope="session")
def started(listening):
    """The command, as users run it."""

    def start(config, *checkpoint, images):
        command = [sys.executable, "-m", "mmsoft.explore", config, *checkpoint]
        return listening([*command, "--images", images, "--port", "0", "--no-browser"])

    return start


@pytest.fixture
def browser(tmp_path):
    with Browser(chromium(), tmp_path) as browser:
        yield browser
