"""Stands in for QEMU in PATH: becomes QEMU, behind a relay of its monitor that kills it at a command.

relay.py REAL [ARGUMENTS OF QEMU]

The folder $TIFFIN_RELAY has the commands that were seen (`commands`, a name a line), and says in `kill` at which one QEMU is
killed: "before stop" (QEMU never reads it) or "after stop" (nobody hears of QEMU's answer).
"""

import json
import os
import selectors
import signal
import socket
import sys

MONITOR = 6


def wanted(folder):
    try:
        with open(os.path.join(folder, "kill")) as file:
            return file.read().split()
    except FileNotFoundError:
        return []


def relay(folder, near, far, qemu):
    """Passes lines and descriptors on, both ways, until one end is gone."""
    selector = selectors.DefaultSelector()
    for source, sink in ((near, far), (far, near)):
        selector.register(source, selectors.EVENT_READ, sink)
    rest = b""
    dying = False
    while True:
        for key, _ in selector.select():
            source, sink = key.fileobj, key.data
            data, fds, _, _ = socket.recv_fds(source, 1 << 16, 8)
            if not data:
                return
            if source is far:
                if dying:
                    os.kill(qemu, signal.SIGKILL)
                    return
                sink.sendall(data)
                continue
            # The shim waits for each answer: a read has one command at most.
            rest += data
            while b"\n" in rest:
                line, rest = rest.split(b"\n", 1)
                command = json.loads(line)["execute"]
                with open(os.path.join(folder, "commands"), "a") as file:
                    file.write(command + "\n")
                when = wanted(folder)
                if when == ["before", command]:
                    os.kill(qemu, signal.SIGKILL)
                    return
                dying = dying or when == ["after", command]
            socket.send_fds(sink, [data], fds) if fds else sink.sendall(data)
            for fd in fds:
                os.close(fd)


def main():
    real, arguments = sys.argv[1], sys.argv[2:]
    folder = os.environ.get("TIFFIN_RELAY")
    if folder and "chardev=monitor,mode=control" in arguments:
        near = socket.socket(fileno=os.dup(MONITOR))
        far, qemus = socket.socketpair()
        qemu = os.getpid()
        if os.fork() == 0:
            # Nothing but the two sockets: whoever waits for the end of QEMU's others must not wait for this.
            kept = {near.fileno(), far.fileno()}
            for fd in range(256):
                if fd not in kept:
                    try:
                        os.close(fd)
                    except OSError:
                        pass
            try:
                relay(folder, near, far, qemu)
            except OSError:
                pass
            os._exit(0)
        near.close()
        far.close()
        os.dup2(qemus.fileno(), MONITOR)
    os.execv(real, [real, *arguments])


main()
