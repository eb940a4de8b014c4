"""A headless Chromium on a folder that is served from this machine: evaluate JavaScript, click,
wait. For checks of web exports.

Speaks the DevTools protocol over Chromium's pipe, so nothing has to be installed but the browser.
"""

from __future__ import annotations

import base64
import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sdlite.errors import ExportError
from sdlite.io import scratch

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CODES = {"Tab": 9}  # keys that the browser itself acts on by number
# Software WebGPU (SwiftShader) where there is no GPU; Chromium wants to be asked for it.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
)


def lacking() -> str:
    """Why no browser can be asked on this machine; "" where one can."""
    if os.name != "posix":
        return "sdlite talks to Chromium through pipes that only Linux and macOS have"
    if find() is None:
        return f"no browser here; install one of {', '.join(NAMES)}, or name it in SDLITE_CHROMIUM"
    return ""


def find() -> str | None:
    """Path of a Chromium, from SDLITE_CHROMIUM or PATH."""
    return os.environ.get("SDLITE_CHROMIUM") or next(
        (p for n in NAMES if (p := shutil.which(n))), None
    )


class _Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {  # noqa: RUF012
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:  # cross-origin isolation: without it wasm has one thread
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


def _above(descriptor: int) -> int:
    """The same pipe end under a number from 10: 3 and 4 are wanted for Chromium's ends."""
    held = [descriptor]
    while held[-1] < 10:
        held.append(os.dup(held[-1]))
    for small in held[:-1]:
        os.close(small)
    return held[-1]


class Browser:
    """Serve `folder` on 127.0.0.1 and open `page` of it. Use as a context manager.

    Raises:
        ExportError: no Chromium, or it ends or answers with an error (which the message holds).
    """

    def __init__(self, folder: Path, page: str = "index.html", timeout: float = 300):
        if why := lacking():
            raise ExportError(f"{why}.")
        self.timeout = timeout
        self._buffer, self._id, self._session = b"", 0, ""
        with ExitStack() as stack:
            port = _serve(folder, stack)
            self._process, self._out, self._in = _start(stack)
            target = self._send("Target.createTarget", url="about:blank")["targetId"]
            attached = self._send("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            self.open(f"http://127.0.0.1:{port}/{page}")
            self._stack = stack.pop_all()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and the server."""
        self._stack.close()

    def open(self, url: str) -> None:
        """Go to an address."""
        self._send("Page.navigate", url=url)

    def resize(self, width: int, height: int) -> None:
        """Make the page as large as a phone's screen of these CSS pixels."""
        self._send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=True,
        )

    def screenshot(self) -> bytes:
        """What the page looks like, as PNG."""
        return base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"])

    def _send(self, method: str, **params: object) -> dict[str, Any]:
        self._id += 1
        message: dict[str, object] = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = memoryview(json.dumps(message).encode() + b"\0")
        timer = threading.Timer(self.timeout, self._process.kill)
        timer.start()
        try:
            while data:
                data = data[os.write(self._out, data) :]
            while (answer := self._read()).get("id") != self._id:
                pass
        except BrokenPipeError as e:
            raise ExportError(f"the browser ended during {method}.") from e
        finally:
            timer.cancel()
        if "error" in answer:
            raise ExportError(f"the browser refused {method}: {answer['error'].get('message')}")
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise ExportError(f"the browser ended, or gave no answer for {self.timeout:g} s.")
            self._buffer += piece
        head, self._buffer = self._buffer.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(head)
        return answer

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression (awaited), as JSON carries it.

        Raises:
            ExportError: it threw; the message holds what.
        """
        answer = self._send(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            about = answer["exceptionDetails"]
            words = about.get("exception", {}).get("description", about.get("text"))
            raise ExportError(f"in the browser: {words}"[:500])
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until a JavaScript condition holds. Raises ExportError after `seconds`."""
        late = json.dumps(f"waited {seconds:g} s for {condition}")
        self.evaluate(f"""new Promise((yes, no) => {{
          const end = Date.now() + {seconds * 1000};
          const ask = () => {{
            if ({condition}) yes(true);
            else if (Date.now() > end) no(new Error({late}));
            else setTimeout(ask, 20);
          }};
          ask();
        }})""")

    def _box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element, which is scrolled into view."""
        left, top, width, height = self.evaluate(f"""(() => {{
          const element = document.querySelector({json.dumps(selector)});
          element.scrollIntoView({{block: "center", behavior: "instant"}});
          const box = element.getBoundingClientRect();
          return [box.x, box.y, box.width, box.height];
        }})()""")
        return left, top, width, height

    def click(self, selector: str) -> None:
        """A real mouse click in the middle of an element, which is scrolled into view."""
        self.drag(selector, [(0.5, 0.5)])

    def drag(self, selector: str, path: Sequence[tuple[float, float]], touch: bool = False) -> None:
        """A mouse, or a finger, that goes down on an element, along a path, and up again.

        Args:
            path: points in shares of the element's width and height.
        """
        left, top, width, height = self._box(selector)
        points = [{"x": left + x * width, "y": top + y * height} for x, y in path]
        if touch:
            kinds = ["touchStart", *("touchMove" for _ in points[1:])]
            for kind, point in zip(kinds, points, strict=True):
                self._send("Input.dispatchTouchEvent", type=kind, touchPoints=[point])
            self._send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
            return
        kinds = ["mousePressed", *("mouseMoved" for _ in points[1:]), "mouseReleased"]
        held: dict[str, object] = {"button": "left", "buttons": 1, "clickCount": 1}
        for kind, point in zip(kinds, [*points, points[-1]], strict=True):
            self._send("Input.dispatchMouseEvent", type=kind, **point, **held)

    def press(self, key: str, text: str = "") -> None:
        """A key of the keyboard, by DOM's name; `text` is what it writes."""
        for kind in ("keyDown", "keyUp"):
            more: dict[str, object] = {"text": text} if text and kind == "keyDown" else {}
            if key in CODES:
                more["windowsVirtualKeyCode"] = CODES[key]
            self._send("Input.dispatchKeyEvent", type=kind, key=key, **more)

    def upload(self, selector: str, file: Path) -> None:
        """Choose a file in an input, as its dialog does."""
        script = f"document.querySelector({json.dumps(selector)})"
        found = self._send("Runtime.evaluate", expression=script)["result"]["objectId"]
        self._send("DOM.setFileInputFiles", files=[str(file)], objectId=found)


def _serve(folder: Path, stack: ExitStack) -> int:
    """Serve a folder until the stack is closed; the port."""
    handler = functools.partial(_Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    stack.callback(server.server_close)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stack.callback(server.shutdown)
    return server.server_port


def _start(stack: ExitStack) -> tuple[subprocess.Popen[bytes], int, int]:
    """A Chromium until the stack is closed, and the pipe ends to write to and to read from."""
    profile = stack.enter_context(scratch("browser"))
    (there, out), (into, back) = ((_above(a), _above(b)) for a, b in (os.pipe(), os.pipe()))
    stack.callback(os.close, out)
    stack.callback(os.close, into)

    def descriptors() -> None:
        """Chromium reads commands from descriptor 3 and writes answers to 4."""
        os.dup2(there, 3)
        os.dup2(back, 4)

    options = ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        [str(find()), *FLAGS, *options],
        preexec_fn=descriptors,
        pass_fds=(3, 4),
        stderr=subprocess.DEVNULL,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    os.close(there)
    os.close(back)
    return process, out, into
