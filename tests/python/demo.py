"""What `make demo-sdk` shows of the published Python client; the gateway is in the environment."""

import time

from e2b import PtySize, Sandbox

began = time.monotonic()
sandbox = Sandbox.create()
print(f"create: {time.monotonic() - began:.2f} s, {sandbox.sandbox_id}")
try:
    print(sandbox.commands.run("cowsay hello from the Python SDK").stdout, end="")
    print("who:", sandbox.commands.run("whoami; sudo whoami; pwd").stdout.split())

    watcher = sandbox.files.watch_dir("/home/user")
    sandbox.files.write("note.txt", "kept in a file")
    print("read:", sandbox.files.read("note.txt"))
    print("list:", [entry.name for entry in sandbox.files.list(".") if not entry.name.startswith(".")])
    print("watch:", sorted({f"{event.type.value} {event.name}" for event in watcher.get_new_events()}))
    watcher.stop()

    terminal = sandbox.pty.create(size=PtySize(rows=24, cols=80))
    sandbox.pty.send_stdin(terminal.pid, b"echo $((6 * 7)) in a terminal; exit\n")
    shown = bytearray()
    terminal.wait(on_pty=shown.extend)
    print("pty:", next(line for line in shown.decode().splitlines() if line.startswith("42 ")))
finally:
    print("kill:", sandbox.kill())
