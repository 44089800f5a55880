"""The page of imports, as Contacts Jobs serves it: three files, and the port of the WebSocket service."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from aiohttp import web

from labkit.services.http import Handler

FILES = {"": "index.html", "page.css": "page.css", "page.js": "page.js"}


def routes(notifications_port: int) -> Iterable[web.RouteDef]:
    """`GET /` and what the page needs. Its addresses are relative, so that it also works behind a proxy."""
    # Only its own files, and the WebSocket service: on another port, or, behind a proxy, at the same address.
    allowed = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"connect-src 'self' http://*:{notifications_port} ws://*:{notifications_port}"
    )
    headers = {
        "Content-Security-Policy": allowed,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",  # a changed file shows at the next reload
    }

    async def settings(_: web.Request) -> web.Response:
        return web.json_response({"notifications_port": notifications_port}, headers={"Cache-Control": "no-cache"})

    yield web.get("/settings.json", settings)
    for path, name in FILES.items():
        yield web.get(f"/{path}", _file(Path(__file__).parent / name, headers))


def _file(path: Path, headers: dict[str, str]) -> Handler:
    async def send(_: web.Request) -> web.FileResponse:
        return web.FileResponse(path, headers=headers)

    return send
