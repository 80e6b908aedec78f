"""One kernel process: started, given code, interrupted, killed."""

import asyncio
import contextlib
import os
import pathlib
import signal
import tempfile
import uuid

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager

# Until a kernel answers for the first time. Emulated processors are slow.
START_SECONDS = 180

# Until code that was interrupted has ended. Code that resists loses its kernel.
INTERRUPT_SECONDS = 20

# How long what a dead kernel has said may be on its way.
LAST_WORDS_SECONDS = 0.5

SPECS = KernelSpecManager(kernel_dirs=[str(pathlib.Path(__file__).parent.parent / "kernels")])

# Sockets of the file system: a tenant's own ports stay free, and only its user can connect. Short, for their addresses.
SOCKETS = tempfile.TemporaryDirectory(prefix="kernels-")


class StartFailed(Exception):
    pass


class Kernel:
    def __init__(self, manager, client):
        self._manager = manager
        self._client = client
        self._execution = None
        self._process = manager.provisioner.process
        self._pidfd = os.pidfd_open(self._process.pid)
        self.died = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._pidfd, self._has_died)
        self._readers = [asyncio.create_task(self._read_output()), asyncio.create_task(self._read_replies())]

    @classmethod
    async def start(cls, name, cwd):
        connection = f"{SOCKETS.name}/{uuid.uuid4().hex[:12]}"
        manager = AsyncKernelManager(
            kernel_name=name, kernel_spec_manager=SPECS, transport="ipc", connection_file=f"{connection}.json"
        )
        try:
            await manager.start_kernel(cwd=cwd)
            client = manager.client()
            client.start_channels(stdin=False, hb=False, control=False)
            await client.wait_for_ready(timeout=START_SECONDS)
            return cls(manager, client)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(Exception):
                await manager.shutdown_kernel(now=True)
            raise StartFailed(f"the kernel did not start: {error}") from error

    async def run(self, execution):
        """Runs code to its end. Returns when the kernel is free for the next, or dead."""
        content = {
            "code": execution.code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": False,
            # Otherwise the kernel refuses what comes right after an error.
            "stop_on_error": False,
        }
        session = self._client.session
        request = session.msg("execute_request", content, metadata={"env_vars": execution.env_vars})
        execution.request = request["header"]["msg_id"]
        idle = asyncio.Event()
        self._execution = (execution, idle)
        try:
            self._client.shell_channel.send(request)
            await first(idle, self.died, execution.abandoned)
            if not idle.is_set() and not self.died.is_set():
                await self._interrupt(idle)
            if self.died.is_set():
                # What was said before the end comes first.
                await asyncio.sleep(LAST_WORDS_SECONDS)
                execution.lose(f"the kernel ended ({self._status()}) while it ran the code; its state is lost")
        finally:
            self._execution = None

    async def _interrupt(self, idle):
        with contextlib.suppress(asyncio.TimeoutError, ProcessLookupError):
            await self._manager.interrupt_kernel()
            await asyncio.wait_for(first(idle, self.died), INTERRUPT_SECONDS)
        if not idle.is_set():
            await self.kill()

    async def kill(self):
        """Ends the process; what it runs is lost."""
        with contextlib.suppress(ProcessLookupError):
            await self._manager.signal_kernel(signal.SIGKILL)
        await self.died.wait()

    async def close(self):
        """Ends the process and frees what is here of it."""
        await self.kill()
        for reader in self._readers:
            reader.cancel()
        self._client.stop_channels()
        # Reaps it, and removes its files.
        await self._manager.shutdown_kernel(now=True)

    def _has_died(self):
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.died.set()

    def _status(self):
        code = self._process.poll()
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"

    async def _read_output(self):
        while True:
            message = await received(self._client.get_iopub_msg)
            # What an earlier execution has left running speaks to nobody.
            if message is None or self._execution is None:
                continue
            execution, idle = self._execution
            parent = message["parent_header"]
            if isinstance(parent, dict) and parent.get("msg_id") == execution.request:
                execution.take(message)
                if execution.ended.is_set():
                    idle.set()

    async def _read_replies(self):
        # Output says all; replies that nobody takes would fill the socket.
        while True:
            await received(self._client.get_shell_msg)


async def received(get):
    try:
        return await get(timeout=None)
    except (ValueError, KeyError, TypeError):
        # The code shares the kernel's socket, and may write rubbish to it.
        return None


async def first(*events):
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
