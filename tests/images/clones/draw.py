"""Everything here that must be its own in each clone, as one line of JSON: what the kernel and libraries draw in a process
that begins now, and who the machine says it is."""

import json
import os
import secrets
import socket
import subprocess
import uuid


def text(path):
    with open(path) as file:
        return file.read().strip()


def said(*command):
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def at_random():
    """The 16 bytes from which the kernel lets a program make its stack canary (getauxval(3), AT_RANDOM)."""
    with open("/proc/self/auxv", "rb") as file:
        words = memoryview(file.read()).cast("N")
    address = dict(zip(words[::2], words[1::2]))[25]
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(16).hex()


def device():
    with open("/dev/urandom", "rb", buffering=0) as file:
        return file.read(16).hex()


drawn = {
    "getrandom": os.getrandom(16).hex(),
    "/dev/urandom": device(),
    "/proc/sys/kernel/random/uuid": text("/proc/sys/kernel/random/uuid"),
    "os.urandom": os.urandom(16).hex(),
    "secrets": secrets.token_hex(16),
    "uuid.uuid4": str(uuid.uuid4()),
    "uuidgen": said("uuidgen"),
    "openssl": said("openssl", "rand", "-hex", "16"),
    "AT_RANDOM": at_random(),
    "boot_id": text("/proc/sys/kernel/random/boot_id"),
    "hostname": socket.gethostname(),
}
# The image has none, as Debian's images are made: a clone gets one.
if os.path.exists("/etc/machine-id"):
    drawn["machine-id"] = text("/etc/machine-id")
for name in os.listdir("/sys/class/net"):
    if (mac := text(f"/sys/class/net/{name}/address")) != "00:00:00:00:00:00":
        drawn[f"MAC of {name}"] = mac
print(json.dumps(drawn))
