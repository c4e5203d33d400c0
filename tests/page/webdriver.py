"""A browser, driven by WebDriver over HTTP: Chromium without a window, and the standard library alone."""

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import unittest
import urllib.error
import urllib.request

#: Seconds; longer than any wait that succeeds, on any machine.
PATIENCE = 60.0
POLL = 0.03
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {"Tab": "\ue004", "Enter": "\ue007", "Escape": "\ue00c", "Space": "\ue00d", "End": "\ue010", "Home": "\ue011",
        "ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015"}  # fmt: skip


def missing():
    """Why no browser can be driven here, or None."""
    for program in ["chromium", "chromedriver"]:
        if shutil.which(program) is None:
            return f"there is no {program} here"
    return None


def needs_browser(case):
    return unittest.skip(missing())(case) if missing() else case


class Browser:
    """One window. Time-outs are failures that say what was waited for."""

    def __init__(self, width=1440, height=1000, dark=False):
        self.profile = tempfile.mkdtemp(prefix="aquifer-page-")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.base = f"http://127.0.0.1:{port}"
        self.session = None
        try:
            self._begin(width, height, dark)
        except BaseException:
            self.close()
            raise

    def _begin(self, width, height, dark):
        self.until(self._is_up, "chromedriver answers")
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        arguments += [f"--user-data-dir={self.profile}", f"--window-size={width},{height}", "--lang=en"]
        options = {"args": arguments, "binary": shutil.which("chromium")}
        asked = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = self._send("POST", "/session", {"capabilities": {"alwaysMatch": asked}})
        self.session = answer["sessionId"]
        self.media(dark=dark)
        self.size(width, height)

    def _is_up(self):
        try:
            return self._send("GET", "/status")["ready"]
        except OSError:
            return False

    def _send(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {json.load(error)['value']['message']}") from None

    def _do(self, what, body=None):
        return self._send("POST", f"/session/{self.session}/{what}", body or {})

    def devtools(self, command, **parameters):
        return self._do("goog/cdp/execute", {"cmd": command, "params": parameters})

    def media(self, dark=False, still=True):
        """The system's theme, and whether it asks for less motion."""
        features = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if still else "",
        }
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": n, "value": v} for n, v in features.items()])

    def size(self, width, height):
        """Of what the page has to itself; unlike a window, it may be as narrow as a telephone."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def open(self, url):
        self._do("url", {"url": url})

    def run(self, script, *arguments):
        """What the body of a function returns, by way of JSON."""
        return self._do("execute/sync", {"script": script, "args": list(arguments)})

    def press(self, *keys):
        for key in keys:
            value = KEYS.get(key, key)
            steps = [{"type": "keyDown", "value": value}, {"type": "keyUp", "value": value}]
            self._do("actions", {"actions": [{"type": "key", "id": "keyboard", "actions": steps}]})

    def click(self, selector):
        found = self._do("element", {"using": "css selector", "value": selector})
        self._do(f"element/{found[ELEMENT]}/click")

    def log(self):
        """What the console said since it was asked last."""
        return self._do("se/log", {"type": "browser"})

    def picture(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self._send("GET", f"/session/{self.session}/screenshot")))

    def until(self, holds, what, patience=PATIENCE):
        """Waits until ``holds`` (a function here, or a script there) gives something true, and returns that."""
        deadline = time.monotonic() + patience
        while True:
            value = holds() if callable(holds) else self.run(holds)
            if value:
                return value
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {patience} s: {what}")
            time.sleep(POLL)

    def close(self):
        if self.session:
            try:
                self._send("DELETE", f"/session/{self.session}")
            except (OSError, AssertionError):
                pass
        self.driver.terminate()
        self.driver.wait(PATIENCE)
        shutil.rmtree(self.profile, ignore_errors=True)
