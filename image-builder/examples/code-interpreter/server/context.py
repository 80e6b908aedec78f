"""Contexts: each a kernel with its state, and the executions that wait for it in order."""

import asyncio
import logging
import uuid

from kernel import Kernel, StartFailed

# Kernels at once: each takes some 60 MiB.
MAX_CONTEXTS = 32

# Executions of one context that wait for their turn.
MAX_QUEUE = 64

DEFAULT_LANGUAGE = "python"
# The kernel of each, a folder of `kernels/`.
LANGUAGES = {"python": "ipython"}

log = logging.getLogger("uvicorn.error")


class TooMany(Exception):
    pass


class Context:
    def __init__(self, language, cwd):
        self.id = str(uuid.uuid4())
        self.language = language
        self.cwd = cwd
        self._kernel = None
        self._closed = False
        self._starting = asyncio.Lock()
        self._turn = asyncio.Lock()
        self._tasks = set()

    def shown(self):
        return {"id": self.id, "language": self.language, "cwd": self.cwd}

    async def alive(self):
        """Its kernel; a new one, without state, if there is none or it has died."""
        async with self._starting:
            if self._closed:
                raise StartFailed("the context was removed")
            if self._kernel is None or self._kernel.died.is_set():
                if self._kernel:
                    await self._kernel.close()
                    self._kernel = None
                self._kernel = await Kernel.start(LANGUAGES[self.language], self.cwd)
            return self._kernel

    def submit(self, execution):
        """Runs it when those before it have ended."""
        if len(self._tasks) >= MAX_QUEUE:
            raise TooMany(f"{MAX_QUEUE} executions wait for context {self.id}: wait for one of them")
        # A task of its own: a client that goes away ends neither the interrupt nor the turn's order.
        task = asyncio.create_task(self._run(execution))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, execution):
        try:
            async with self._turn:
                if not execution.abandoned.is_set():
                    await (await self.alive()).run(execution)
        except StartFailed as error:
            execution.fail("KernelNotStarted", str(error))
        except Exception as error:
            # A fault of this server: its client hears of it too.
            log.exception("an execution failed")
            execution.fail("InterpreterError", repr(error))

    async def restart(self):
        """A new kernel; what runs in the old one is lost."""
        if self._kernel:
            await self._kernel.kill()
        await self.alive()

    async def close(self):
        self._closed = True
        if self._kernel:
            await self._kernel.kill()
        async with self._starting:
            if self._kernel:
                await self._kernel.close()
                self._kernel = None


class Contexts:
    def __init__(self, cwd):
        self.cwd = cwd
        self._all = {}
        self._default = None
        self._choosing = asyncio.Lock()

    def get(self, id):
        return self._all.get(id)

    def all(self):
        return list(self._all.values())

    async def create(self, language, cwd):
        if len(self._all) >= MAX_CONTEXTS:
            raise TooMany(f"there are {MAX_CONTEXTS} contexts: remove one")
        context = Context(language, cwd)
        self._all[context.id] = context
        try:
            await context.alive()
        except BaseException:
            self._all.pop(context.id, None)
            raise
        return context

    async def default(self):
        """The context of executions that name none; made anew if it was removed."""
        async with self._choosing:
            if self._default is None or self._default.id not in self._all:
                self._default = await self.create(DEFAULT_LANGUAGE, self.cwd)
            return self._default

    async def remove(self, id):
        context = self._all.pop(id, None)
        if context:
            await context.close()
        return context is not None

    async def close(self):
        await asyncio.gather(*(self.remove(id) for id in list(self._all)))
