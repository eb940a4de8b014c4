"""A headless Chromium on a folder that is served from this machine: evaluate JavaScript, click,
wait. For checks of web exports.

Speaks the DevTools protocol over Chromium's pipe, so nothing has to be installed but the browser.
"""

from __future__ import annotations

import fcntl
import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sdlite.errors import ExportError
from sdlite.io import scratch

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Software WebGPU (SwiftShader) where there is no GPU; Chromium wants to be asked for it.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
)


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

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _above(descriptor: int) -> int:
    """The same pipe end under a number from 10: 3 and 4 are wanted for Chromium's ends."""
    out = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return out


class Browser:
    """Serve `folder` on 127.0.0.1 and open `page` of it. Use as a context manager.

    Raises:
        ExportError: no Chromium, or it ends or answers with an error (which the message holds).
    """

    def __init__(self, folder: Path, page: str = "index.html", timeout: float = 300):
        binary = find()
        if binary is None:
            raise ExportError(
                f"no browser; install one of {', '.join(NAMES)}, or name it in SDLITE_CHROMIUM."
            )
        self.timeout = timeout
        self._server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder))
        )
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._home = ExitStack()
        profile = self._home.enter_context(scratch("browser"))
        (there, self._out), (self._in, back) = (
            (_above(a), _above(b)) for a, b in (os.pipe(), os.pipe())
        )

        def descriptors() -> (
            None
        ):  # Chromium reads commands from descriptor 3 and writes answers to 4
            os.dup2(there, 3)
            os.dup2(back, 4)

        command = [
            binary,
            *FLAGS,
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            command, preexec_fn=descriptors, pass_fds=(3, 4), stderr=subprocess.DEVNULL
        )
        os.close(there)
        os.close(back)
        self._timer: threading.Timer | None = None
        self._buffer, self._id, self._session = b"", 0, None
        try:
            target = self._send("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)[
                "sessionId"
            ]
            self._send("Page.navigate", url=f"http://127.0.0.1:{self._server.server_port}/{page}")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._server.shutdown()
        self._server.server_close()
        os.close(self._out)
        os.close(self._in)
        self._home.close()

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        self._id += 1
        message: dict[str, Any] = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = memoryview(json.dumps(message).encode() + b"\0")
        timer = threading.Timer(self.timeout, self._process.kill)
        timer.start()
        try:
            while data:
                data = data[os.write(self._out, data) :]
            while True:
                answer = self._read()
                if answer.get("id") == self._id:
                    break
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
        self.evaluate(
            f"new Promise((yes, no) => {{ const end = Date.now() + {seconds * 1000}; const ask = ()"
            f" => ({condition}) ? yes(true) : Date.now() > end ? no(new Error({late})) :"
            " setTimeout(ask, 20); ask(); })"
        )

    def click(self, selector: str) -> None:
        """A real mouse click in the middle of an element."""
        box = self.evaluate(
            "(() => { const b ="
            f" document.querySelector({json.dumps(selector)}).getBoundingClientRect(); return [b.x"
            " + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._send(
                "Input.dispatchMouseEvent",
                type=kind,
                x=box[0],
                y=box[1],
                button="left",
                clickCount=1,
            )
