#!/usr/bin/env python3
"""What a create through the gateway costs, beside `host-shim start` on the same template in the same minutes.

`make bench-creates`. Every figure is a median of CREATE_ROUNDS rounds (default 11), in which the yardstick takes turns with what
is measured. The published client makes the creates; TIFFIN_BIN, TIFFIN_KERNEL, TIFFIN_GUEST_IMAGE and TIFFIN_E2E_DATA say with
what. A bound that was missed is told, and is the exit code.
"""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import e2b

ROUNDS = int(os.environ.get("CREATE_ROUNDS", "11"))
AT_ONCE = 20
POOL = 2
# There only to catch a hang.
DEADLINE = 600
BIN = os.environ["TIFFIN_BIN"]
missed = False


def row(what, seconds, ratio=None, verdict=""):
    ratio = "" if ratio is None else f"{ratio:.2f}"
    print(f"{what:<64} {seconds * 1e3:>11.1f} ms {ratio:>7}  {verdict}", flush=True)


def bound(kept, text):
    global missed
    missed |= not kept
    return f"{text}: {'kept' if kept else 'MISSED'}"


class Gateway:
    def __init__(self, data, *options):
        command = [f"{BIN}/tiffin-gateway", "serve", "--listen", "127.0.0.1:0", "--allow-emulation", "--no-base"]
        command += ["--data-dir", data, "--max-memory", "1000000", "--max-cpus", "10000", *options]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=open(f"{data}/gateway.log", "a"), text=True
        )
        for _ in range(3):
            name, value = self.process.stdout.readline().removeprefix("export ").strip().split("=", 1)
            os.environ[name] = value

    def metric(self, name):
        text = urllib.request.urlopen(os.environ["E2B_API_URL"] + "/metrics").read().decode()
        return sum(int(value) for value in re.findall(rf"^{re.escape(name)} (\d+)$", text, re.M))

    def full(self):
        deadline = time.monotonic() + DEADLINE
        while self.metric("tiffin_parked") < POOL:
            assert time.monotonic() < deadline, "the pool is not filled"
            time.sleep(0.05)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(DEADLINE)


def started(data):
    begun = time.monotonic()
    command = [f"{BIN}/host-shim", "start", "--quiet", "--restore", "--data-dir", data, "bench"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    took = time.monotonic() - begun
    subprocess.run([f"{BIN}/host-shim", "rm", "-f", "--data-dir", data, done.stdout.strip()], check=True, capture_output=True)
    return took


def created():
    begun = time.monotonic()
    sandbox = e2b.Sandbox.create("bench", timeout=DEADLINE)
    took = time.monotonic() - begun
    sandbox.kill()
    return took


def measure(data):
    gateway = Gateway(data)
    try:
        created(), started(data)
        rounds = [(started(data), created()) for _ in range(ROUNDS)]
        assert gateway.metric('tiffin_starts_total{path="restore"}') == ROUNDS + 1, "all of them are restored"
        yardstick, create = (statistics.median(times) for times in zip(*rounds))
        ratio = create / yardstick
        row("host-shim start, of a template with a snapshot", yardstick)
        row("Sandbox.create() of the same, restored", create, ratio, bound(ratio <= 1.3, "at most 1.3"))
        begun = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            made = list(pool.map(lambda _: e2b.Sandbox.create("bench", timeout=DEADLINE), range(AT_ONCE)))
        took = time.monotonic() - begun
        row(f"{AT_ONCE} creates at once, until the last", took, verdict=bound(len(made) == AT_ONCE, "all succeed"))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda sandbox: sandbox.kill(), made))
    finally:
        gateway.stop()
    gateway = Gateway(data, "--pool", f"bench={POOL}")
    try:
        times = []
        for _ in range(ROUNDS):
            gateway.full()
            times.append(created())
        assert gateway.metric('tiffin_starts_total{path="pool"}') == ROUNDS, "all of them are from the pool"
        create = statistics.median(times)
        row("Sandbox.create() from a pool", create, verdict=bound(create <= 0.05, "at most 50 ms"))
    finally:
        gateway.stop()


def main():
    # On a disk, as data folders are.
    data = tempfile.mkdtemp(prefix="bench-", dir=os.environ.get("TIFFIN_BENCH_DIR"))
    try:
        template = f"{data}/templates/bench"
        os.makedirs(template)
        shared = f"{os.environ['TIFFIN_E2E_DATA']}/templates/base"
        try:
            # Only linked: nobody writes it.
            os.link(f"{shared}/rootfs.ext4", f"{template}/rootfs.ext4")
        except OSError:
            shutil.copy(f"{shared}/rootfs.ext4", f"{template}/rootfs.ext4")
        shutil.copy(f"{shared}/template.json", f"{template}/template.json")
        warm = [f"{BIN}/host-shim", "template", "warm", "--quiet", "--data-dir", data, "bench"]
        subprocess.run(warm, check=True, stdout=subprocess.DEVNULL)
        print(f"medians of {ROUNDS} rounds; release binaries: {BIN.endswith('release')}")
        measure(data)
    finally:
        # Sandboxes outlive their gateway: a gateway without pools ends those that are parked, and the rest is killed here.
        for name in os.listdir(f"{data}/sandboxes") if os.path.isdir(f"{data}/sandboxes") else ():
            try:
                with open(f"{data}/sandboxes/{name}/state.json") as file:
                    shim = json.load(file)["shim_pid"]
                with open(f"/proc/{shim}/cmdline") as file:
                    # Not another's that has its number by now.
                    if data in file.read():
                        os.kill(shim, signal.SIGKILL)
            except (OSError, ValueError, KeyError):
                pass
        shutil.rmtree(data, ignore_errors=True)
    sys.exit(missed)


main()
