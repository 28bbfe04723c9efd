"""Take docs/figures/explorer.png anew, by the browser that the tests drive.

    python tools/dev/explorer_picture.py CONFIG CHECKPOINT --images FOLDER

With the demo's segmentor and its validation images, as docs/explorer.md opens them. A pixel is
clicked twice: the first answer waits for the backbone, what the page says is what a click takes.
"""

import argparse
import sys
import threading
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from mmengine.config import Config
from PIL import Image

from mmsoft.analysis import load_model
from mmsoft.explore.looking import Explorer
from mmsoft.explore.server import addresses, make_server

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
VIEW = "stage=1&block=0&head=1"
SIZE = (1300, 1000)  # of the window, pixels
COLOURS, METHOD = 256, Image.Quantize.FASTOCTREE  # of the file, which is to be small
POINTS = ((0.3, 0.2), (0.28, 0.19))  # of the picture's width and height
COMPLETE = "document.body?.dataset.complete === location.search"


def take(address: str, out: Path) -> None:
    """Open the page, click, and write what the window shows."""
    sys.path.insert(0, str(ROOT / "tests/helpers"))
    browsers = import_module("browser")
    program = browsers.find()
    if program is None:
        sys.exit("no Chromium: apt-get install chromium")
    with TemporaryDirectory() as folder, browsers.Browser(program, folder, SIZE) as browser:
        browser.open(f"{address}?{VIEW}")
        for x, y in POINTS:
            browser.until(COMPLETE)
            before = browser.evaluate("location.search")
            box = "(({left, top, width, height}) => [left, top, width, height])"
            left, top, width, height = browser.evaluate(
                f"{box}(document.getElementById('picture').getBoundingClientRect())"
            )
            browser.click(left + x * width, top + y * height)
            browser.until(f"location.search !== {before!r}")
        browser.until(COMPLETE)
        browser.screenshot(out)
    with Image.open(out) as picture:
        picture.convert("RGB").quantize(COLOURS, METHOD).save(out, optimize=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("checkpoint")
    parser.add_argument("--images", required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/figures/explorer.png")
    args = parser.parse_args()
    config = Config.fromfile(args.config)
    with Explorer(config, load_model(config, args.checkpoint), args.images) as explorer:
        server = make_server(explorer, HOST, 0)
        threading.Thread(target=server.run, daemon=True).start()
        take(addresses(server, HOST)[0], args.out)
        server.close()


if __name__ == "__main__":
    main()
