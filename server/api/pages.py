"""The web page, and the API description for people: Swagger UI, whose files are on this machine."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from server import playground

_PAGE = Path(playground.__file__).parent
_INLINE = re.compile(r"<(script|style)\b([^>]*)>(.*?)</\1>", re.DOTALL)


def routes() -> APIRouter:
    """All links are relative, so that they work under any path prefix."""
    router = APIRouter(include_in_schema=False)
    page = (_PAGE / "index.html").read_text(encoding="utf-8")
    docs = _swagger_ui()
    page_headers = {"Content-Security-Policy": _policy(page, images="data: blob:"), "Cache-Control": "no-cache"}
    docs_headers = {"Content-Security-Policy": _policy(docs, images="'self' data: blob:"), "Cache-Control": "no-cache"}

    @router.get("/")
    async def index() -> Response:
        return HTMLResponse(page, headers=page_headers)

    @router.get("/docs")
    async def api_description(http: HttpRequest) -> Response:
        if http.scope["raw_path"].endswith(b"/"):
            return RedirectResponse("../docs")  # or the links would lead elsewhere
        return HTMLResponse(docs, headers=docs_headers)

    return router


class _PageFiles(StaticFiles):
    """Scripts and styles of a folder, and nothing else that is in it."""

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        return super().lookup_path(path) if path.endswith((".css", ".js")) else ("", None)


def page_files() -> StaticFiles:
    """The files that the page links to, as `playground/…`."""
    return _PageFiles(directory=_PAGE)


def swagger_ui_files() -> StaticFiles:
    """The files that `/docs` links to, as `docs/…`."""
    return StaticFiles(packages=[("fastapi_offline", "static")])


def _swagger_ui() -> str:
    answer = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="latentd",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="docs/favicon.png",
        swagger_ui_parameters={"validatorUrl": None},  # it would be asked about every description
    )
    return bytes(answer.body).decode()


def _policy(html: str, *, images: str) -> str:
    """The Content-Security-Policy of a page: its own inline scripts and styles, and files from here."""
    sources = {"script": ["'self'"], "style": ["'self'"]}
    for kind, _attributes, content in _INLINE.findall(html):
        if content:
            sources[kind].append(f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'")
    return (
        f"default-src 'none'; script-src {' '.join(sources['script'])}; style-src {' '.join(sources['style'])}; "
        f"img-src {images}; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
