"""IPython's kernel, with environment variables for one execution, and without losing output."""

import os
import sys

import zmq
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp
from ipykernel.zmqshell import ZMQInteractiveShell


class Shell(ZMQInteractiveShell):
    def ask_exit(self):
        """`exit()` is for a person at a terminal; here a kernel ends with its context."""


class Kernel(IPythonKernel):
    shell_class = Shell

    async def execute_request(self, stream, ident, parent):
        env_vars = parent["metadata"].get("env_vars") or {}
        before = {name: os.environ.get(name) for name in env_vars}
        os.environ.update(env_vars)
        try:
            await super().execute_request(stream, ident, parent)
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


class App(IPKernelApp):
    kernel_class = Kernel

    def init_iopub(self, context):
        # A reader that is late makes the kernel wait. By default the socket would drop messages, the end among them.
        context.setsockopt(zmq.XPUB_NODROP, 1)
        super().init_iopub(context)


# Code imports from the folder that it works in, not from this one.
sys.path[0] = ""
App.launch_instance()
