#!/usr/bin/env python3
"""Stands in for host-shim: the same folder, lock, line of readiness and api.sock, with a `sleep` for a VMM.

What it does is scripted by the sandbox's environment: FAKE_START (ready, fail, silent, crash), FAKE_STOP (ready, deaf) and
FAKE_STATE, more fields of its state in JSON. `doctor` reports what $FAKE_KVM says.
"""
import argparse, ctypes, fcntl, json, os, signal, socket, subprocess, sys, threading

parser = argparse.ArgumentParser()
parser.add_argument("verb")
parser.add_argument("--spec")
parser.add_argument("--dir")
parser.add_argument("--data-dir")
parser.add_argument("--new-session", action="store_true")
parser.add_argument("--quiet", action="store_true")
parser.add_argument("--json", action="store_true")
args = parser.parse_args()

if args.verb == "doctor":
    kvm = {"name": "kvm", "status": os.environ["FAKE_KVM"], "found": "says the script"}
    print(json.dumps({"ready": True, "checks": [{"name": "qemu", "status": "ok", "found": "x"}, kvm]}))
    sys.exit(0)

assert args.new_session
os.setsid()
with open(args.spec) as file:
    spec = json.load(file)
script = spec["env"]
os.makedirs(args.dir, mode=0o700, exist_ok=True)
lock = open(os.path.join(args.dir, "lock"), "a+")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit("host-shim: the folder belongs to another")
if not os.path.exists(args.spec):
    sys.exit("host-shim: the spec is gone")


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


vmm = subprocess.Popen(["sleep", "1000000"], preexec_fn=die_with_parent, stdout=subprocess.DEVNULL)


def state(phase, **more):
    fresh = os.path.join(args.dir, "state.json.new")
    with open(fresh, "w") as file:
        json.dump({"schema_version": 1, "id": spec["id"], "phase": phase, "shim_pid": os.getpid(), "vmm_pid": vmm.pid, **more}, file)
    os.rename(fresh, os.path.join(args.dir, "state.json"))


def end(code):
    vmm.kill()
    vmm.wait()
    if os.path.exists(os.path.join(args.dir, "api.sock")):
        os.remove(os.path.join(args.dir, "api.sock"))
    os._exit(code)


signal.signal(signal.SIGTERM, lambda *_: None if script.get("FAKE_STOP") == "deaf" else end(1))
state("booting")
start = script.get("FAKE_START", "ready")
if start == "fail":
    print("host-shim: the sandbox did not start: the guest's kernel gave up\n--- end of the console ---\nsecret", file=sys.stderr)
    end(1)
if start == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
while start == "silent":
    signal.pause()

api = socket.socket(socket.AF_UNIX)
api.bind(os.path.join(args.dir, "api.sock"))
api.listen()


def serve():
    while True:
        connection, _ = api.accept()
        request = b""
        while not request.endswith(b'{"grace_ms":0}'):
            request += connection.recv(4096)
        assert request.startswith(b"POST /stop HTTP/1.1\r\n"), request
        if script.get("FAKE_STOP") == "deaf":
            continue
        body = b'{"stopping":true}'
        connection.sendall(b"HTTP/1.1 202 Accepted\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        connection.close()
        end(0)


threading.Thread(target=serve, daemon=True).start()
running = {"agent_version": "0.6.13", **json.loads(script.get("FAKE_STATE", "{}"))}
state("running", **running)
print(json.dumps({"ready": True, "dir": args.dir, "total_ms": 1.0, **running}), flush=True)
vmm.wait()
state("ended", end={"reason": "guest_ended", "message": "the VMM is gone"})
end(1)
