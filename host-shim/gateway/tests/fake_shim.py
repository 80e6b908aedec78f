#!/usr/bin/env python3
"""Stands in for host-shim: the same folder, lock, line of readiness and api.sock, with a `sleep` for a VMM.

What it does is scripted by the sandbox's environment. FAKE_START and FAKE_RESUME (ready, fail, silent, crash; wait: until the
folder has a file `go`; used: crash when the snapshot is used up), FAKE_STOP (ready, deaf), FAKE_STATE, more fields of its state
in JSON, and for each call FAKE_PAUSE, FAKE_SNAPSHOT, FAKE_FORK and FAKE_CONFIGURE (ready, fail, full, wait; crash: before
anything is done; done: crash when all of it is done). `doctor` reports what $FAKE_KVM says.
"""
import argparse, ctypes, fcntl, json, os, shutil, signal, socket, subprocess, sys, threading, time

parser = argparse.ArgumentParser()
parser.add_argument("verb")
parser.add_argument("--spec")
parser.add_argument("--dir")
parser.add_argument("--data-dir")
parser.add_argument("--new-session", action="store_true")
parser.add_argument("--resume", action="store_true")
parser.add_argument("--park", action="store_true")
parser.add_argument("--quiet", action="store_true")
parser.add_argument("--json", action="store_true")
args = parser.parse_args()

if args.verb == "doctor":
    kvm = {"name": "kvm", "status": os.environ["FAKE_KVM"], "found": "says the script"}
    print(json.dumps({"ready": True, "checks": [{"name": "qemu", "status": "ok", "found": "x"}, kvm]}))
    sys.exit(0)


def path(*names):
    return os.path.join(args.dir, *names)


assert args.new_session
os.setsid()
spec_file = path("spec.json") if args.resume else args.spec
with open(spec_file) as file:
    spec = json.load(file)
script = spec["env"]
os.makedirs(args.dir, mode=0o700, exist_ok=True)
lock = open(path("lock"), "a+")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit("host-shim: the folder belongs to another")
if not os.path.exists(spec_file):
    sys.exit("host-shim: the spec is gone")
if os.path.exists(path("api.sock")):
    os.remove(path("api.sock"))


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


vmm = subprocess.Popen(["sleep", "1000000"], preexec_fn=die_with_parent, stdout=subprocess.DEVNULL)
now = {}
running = {
    "agent_version": "0.6.13",
    "start": "resumed" if args.resume else "cloned" if "snapshot" in spec else "booted",
    **json.loads(script.get("FAKE_STATE", "{}")),
}


def state(phase, **more):
    now.clear()
    now.update({"schema_version": 1, "id": spec["id"], "phase": phase, "shim_pid": os.getpid(), "vmm_pid": vmm.pid, **more})
    with open(path("state.json.new"), "w") as file:
        json.dump(now, file)
    os.rename(path("state.json.new"), path("state.json"))


ending = threading.Event()


def end(code):
    ending.set()
    vmm.kill()
    vmm.wait()
    if os.path.exists(path("api.sock")):
        os.remove(path("api.sock"))
    os._exit(code)


def crash():
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def wait():
    open(path("waits"), "w").close()
    while not os.path.exists(path("go")):
        time.sleep(0.005)


def begin(word):
    """The part of a script that comes before anything is done."""
    if word == "fail":
        print("host-shim: the sandbox did not start: the guest's kernel gave up\n--- end of the console ---\nsecret", file=sys.stderr)
        end(1)
    if word == "crash":
        crash()
    if word == "wait":
        wait()
    while word == "silent":
        signal.pause()


signal.signal(signal.SIGTERM, lambda *_: None if script.get("FAKE_STOP") == "deaf" else end(1))
state("booting")
if args.resume:
    assert os.path.exists(path("snapshot", "manifest.json"))
    begin(script.get("FAKE_RESUME"))
    shutil.rmtree(path("snapshot"))
    if script.get("FAKE_RESUME") == "used":
        crash()
