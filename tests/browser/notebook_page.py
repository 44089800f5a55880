"""A notebook in a real JupyterLab in a real Chromium: run it, press its buttons, see its pictures, read its outputs."""

from __future__ import annotations

import base64
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import Locator, Page

SCREENSHOTS = "LABKIT_SCREENSHOTS"  # a folder that is kept, to look at them

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# The notebook that is open. JupyterLab shows it before its file is read and before its kernel can take a request.
_READY = """async path => {
  const app = window.jupyterapp;
  if (!app) return false;
  await app.restored;
  const panel = app.shell.currentWidget;
  if (!panel || !panel.context || !panel.sessionContext || panel.context.path !== path) return false;
  await panel.context.ready;
  await panel.sessionContext.ready;
  const kernel = panel.sessionContext.session && panel.sessionContext.session.kernel;
  if (!kernel) return false;
  await kernel.info;
  return true;
}"""
_RUN = """command => {
  window.labkitRun = 'running';
  window.jupyterapp.commands.execute(command).then(
    () => { window.labkitRun = 'done'; }, error => { window.labkitRun = String(error); });
}"""
_CELLS = "() => Array.from(window.jupyterapp.shell.currentWidget.content.model.cells).map(cell => cell.toJSON())"
_BYTES = """async image => {
  const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
  let text = '';
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}"""


class NotebookPage:
    """The one notebook open in `page`. Methods fail the test, saying what they saw instead."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def open(self, link: str, timeout: float = 60) -> None:
        """Open a notebook by its address and wait until its kernel answers."""
        path = unquote(urlsplit(link).path.partition("/lab/tree/")[2])
        self.page.goto(f"{link}&reset")  # without the notebooks that were open the last time
        self._wait_for(lambda: self.page.evaluate(_READY, path), timeout, f"{path} with a kernel that is ready")

    def close(self) -> None:
        """End the notebook's kernel, and so its lab: it would take its share of the machine from every later test."""
        self.page.evaluate("() => window.jupyterapp && window.jupyterapp.serviceManager.sessions.shutdownAll()")

    def run_all(self, timeout: float = 240) -> None:
        """Run all cells, to the end of the last one. A cell that raises fails the test with its traceback."""
        self.start_all()
        self.wait_until_run(timeout)

    def start_all(self) -> None:
        """Begin to run all cells; meanwhile buttons can be pressed, and pictures seen."""
        self.page.evaluate(_RUN, "notebook:run-all-cells")

    def run_above(self, source: str, timeout: float = 240) -> None:
        """Run the cells above the one whose source contains `source`."""
        self._select(source)
        self.page.evaluate(_RUN, "notebook:run-all-above")
        self._wait_until_run(timeout)

    def run_below(self, source: str, timeout: float = 240) -> None:
        """Run the cell whose source contains `source` and all below it; then all must have run, and none raised."""
        self._select(source)
        self.page.evaluate(_RUN, "notebook:run-all-below")
        self.wait_until_run(timeout)

    def wait_until_run(self, timeout: float = 240) -> None:
        """Wait until what `start_all` began is done. A cell that raised fails the test with its traceback."""
        self._wait_until_run(timeout)
        code = [cell for cell in self.cells() if cell["cell_type"] == "code" and _text(cell["source"]).strip()]
        for cell in code:
            for output in cell["outputs"]:
                if output["output_type"] == "error":
                    pytest.fail(f"cell {cell['id']} raised:\n" + _COLOURS.sub("", "\n".join(output["traceback"])))
        not_run = [cell["id"] for cell in code if cell["execution_count"] is None]
        assert not not_run, f"cells that did not run: {not_run}"

    def _wait_until_run(self, timeout: float) -> None:
        self._wait_for(lambda: self.page.evaluate("window.labkitRun") != "running", timeout, "the end of all cells")
        assert self.page.evaluate("window.labkitRun") == "done"

    def _select(self, source: str) -> None:
        """Make the one cell whose source contains `source` the active one."""
        script = "number => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = number; }"
        self.page.evaluate(script, self._number(source))

    def cells(self) -> list[dict[str, Any]]:
        """All cells as they would be saved now."""
        found: list[dict[str, Any]] = self.page.evaluate(_CELLS)
        return found

    def output_text(self, source: str) -> str:
        """What the one cell whose source contains `source` printed and displayed, as plain text."""
        cells = [cell for cell in self.cells() if cell["cell_type"] == "code" and source in _text(cell["source"])]
        assert len(cells) == 1, f"{len(cells)} cells contain {source!r}"
        parts = []
        for output in cells[0]["outputs"]:
            parts.append(_text(output.get("text", "")) or _text(output.get("data", {}).get("text/plain", "")))
        return "\n".join(parts)

    def visible_text(self) -> str:
        """All text the reader sees in the outputs, that of widgets included."""
        return "\n".join(self.page.locator(".jp-OutputArea-output").all_inner_texts())

    def wait_for_text(self, text: str, timeout: float = 60) -> None:
        """Wait until an output, of a widget too, shows `text`."""
        try:
            self._wait_for(lambda: text in self.visible_text(), timeout, f"the text {text!r}")
        except AssertionError:
            pytest.fail(f"{text!r} not within {timeout:g} s; the outputs say:\n{self.visible_text()}")

    def button(self, name: str) -> Locator:
        """The first button in an output with this text, or with this in its tooltip."""
        buttons = self.page.locator(".jp-OutputArea-output button")
        by_text = buttons.filter(has_text=name)
        return by_text.first if by_text.count() else buttons.and_(self.page.locator(f'[title*="{name}"]')).first

    def click(self, name: str, timeout: float = 60) -> None:
        """Press the button with this text or tooltip, once it can be pressed."""

        def can_be_pressed() -> bool:
            button = self.button(name)
            return button.count() > 0 and button.is_enabled()

        self._wait_for(can_be_pressed, timeout, f"button {name!r}")
        self.button(name).click()

    def picture(self, index: int = 0) -> bytes:
        """The bytes of the `index`-th live picture (an ipywidgets Image) as the browser has them now."""
        image = self.page.locator(".jp-OutputArea-output img.widget-image").nth(index)
        image.wait_for(state="attached", timeout=60_000)
        for _ in range(20):
            try:
                return base64.b64decode(image.evaluate(_BYTES))
            except Exception as error:  # the URL was replaced by the next picture's between reading and fetching it
                last = error
        pytest.fail(f"the picture cannot be read: {last}")

    def wait_for_new_picture(self, before: bytes, index: int = 0, timeout: float = 60) -> bytes:
        """Wait until the live picture differs from `before`; return it."""
        self._wait_for(lambda: self.picture(index) != before, timeout, "a picture that differs")
        return self.picture(index)

    def screenshot(self, name: str, folder: Path) -> Path:
        """Save what the window shows, as `name`.png, in `folder` or in that of LABKIT_SCREENSHOTS."""
        folder = Path(os.environ.get(SCREENSHOTS) or folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    def scroll_to(self, source: str) -> None:
        """Bring the one cell whose source contains `source` to the top of the window."""
        script = "number => window.jupyterapp.shell.currentWidget.content.scrollToItem(number, 'start')"
        self.page.evaluate(script, self._number(source))

    def _number(self, source: str) -> int:
        return next(number for number, cell in enumerate(self.cells()) if source in _text(cell["source"]))

    def _wait_for(self, condition: Callable[[], object], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
            self.page.wait_for_timeout(100)  # the browser's events are handled meanwhile


def _text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)
