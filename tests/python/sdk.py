"""E2B's published Python client against one envd on a Unix socket: sdk.py SOCKET

Two small servers on loopback stand in for what is between a client and an agent: a relay from TCP to the socket, and a
control API that knows one sandbox. Prints a line for each check, `ok NAME` or `failed NAME: WHY`.
"""

import http.server
import json
import os
import socket
import sys
import tempfile
import threading
import time
import traceback

SANDBOX = {
    "templateID": "template",
    "sandboxID": "sandbox1",
    "clientID": "6532622b",
    "envdVersion": "0.6.13",
}


class ControlApi(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body=None):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        self.answer(201, SANDBOX)

    def do_DELETE(self):
        self.answer(204)

    def log_message(self, *_):
        pass


def relay(path):
    listener = socket.create_server(("127.0.0.1", 0))

    def copy(source, sink):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            # One side is gone: so is the other.
            for end in (source, sink):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def accept():
        while True:
            near, _ = listener.accept()
            far = socket.socket(socket.AF_UNIX)
            far.connect(path)
            for ends in ((near, far), (far, near)):
                threading.Thread(target=copy, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


api = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ControlApi)
threading.Thread(target=api.serve_forever, daemon=True).start()
os.environ.update(
    E2B_API_KEY="e2b_" + "0" * 40,
    E2B_API_URL=f"http://127.0.0.1:{api.server_address[1]}",
    E2B_SANDBOX_URL=f"http://127.0.0.1:{relay(sys.argv[1])}",
)

import e2b  # noqa: E402  (it reads the environment)

sandbox = e2b.Sandbox.create()
folder = tempfile.TemporaryDirectory()
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def path(name):
    return f"{folder.name}/{name}"


def raises(kind, function):
    try:
        function()
    except kind as error:
        assert type(error) is kind, f"{type(error)} instead of {kind}"
        return error
    raise AssertionError(f"no {kind.__name__}")


