"""The example clients of the gateway's tunnel, against a real sandbox: tunnel.py NODE. Prints `ok CASE` for each."""

import concurrent.futures
import hashlib
import os
import pathlib
import socket
import subprocess
import sys

from e2b import Sandbox

CASES = [f"{client} {case}" for client in ("python", "javascript")
         for case in ("many at once", "half-close", "refused", "the sandbox ends")]
EXAMPLES = pathlib.Path(__file__).parents[1] / "examples" / "tunnel"

# Port 7000 sends back what it gets, when it has got all of it; 7001 speaks and ends first, and tells port 7002 what it then heard.
SERVER = """
import socketserver, threading, queue
heard = queue.Queue()
class Back(socketserver.BaseRequestHandler):
    def handle(self):
        parts = []
        while part := self.request.recv(65536):
            parts.append(part)
        self.request.sendall(b"".join(parts))
class First(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"bye")
        self.request.shutdown(1)
        parts = []
        while part := self.request.recv(65536):
            parts.append(part)
        heard.put(b"".join(parts))
class Tell(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(heard.get())
socketserver.ThreadingTCPServer.request_queue_size = 64
servers = [socketserver.ThreadingTCPServer(("127.0.0.1", port), handler)
           for port, handler in ((7000, Back), (7001, First), (7002, Tell))]
for server in servers:
    threading.Thread(target=server.serve_forever).start()
print("listening", flush=True)
"""


def talk(port, said):
    """What is answered to that and its end."""
    with socket.create_connection(("127.0.0.1", port), timeout=300) as connection:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        return everything(connection)


def everything(connection):
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


class Client:
    """An example client as a process, for one port."""

    def __init__(self, program, sandbox, port):
        command = [*program, sandbox, str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        assert line.startswith("listening on 127.0.0.1:"), (line, self.process.stderr.read() if not line else "")
        self.port = int(line.rsplit(":", 1)[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def check(name, program, sandbox):
    with Client(program, sandbox, 7000) as client, concurrent.futures.ThreadPoolExecutor(12) as pool:
        sent = [os.urandom(600_000 + 1000 * number) for number in range(12)]
        back = pool.map(lambda said: talk(client.port, said), sent)
        for said, heard in zip(sent, back, strict=True):
            assert hashlib.sha256(said).digest() == hashlib.sha256(heard).digest(), (len(said), len(heard))
    print(f"ok {name} many at once", flush=True)

    with Client(program, sandbox, 7001) as first, Client(program, sandbox, 7002) as tell:
        with socket.create_connection(("127.0.0.1", first.port), timeout=300) as connection:
            assert everything(connection) == b"bye"
            connection.sendall(b"after your end")
            connection.shutdown(socket.SHUT_WR)
            assert talk(tell.port, b"") == b"after your end"
    print(f"ok {name} half-close", flush=True)

    with Client(program, sandbox, 7999) as client:
        try:
            heard = talk(client.port, b"")
        except ConnectionError:
            heard = b""
        assert heard == b"", heard
        assert "ERR 502 the sandbox is running but port is not open" in client.process.stderr.readline()
    print(f"ok {name} refused", flush=True)


def main(node):
    programs = {"python": [sys.executable, EXAMPLES / "tunnel.py"], "javascript": [node, EXAMPLES / "tunnel.mjs"]}
    sandbox = Sandbox.create(timeout=1200)
    try:
        sandbox.files.write("/tmp/server.py", SERVER)
        server = sandbox.commands.run("python3 /tmp/server.py", background=True, timeout=0)
        assert next(iter(server))[0] == "listening\n"
        for name, program in programs.items():
            check(name, program, sandbox.sandbox_id)
        clients = {name: Client(program, sandbox.sandbox_id, 7000) for name, program in programs.items()}
    finally:
        sandbox.kill()
    for name, client in clients.items():
        with client:
            errors = client.process.communicate(timeout=300)[1]
            assert "the tunnel is closed: 4410 the sandbox has ended" in errors, errors
            assert client.process.returncode == 1
            print(f"ok {name} the sandbox ends", flush=True)


if "--checks" in sys.argv:
    print("\n".join(CASES))
else:
    main(sys.argv[1])