else:
    begin(script.get("FAKE_START"))


class Refused(Exception):
    pass


def pause(_):
    if now["phase"] != "running":
        raise Refused(409, "it is " + now["phase"])
    state("pausing")
    os.mkdir(path("snapshot.new"))
    for name in ("manifest.json", "ram"):
        with open(path("snapshot.new", name), "w") as file:
            file.write("x" * 10000)
    os.rename(path("snapshot.new"), path("snapshot"))
    return {"stopped_ms": 1.0}


def snapshot(request):
    fresh = request["path"] + ".new"
    os.mkdir(fresh)
    shutil.copy(os.path.join(spec["template"], "template.json"), fresh)
    os.link(os.path.join(spec["template"], "rootfs.ext4"), os.path.join(fresh, "rootfs.ext4"))
    with open(os.path.join(fresh, "ram"), "w") as file:
        file.write("x" * 10000)
    os.rename(fresh, request["path"])
    return {"stopped_ms": 1.0}


def fork(request):
    os.mkdir(request["path"])
    left_out = ("id", "hostname", "access_token", "labels")
    return {"spec": {**{name: value for name, value in spec.items() if name not in left_out}, "snapshot": request["path"]}}


def configure(request):
    if now["phase"] != "parked":
        raise Refused(409, "it is " + now["phase"])
    script.update(request.pop("env", {}))
    spec.update(request)
    with open(path("spec.json"), "w") as file:
        json.dump(spec, file)
    state("running", **running)
    return now


CALLS = {"/pause": pause, "/snapshot": snapshot, "/fork": fork, "/configure": configure}
one_at_a_time = threading.Lock()


def call(name, request):
    if name == "/info":
        return 200, now
    if name == "/stop":
        assert request == {"grace_ms": 0}, request
        if script.get("FAKE_STOP") == "deaf":
            threading.Event().wait()
        return 202, {"stopping": True}
    with one_at_a_time:
        word = request.get("env", script).get("FAKE_" + name[1:].upper(), "ready")
        if word == "crash":
            crash()
        if word == "wait":
            wait()
        if word in ("fail", "full"):
            return (507 if word == "full" else 500), {"message": "it did not work: the script says so"}
        try:
            done = CALLS[name](request)
        except Refused as refused:
            return refused.args[0], {"message": refused.args[1]}
        if word == "done":
            crash()
        return 200, done


def serve(connection):
    head = b""
    while b"\r\n\r\n" not in head:
        chunk = connection.recv(4096)
        if not chunk:
            return
        head += chunk
    head, body = head.split(b"\r\n\r\n", 1)
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while len(body) < int(lengths[0] if lengths else 0):
        body += connection.recv(4096)
    name = head.split()[1].decode()
    status, answer = call(name, json.loads(body or b"{}"))
    text = json.dumps(answer).encode()
    try:
        connection.sendall(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s" % (status, len(text), text))
    except BrokenPipeError:
        pass  # Its caller was killed, and what it asked for is done all the same.
    connection.close()
    if name == "/stop":
        end(0)
    if name == "/pause" and status == 200:
        state("paused")
        end(3)


def accept():
    while True:
        connection, _ = api.accept()
        threading.Thread(target=serve, args=[connection], daemon=True).start()


api = socket.socket(socket.AF_UNIX)
api.bind(path("api.sock"))
api.listen()
state("parked" if args.park else "running", **running)
threading.Thread(target=accept, daemon=True).start()
try:
    print(json.dumps({"ready": True, "dir": args.dir, "total_ms": 1.0, **running}), flush=True)
except BrokenPipeError:
    pass  # Its gateway was killed: state.json says the same.
vmm.wait()
if ending.is_set():
    threading.Event().wait()
with one_at_a_time:
    state("ended", end={"reason": "guest_ended", "message": "the VMM is gone"})
    end(1)
