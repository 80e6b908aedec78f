"""E2B's published Python client against a gateway whose `base` has a snapshot and a start command: restored.py [--checks]

Where the gateway is and who calls it is in E2B_API_URL, E2B_SANDBOX_URL and E2B_API_KEY (`tiffin-gateway env`). Prints `ok CASE`
for each case that was checked, and leaves its sandboxes to whoever wants to look at them.
"""

import sys
import time

from e2b import Sandbox

CASES = ["two clones", "own identity", "own randomness", "own variables", "start command"]

if "--checks" in sys.argv:
    print("\n".join(CASES))
    sys.exit()

sandboxes = []
for who in ["one", "two"]:
    began = time.monotonic()
    sandboxes.append(Sandbox.create(timeout=600, envs={"WHO": who}))
    print(f"create: {time.monotonic() - began:.2f} s")


def each(command):
    return [sandbox.commands.run(command).stdout.strip() for sandbox in sandboxes]


assert each("echo hello") == ["hello", "hello"]
print("ok two clones")
ids = [sandbox.sandbox_id for sandbox in sandboxes]
assert each("echo $E2B_SANDBOX_ID") == ids and each("hostname") == ids, (ids, each("hostname"))
for unique in ["cat /etc/machine-id", "cat /proc/sys/kernel/random/boot_id"]:
    one, two = each(unique)
    assert one != two and len(one) >= 32, (unique, one, two)
print("ok own identity")
one, two = each("python3 -c 'import secrets; print(secrets.token_hex())'")
assert one != two, one
print("ok own randomness")
assert each("echo $WHO") == ["one", "two"]
print("ok own variables")
# It ran once, before the snapshot, and goes on in each of them.
assert each("cat ~/starts; pgrep -fxc 'sleep 1000000'") == ["started\n1"] * 2
print("ok start command")
