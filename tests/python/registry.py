"""A template on two machines: registry.py build|start [--checks]"""

import sys

import e2b

NAME = "travels"


def build():
    template = e2b.Template().from_image("e2e-base").set_envs({"A": "b"}).run_cmd("echo here > /home/user/was")
    e2b.Template.build(template, NAME, cpu_count=1, memory_mb=256)


def start():
    sandbox = e2b.Sandbox.create(NAME, timeout=600, request_timeout=300)
    assert sandbox.commands.run("cat was").stdout == "here\n"
    sandbox.kill()


if "--checks" in sys.argv:
    print(sys.argv[1])
else:
    {"build": build, "start": start}[sys.argv[1]]()
    print(f"ok {sys.argv[1]}")
