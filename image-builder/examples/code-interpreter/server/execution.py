"""One run of code: what it says waits here for its client."""

import asyncio
from collections import deque

import messages

# What may wait for a client that reads slowly. More than that ends the execution: the sandbox's memory is small.
MAX_WAITING_BYTES = 64 << 20


class Execution:
    def __init__(self, code, env_vars):
        self.code = code
        self.env_vars = env_vars
        # The id of the request that the kernel got.
        self.request = None
        # Nobody reads it any more: it is to be interrupted.
        self.abandoned = asyncio.Event()
        self.ended = asyncio.Event()
        self._arrived = asyncio.Event()
        self._lines = deque()
        self._waiting = 0

    def take(self, message):
        """Takes a message of the kernel that is about this execution."""
        try:
            if messages.is_idle(message):
                self.end()
            elif event := messages.event(message):
                self._say(event)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # The code shares the kernel's socket, and may make messages of its own.
            self._say(messages.error("UnreadableOutput", f"output that no client can read: {error!r}"))

    def fail(self, name, value):
        """Ends it with an error that is not the code's own."""
        self._say(messages.error(name, value))
        self.end()

    def lose(self, why):
        """Ends it because its kernel is gone."""
        # The clients pass over `unexpected_end_of_execution`: without the error, it would look like a success to them.
        self._say(messages.error("UnexpectedEndOfExecution", why))
        self.end("unexpected_end_of_execution")

    def end(self, kind="end_of_execution"):
        self._say({"type": kind})
        self.ended.set()

    def _say(self, event):
        if self.ended.is_set() or self.abandoned.is_set():
            return
        line = messages.line(event)
        if self._waiting + len(line) > MAX_WAITING_BYTES:
            why = f"more than {MAX_WAITING_BYTES >> 20} MiB of output waited for the client: the code was interrupted"
            self._lines.append(messages.line(messages.error("OutputOverflow", why)))
            self._lines.append(messages.line({"type": "end_of_execution"}))
            self.abandoned.set()
        else:
            self._lines.append(line)
            self._waiting += len(line)
        self._arrived.set()

    async def lines(self):
        """Its events, each as soon as it is there."""
        while True:
            while self._lines:
                line = self._lines.popleft()
                self._waiting -= len(line)
                yield line
            if self.ended.is_set() or self.abandoned.is_set():
                return
            self._arrived.clear()
            await self._arrived.wait()
