"""Open a web page that shows what an image's pixels attend to, for any stage, block and head.

    python -m mmsoft.explore CONFIG CHECKPOINT --images FOLDER

Works without internet. The page is served to this machine alone unless `--host` says otherwise, and
no file but the images of the folder is. It opens in a browser where there is a display.
"""

import signal
import sys
from typing import Any

from mmengine.logging import MMLogger

from mmsoft.analysis import load_model
from mmsoft.builder import config_parser, read_config, require, tool_main
from mmsoft.explore.looking import Explorer


def _end(*_: Any) -> None:
    sys.exit()


@tool_main
def main() -> None:
    """Run the command line."""
    parser = config_parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", help="default: the config's own initialization")
    parser.add_argument("--images", required=True, metavar="FOLDER", help="images to choose from")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: this machine only)")
    parser.add_argument("--port", type=int, default=8765, help="0 for any (default: 8765)")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    for package in ("flask", "waitress", "matplotlib"):
        require(package)
    MMLogger.get_instance("explore").setLevel("ERROR")  # each parameter, when initialized
    config = read_config(args)
    model = load_model(config, args.checkpoint, args.device)
    signal.signal(signal.SIGTERM, _end)  # which would leave the uploads behind
    with Explorer(config, model, args.images) as explorer:
        from mmsoft.explore.server import serve

        serve(explorer, args.host, args.port, not args.no_browser)


if __name__ == "__main__":
    sys.exit(main())
