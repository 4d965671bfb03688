"""A headless Chromium, spoken to over its DevTools protocol."""

import itertools
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)")


class Page:
    """One tab: `events` is everything it has reported, in order."""

    def __init__(self, address: str):
        import websocket

        self.socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self.numbers, self.events = itertools.count(1), []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (message := json.loads(self.socket.recv())).get("id") != number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def open(self, url: str, *, width_px: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width_px, height=800, deviceScaleFactor=1, mobile=True)
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(json.loads(self.socket.recv()))

    def value(self, expression: str):
        """What a JavaScript expression evaluates to."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return answer["result"].get("value")

    def requests(self) -> list[str]:
        sent = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def complaints(self) -> list[dict]:
        """Console messages, log entries and exceptions."""
        names = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        return [event["params"] for event in self.events if event["method"] in names]


@contextmanager
def open_page(profile: Path) -> Iterator[Page]:
    """A new browser with an empty profile in the folder `profile`, and its first tab."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
    browser = subprocess.Popen(
        [CHROMIUM, *options, f"--user-data-dir={profile}"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        line = next(line for line in browser.stderr if "DevTools listening on" in line)
        port = line.split("127.0.0.1:")[1].split("/")[0]
        request = Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
        yield Page(json.load(urlopen(request))["webSocketDebuggerUrl"])
    finally:
        browser.terminate()
        browser.wait()
        browser.stderr.close()
