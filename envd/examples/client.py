#!/usr/bin/env python3
"""A host of envd: client.py CONTROL AGENT STEP..., or, for curl, client.py relay AGENT SOCKET. CONTROL is where envd
dials us: unix:PATH or vsock:PORT. AGENT is its client door: unix:PATH, hybrid:PATH (`CONNECT 49983` first), vsock:CID.
Steps: run=COMMAND put=PATH (standard input) get=PATH resume, or a control request: freeze, configure=JSON ..."""
import base64, http.client, json, os, socket, sys, threading, time
FAMILY = {"unix": socket.AF_UNIX, "hybrid": socket.AF_UNIX, "vsock": socket.AF_VSOCK}
def listen(address):
    kind, where = address.split(":", 1)
    if kind == "unix" and os.path.exists(where): os.unlink(where)
    return socket.create_server((socket.VMADDR_CID_ANY, int(where)) if kind == "vsock" else where, family=FAMILY[kind])
def dial(address):
    kind, where = address.split(":", 1)
    stream = socket.socket(FAMILY[kind])
    stream.connect((int(where), 49983) if kind == "vsock" else where)
    if kind == "hybrid":
        stream.sendall(b"CONNECT 49983\n")
        while (byte := stream.recv(1)) != b"\n": byte or sys.exit("nobody listens in the guest")
    return stream
class Host:
    def __init__(self, address):
        self.socket, _ = listen(address).accept()
        self.stream = self.socket.makefile("rw")
        self.generation = (hello := self.next("hello"))["generation"]
        print("hello", json.dumps(hello["hello"]))
    def next(self, kind, closed="envd closed the connection"):  # log lines and events come in between
        found = (message for message in map(json.loads, self.stream) if kind in message)
        return next(found, None) or sys.exit(closed)
    def ask(self, name, **request):
        print(json.dumps({"generation": self.generation, "id": 1, name: request}), file=self.stream, flush=True)
        answer = self.next("response", *[None] * (name == "shutdown"))["response"]  # it may go with its machine
        sys.exit(f"{name}: {answer['error']}") if "error" in answer else print(name, json.dumps(answer))
def call(address, method, path, body=None, kind="application/octet-stream"):
    connection = http.client.HTTPConnection("sandbox")
    connection.sock = dial(address)
    connection.request(method, path, body, {"content-type": kind})
    return answer if (answer := connection.getresponse()).status < 300 else sys.exit(answer.read().decode())
def run(address, command):  # a stream of envelopes: flags, length, JSON
    body = json.dumps({"process": {"cmd": "/bin/sh", "args": ["-c", command]}}).encode()
    body = b"\0" + len(body).to_bytes(4, "big") + body
    answer = call(address, "POST", "/process.Process/Start", body, "application/connect+json")
    while head := answer.read(5):
        message = json.loads(answer.read(int.from_bytes(head[1:], "big")))
        output = b"".join(map(base64.b64decode, message.get("event", {}).get("data", {}).values()))
        print(output.decode() or f"{json.dumps(message)}\n", end="")
def copy(source, sink):
    while data := source.recv(65536): sink.sendall(data)
    sink.shutdown(socket.SHUT_WR)
control, address, *steps = sys.argv[1:]
for near, _ in iter(listen(f"unix:{steps[0]}").accept, None) if control == "relay" else ():
    for ends in [(near, far := dial(address)), (far, near)]: threading.Thread(target=copy, args=ends).start()
host = Host(control)
for name, _, value in (step.partition("=") for step in steps):
    if name == "run": run(address, value)
    elif name == "put": print(call(address, "POST", f"/files?path={value}", sys.stdin.buffer.read()).read().decode())
    elif name == "get": print(call(address, "GET", f"/files?path={value}").read().decode(), end="")
    elif name == "resume":  # the same sandbox goes on: a new generation, the time, and random bytes
        host.generation, seed = host.generation + 1, base64.b64encode(os.urandom(32)).decode()
        host.ask(name, kind="KIND_SAME", generation=host.generation, unixTimeNs=time.time_ns(), seed=seed)
    else: host.ask(name, **json.loads(value or "{}"))
if name != "shutdown": host.socket.shutdown(socket.SHUT_WR), host.stream.read()  # unread bytes lose a close