def eventually(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"


@check
def is_running():
    assert sandbox.is_running()


@check
def run():
    streamed = []
    done = sandbox.commands.run("echo out; echo err >&2; echo ü", on_stdout=streamed.append, envs={"A": "1"}, cwd="/tmp")
    assert (done.stdout, done.stderr, done.exit_code) == ("out\nü\n", "err\n", 0), done
    assert "".join(streamed) == done.stdout
    assert sandbox.commands.run("echo $A; pwd", envs={"A": "1"}, cwd="/tmp").stdout == "1\n/tmp\n"


@check
def run_large_output():
    done = sandbox.commands.run("head -c 3000000 /dev/zero | tr '\\0' x")
    assert done.stdout == "x" * 3_000_000


@check
def run_that_fails():
    error = raises(e2b.CommandExitException, lambda: sandbox.commands.run("echo bad >&2; exit 3"))
    assert (error.exit_code, error.stderr, error.stdout) == (3, "bad\n", "")


@check
def run_past_its_timeout():
    raises(e2b.TimeoutException, lambda: sandbox.commands.run("sleep 1000", timeout=0.5))


@check
def run_in_a_missing_folder():
    raises(e2b.InvalidArgumentException, lambda: sandbox.commands.run("true", cwd="/no/such"))


@check
def run_as_nobody_known():
    raises(e2b.AuthenticationException, lambda: sandbox.commands.run("true", user="nosuchuser"))


@check
def background_list_kill():
    handle = sandbox.commands.run("sleep 1000", background=True)
    assert [p.pid for p in sandbox.commands.list() if p.pid == handle.pid] == [handle.pid]
    assert handle.kill() is True
    error = raises(e2b.CommandExitException, handle.wait)
    assert "killed" in str(error.error), error
    assert sandbox.commands.kill(handle.pid) is False


@check
def connect_and_stdin():
    first = sandbox.commands.run("cat", background=True, stdin=True)
    second = sandbox.commands.connect(first.pid)
    sandbox.commands.send_stdin(first.pid, "hello\n")
    second.send_stdin("again\n")
    sandbox.commands.close_stdin(first.pid)
    for handle in (first, second):
        done = handle.wait()
        assert (done.stdout, done.exit_code) == ("hello\nagain\n", 0), done
    raises(e2b.NotFoundException, lambda: sandbox.commands.connect(4_000_000))


@check
def stream_input():
    handle = sandbox.commands.run("cat", background=True, stdin=True)
    sandbox.commands.stream_input(handle.pid, iter([b"one ", b"two"]))
    sandbox.commands.close_stdin(handle.pid)
    assert handle.wait().stdout == "one two"


@check
def files():
    data = bytes(range(256)) * 5000
    written = sandbox.files.write(path("deep/er"), data)
    assert (written.name, written.path) == ("er", path("deep/er")), written
    assert bytes(sandbox.files.read(path("deep/er"), format="bytes")) == data
    streamed = b"".join(sandbox.files.read(path("deep/er"), format="stream"))
    assert streamed == data
    sandbox.files.write(path("text"), "ü")
    assert sandbox.files.read(path("text")) == "ü"
    sandbox.files.write_files([{"path": path("m/1"), "data": "a"}, {"path": path("m/2"), "data": "b"}])
    assert [e.name for e in sandbox.files.list(path("m"))] == ["1", "2"]
    info = sandbox.files.get_info(path("text"))
    assert (info.name, info.size, info.type) == ("text", 2, e2b.FileType.FILE), info


@check
def folders():
    assert sandbox.files.make_dir(path("made/below")) is True
    assert sandbox.files.make_dir(path("made/below")) is False
    assert sandbox.files.rename(path("made"), path("moved")).path == path("moved")
    assert sandbox.files.exists(path("moved/below")) and not sandbox.files.exists(path("made"))
    entries = sandbox.files.list(folder.name, depth=5)
    assert path("moved/below") in [e.path for e in entries]
    sandbox.files.remove(path("moved"))
    assert not sandbox.files.exists(path("moved"))


@check
def missing_files():
    missing = path("missing")
    for call in (
        lambda: sandbox.files.read(missing),
        lambda: sandbox.files.list(missing),
        lambda: sandbox.files.get_info(missing),
        lambda: sandbox.files.rename(missing, path("other")),
    ):
        raises(e2b.FileNotFoundException, call)


@check
def watch():
    sandbox.files.make_dir(path("watched/sub"))
    handle = sandbox.files.watch_dir(path("watched"), recursive=True)
    sandbox.files.write(path("watched/sub/new"), "x")
    seen = []

    def arrived():
        seen.extend(handle.get_new_events())
        return any(e.name == "sub/new" and e.type == e2b.FilesystemEventType.CREATE for e in seen)

    eventually(arrived)
    handle.stop()
    raises(e2b.FileNotFoundException, lambda: sandbox.files.watch_dir(path("missing")))


@check
def pty():
    handle = sandbox.pty.create(size=e2b.PtySize(rows=24, cols=80))
    output = bytearray()
    sandbox.pty.resize(handle.pid, e2b.PtySize(rows=33, cols=101))
    sandbox.pty.send_stdin(handle.pid, b"stty size; printf 'a\\377b\\n'; exit 5\n")
    error = raises(
        e2b.CommandExitException, lambda: handle.wait(on_pty=lambda data: output.extend(data))
    )
    assert error.exit_code == 5
    assert b"33 101" in output, bytes(output)
    assert b"a\xffb" in output, bytes(output)


@check
def pty_kill():
    handle = sandbox.pty.create(size=e2b.PtySize(rows=24, cols=80))
    assert sandbox.pty.kill(handle.pid) is True


for function in CHECKS:
    try:
        function()
        print(f"ok {function.__name__}", flush=True)
    except Exception as error:  # every check is told, whatever the others did
        traceback.print_exc()
        print(f"failed {function.__name__}: {type(error).__name__}: {error}".replace("\n", " "), flush=True)
sandbox.kill()
folder.cleanup()
