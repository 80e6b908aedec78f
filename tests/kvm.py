#!/usr/bin/env python3
"""Runs end-to-end tests with KVM on each VMM of this host, and prints rows for the README's table "tested on".

`make test-kvm` calls it with the variables of the tests set. What this host cannot run is a row that says why.
"""

import json
import os
import platform
import re
import subprocess
import sys

# What a sandbox does on every VMM. The others play with QEMU itself: its monitor, its command line, its emulation.
PORTABLE = ["boot", "processes", "files", "init", "profile", "volumes", "clones", "snapshots", "survival"]

# How each VMM is called: in a spec, in the doctor's report, and where that says whether KVM runs guests with it.
VMMS = [("qemu", "qemu", "kvm"), ("firecracker", "firecracker", "firecracker")]

SUMMARY = re.compile(r"(\d+) tests? run: (\d+) passed(?:[^,]*)?(?:, (\d+) failed)?")


def doctor():
    """What the host has: each check of `host-shim doctor` by its name."""
    shim = os.path.join(os.environ["TIFFIN_BIN"], "host-shim")
    said = subprocess.run([shim, "doctor", "--json"], stdout=subprocess.PIPE, check=False).stdout
    return {check["name"]: check for check in json.loads(said)["checks"]}


def cpu():
    """The name of the CPU."""
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def run(vmm):
    """Runs the tests; gives how many passed and how many failed."""
    tests = " or ".join(f"test(/^{module}::/)" for module in PORTABLE + (["firecracker"] if vmm != "qemu" else []))
    command = ["cargo", "nextest", "run", "--locked", "-p", "e2e", "--no-fail-fast", "-E", f"binary(e2e) and ({tests})"]
    environment = dict(os.environ, TIFFIN_E2E_VMM=vmm)
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as tests:
        counts = None
        for line in tests.stderr:
            sys.stderr.write(line)
            if found := SUMMARY.search(line):
                counts = int(found[2]), int(found[3] or 0)
    if counts is None:
        sys.exit(f"the tests on {vmm} did not run")
    return counts


def main():
    """Prints a row for each VMM."""
    checks = doctor()
    rows, failed = [], 0
    host = f"{cpu()} | Linux {platform.release()}"
    for vmm, program, kvm in VMMS:
        version = checks[program]["found"]
        if missing := [checks[name] for name in (program, kvm) if checks[name]["status"] != "ok"]:
            rows.append(f"| {host} | {vmm} | | not run: {missing[0]['found']} |")
            continue
        passed, broken = run(vmm)
        failed += broken
        rows.append(f"| {host} | {vmm} | {version} | {passed} passed, {broken} failed |")
    print("| CPU | kernel | VMM | version | result |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
