"""A real browser without a window, told what to do over its DevTools protocol.

async with browser(folder) as page:
    await page.open(path.as_uri())
    assert await page.run("document.title") == "..."
    assert page.problems() == []
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

__all__ = ["CHROMIUM", "Page", "browser"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_SWITCHES = (
    "--headless=new",
    "--no-sandbox",  # it is root's in most containers, and sees nothing but pages of ours
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "--remote-debugging-address=127.0.0.1",
)


class Page:
    """One page of the browser. What it asked the network for and what it complained of is in ``events``."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.events: list[dict[str, Any]] = []
        self._socket = socket
        self._session: str | None = None
        self._numbers = count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._loaded = asyncio.Event()

    async def attach(self) -> None:
        target = await self.send("Target.createTarget", url="about:blank")
        attached = await self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.send(f"{domain}.enable")
        await self.size(1280, 900)

    async def listen(self) -> None:
        try:
            async for message in self._socket:
                told = json.loads(message.data)
                if "id" not in told:
                    self.events.append(told)
                    if told["method"] == "Page.loadEventFired":
                        self._loaded.set()
                elif (answer := self._answers.pop(told["id"])).done():
                    continue
                elif "error" in told:
                    answer.set_exception(AssertionError(f"The browser refuses: {told['error']}"))
                else:
                    answer.set_result(told["result"])
        finally:
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(AssertionError("The browser is gone."))

    async def send(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        told = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json(told if self._session is None else {**told, "sessionId": self._session})
        return await answer

    async def open(self, url: str) -> None:
        """Returns when the page is loaded."""
        self.events.clear()
        self._loaded.clear()
        await self.send("Page.navigate", url=url)
        await self._loaded.wait()

    async def run(self, script: str) -> Any:
        """The value of an expression, or what a promise gives. Raises AssertionError for what is thrown."""
        ran = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in ran:
            raise AssertionError(ran["exceptionDetails"].get("exception", ran["exceptionDetails"]))
        return ran["result"].get("value")

    async def until(self, condition: str) -> None:
        """Returns once the condition holds, which is looked at before each frame."""
        await self.run(
            f"new Promise((met) => {{ const look = () => ({condition}) ? met(true) : requestAnimationFrame(look);"
            " look(); })"
        )

    async def press(self, key: str) -> None:
        codes = {"Enter": 13, "Escape": 27, "Home": 36, "End": 35, "PageDown": 34, "ArrowDown": 40, "ArrowRight": 39}
        given: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": codes.get(key, 0)}
        text = key if len(key) == 1 else "\r" if key == "Enter" else None
        await self.send("Input.dispatchKeyEvent", type="keyDown", **given, **({"text": text} if text else {}))
        await self.send("Input.dispatchKeyEvent", type="keyUp", **given)

    async def write(self, text: str) -> None:
        """Into what has the focus."""
        await self.send("Input.insertText", text=text)

    async def size(self, width: int, height: int) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def look(self, *, dark: bool = False, media: str = "") -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.send("Emulation.setEmulatedMedia", media=media, features=[scheme])

    async def picture(self) -> bytes:
        """As PNG."""
        shot = await self.send("Page.captureScreenshot", format="png")
        return base64.b64decode(shot["data"])

    async def pdf(self) -> bytes:
        printed = await self.send("Page.printToPDF", printBackground=True)
        return base64.b64decode(printed["data"])

    def requests(self) -> list[str]:
        """What the page has asked for, itself left out."""
        asked = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in asked if each["request"]["url"] != each["documentURL"]]

    def problems(self) -> list[str]:
        """Errors and warnings: thrown, on the console, or of the browser itself, such as what the policy refused."""
        found = []
        for event in self.events:
            told = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(told["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(str(told["args"]))
            elif event["method"] == "Log.entryAdded":
                found.append(told["entry"]["text"])
        return found


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Page]:
    """A page of a browser of its own, whose profile is in ``folder``."""
    assert CHROMIUM is not None
    # Some start it by a script, which stays its parent: they go together.
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        *_SWITCHES,
        f"--user-data-dir={folder}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "HOME": str(folder)},
    )
    drained: asyncio.Task[None] | None = None
    try:
        assert process.stderr is not None
        said = b""
        while b"DevTools listening on " not in said:
            said = await process.stderr.readline()
            assert said, "The browser did not start."
        drained = asyncio.create_task(_drain(process.stderr))
        address = said.split()[-1].decode()
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            page = Page(socket)
            listening = asyncio.create_task(page.listen())
            try:
                await page.attach()
                yield page
            finally:
                listening.cancel()
                await asyncio.wait([listening])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        if drained is not None:
            await drained


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.read(65_536):
        pass
