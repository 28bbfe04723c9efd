"""A headless Chromium, driven over its DevTools protocol through two pipes: no driver, no port."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

ARROWS = ("ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown")
NAMES = ("chromium", "chromium-browser", "google-chrome")


def find():
    """The program of the distribution's package, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def chromium():
    """The same; a test skips, or fails, without it."""
    from required import missing

    program = find()
    if program is None:
        missing("MMSOFT_BROWSER", "no Chromium: apt-get install chromium")
    return program


class Browser:
    """One page.

    Args:
        program: of Chromium.
        folder: for its profile.
        size: of the window, (width, height).
    """

    def __init__(self, program, folder, size=(1300, 900)):
        ours, theirs = os.pipe(), os.pipe()  # we write to the first, it writes to the second

        def descriptors():  # it reads from 3 and writes to 4
            read, write = os.dup(ours[0]), os.dup(theirs[1])
            os.dup2(read, 3)
            os.dup2(write, 4)

        self.process = subprocess.Popen(
            [
                program,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--hide-scrollbars",
                "--remote-debugging-pipe",
                f"--user-data-dir={Path(folder, 'profile')}",
                f"--window-size={size[0]},{size[1]}",
            ],
            close_fds=False,
            preexec_fn=descriptors,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self.write, self.read = os.fdopen(ours[1], "wb", 0), os.fdopen(theirs[0], "rb", 0)
        self.count, self.rest = 0, b""
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = found["sessionId"]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait()
        self.write.close()
        self.read.close()

    def call(self, method, **parameters):
        """Send a command and return its result."""
        self.count += 1
        message = dict(id=self.count, method=method, params=parameters)
        if self.session is not None:
            message["sessionId"] = self.session
        self.write.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                part = self.read.read(1 << 20)
                assert part, "the browser has ended"
                self.rest += part
            line, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.count:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def evaluate(self, expression):
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression, seconds=120):
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"{expression} did not come true"
            time.sleep(0.05)
        return value

    def open(self, url):
        """Go to an address."""
        self.call("Page.navigate", url=url)

    def click(self, x, y):
        """Press and release the left button at a point of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key, shift=False):
        """Press and release a key, such as `h` or `ArrowLeft`."""
        options = dict(key=key, modifiers=8 if shift else 0)
        if key in ARROWS:  # without the code a control does not take it
            options["windowsVirtualKeyCode"] = 37 + ARROWS.index(key)
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **options)

    def screenshot(self, path):
        """Write what the window shows as a PNG."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        Path(path).write_bytes(base64.b64decode(data))
