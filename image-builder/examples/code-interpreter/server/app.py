"""The HTTP surface that the published clients know."""

import asyncio
import contextlib
import json
import os

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from context import DEFAULT_LANGUAGE, LANGUAGES, Contexts, TooMany
from execution import Execution
from kernel import StartFailed

# The longest request: code, and maybe data in it.
MAX_BODY = 32 << 20


class Events(Response):
    """The events of an execution, each sent as soon as it is there. A client that goes away interrupts the code."""

    media_type = "application/x-ndjson"

    def __init__(self, execution):
        self.execution = execution
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store"})

    def init_headers(self, headers=None):
        super().init_headers(headers)
        # It ends when it ends.
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]

    async def __call__(self, scope, receive, send):
        tasks = [asyncio.create_task(self._send(send)), asyncio.create_task(gone(receive))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.execution.abandoned.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, send):
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for line in self.execution.lines():
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def gone(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


async def fields(request, **kinds):
    """The fields of a request's JSON object, of those kinds or absent."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"the request has more than {MAX_BODY} bytes")
    try:
        # The client of Python sends nothing where nothing was asked for.
        given = json.loads(body) if body else {}
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"expected a JSON object: {error}") from None
    if not isinstance(given, dict):
        raise HTTPException(400, f"expected a JSON object, got {type(given).__name__}")
    found = []
    for name, kind in kinds.items():
        value = given.get(name)
        if value is not None and not isinstance(value, kind):
            raise HTTPException(400, f"{name}: expected {kind.__name__}, got {type(value).__name__}")
        found.append(value)
    return found


def checked_language(name):
    if name is None:
        return DEFAULT_LANGUAGE
    if name.lower() not in LANGUAGES:
        there = ", ".join(LANGUAGES)
        raise HTTPException(400, f"language {name!r} has no kernel in this template; there is: {there}")
    return name.lower()


def checked_env_vars(given):
    for name, value in (given or {}).items():
        if not isinstance(value, str) or not name or "=" in name or "\0" in name + value:
            raise HTTPException(400, f"env_vars: expected names without '=' and texts without NUL, got {name!r}")
    return given or {}


async def execute(request):
    code, context_id, language, env_vars = await fields(
        request, code=str, context_id=str, language=str, env_vars=dict
    )
    if code is None:
        raise HTTPException(400, "code: expected a text, got nothing")
    if context_id and language:
        raise HTTPException(400, "expected context_id or language, got both")
    checked_language(language)
    execution = Execution(code, checked_env_vars(env_vars))
    contexts = request.app.state.contexts
    context = known(request, context_id) if context_id else await contexts.default()
    context.submit(execution)
    return Events(execution)


async def create_context(request):
    language, cwd = await fields(request, language=str, cwd=str)
    contexts = request.app.state.contexts
    language = checked_language(language)
    cwd = os.path.join(contexts.cwd, cwd or "")
    if "\0" in cwd or not os.path.isdir(cwd):
        raise HTTPException(400, f"cwd: {cwd!r} is no directory")
    return JSONResponse((await contexts.create(language, os.path.normpath(cwd))).shown())


async def list_contexts(request):
    return JSONResponse([context.shown() for context in request.app.state.contexts.all()])


async def remove_context(request):
    id = known(request, request.path_params["id"]).id
    await request.app.state.contexts.remove(id)
    return Response(status_code=204)


async def restart_context(request):
    await known(request, request.path_params["id"]).restart()
    return Response(status_code=204)


async def health(_request):
    return PlainTextResponse("OK")


def known(request, id):
    context = request.app.state.contexts.get(id)
    if context is None:
        raise HTTPException(404, f"Context {id} not found")
    return context


async def busy(_request, error):
    return PlainTextResponse(str(error), status_code=429)


async def failed(_request, error):
    return PlainTextResponse(str(error), status_code=500)


def application(home):
    @contextlib.asynccontextmanager
    async def lifespan(app):
        app.state.contexts = Contexts(home)
        # Ready means that code runs at once.
        await app.state.contexts.default()
        yield
        await app.state.contexts.close()

    routes = [
        Route("/execute", execute, methods=["POST"]),
        Route("/contexts", create_context, methods=["POST"]),
        Route("/contexts", list_contexts, methods=["GET"]),
        Route("/contexts/{id}", remove_context, methods=["DELETE"]),
        Route("/contexts/{id}/restart", restart_context, methods=["POST"]),
        Route("/health", health, methods=["GET"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={TooMany: busy, StartFailed: failed})
