"""Serve the page: on this machine alone, or behind a password, and never through anyone else.

gradio is mounted in an app of ours, which uvicorn runs: no share link, no telemetry, and a header
that tells the browser to ask nobody but this server for anything.
"""

import errno
import hmac
import ipaddress
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesteer.errors import MoesteerError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from gradio.themes import Base

    from moesteer.playground.asking import Played

USER = "moesteer"
"""Who logs in; the password tells."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self'"
    " 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'none';"
    " object-src 'none'; form-action 'self'; base-uri 'self'"
)
"""For the browser: nothing from elsewhere, nothing to elsewhere. gradio evaluates its templates."""


def require_gradio() -> None:
    """MoesteerError where gradio is missing; its telemetry is off before it is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise MoesteerError(
            f"moesteer play makes its page with gradio: pip install 'moesteer[playground]'"
            f" ({error})."
        ) from None


def read_password(file: str | None, host: str) -> str | None:
    """The password, the file's first line; MoesteerError where others could come in without one."""
    if file is None:
        if not is_loopback(host):
            raise MoesteerError(
                f"--host {host} lets other machines in: give --password-file FILE, whose first line"
                f" is the password (the user is called {USER}), or leave out --host."
            )
        return None
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MoesteerError(f"{file} can't be read: {error}.") from None
    if not lines or not lines[0].strip():
        raise MoesteerError(f"{file} holds no password: its first line is empty.")
    return lines[0].strip()


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """The socket to serve at, before a model is loaded; MoesteerError where it can't be had."""
    if not 0 <= port <= 65535:
        raise MoesteerError(f"--port is {port}; it must be from 0 to 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except UnicodeError:
        raise MoesteerError(f"--host {host!r} is no name of a machine.") from None
    except socket.gaierror as error:
        raise MoesteerError(f"--host {host} can't be had: {error.strerror}.") from None
    except OSError as error:
        other = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise MoesteerError(
            f"{host}:{port} can't be had: {error.strerror}. Give another {other}."
        ) from None


def make_app(played: "Played", password: str | None, host: str = "127.0.0.1") -> "FastAPI":
    """The page as an app; whoever has no password may only come by a name of this machine."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from moesteer.playground.layout import TEMPLATES
    from moesteer.playground.page import build

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Policy)
    if password is None:  # else a page elsewhere could give its name our address
        app.add_middleware(
            TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[", host]
        )
    return gr.mount_gradio_app(
        app,
        build(played),
        path="/",
        server_name=host,
        auth=None if password is None else _login(password),
        auth_message=f"The user is called {USER}; the password is in the file that the page was"
        " started with.",
        theme=_theme(),
        css_paths=[TEMPLATES / "page.css"],
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        max_file_size=1,  # nothing is uploaded
    )


def _theme() -> "Base":
    """The colours of reports, and fonts that every machine has: none is fetched."""
    from gradio.themes import Base

    theme = Base(
        primary_hue="stone",
        neutral_hue="stone",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return theme.set(
        body_background_fill="#fdfcf9",
        body_background_fill_dark="#151513",
        button_primary_background_fill="#1e1d1a",
        button_primary_background_fill_hover="#3a3833",
        button_primary_text_color="#fdfcf9",
        button_primary_background_fill_dark="#e8e5dc",
        button_primary_background_fill_hover_dark="#ffffff",
        button_primary_text_color_dark="#151513",
    )


def _login(password: str) -> Callable[[str, str], bool]:
    def right(user: str, given: str) -> bool:
        return user == USER and hmac.compare_digest(given.encode(), password.encode())

    return right


class _Policy:
    """Adds the header to whatever is answered."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = message | {"headers": [*message["headers"], policy]}
            await send(message)

        await self.app(scope, receive, with_policy)


def run(played: "Played", listening: socket.socket, password: str | None, host: str) -> None:
    """Serve until Ctrl-C."""
    import uvicorn

    app = make_app(played, password, host)
    shown = f"[{host}]" if ":" in host else host
    print(
        f"{played.engine.facts.id} plays at http://{shown}:{listening.getsockname()[1]}"
        " (Ctrl-C ends)",
        flush=True,
    )
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])
