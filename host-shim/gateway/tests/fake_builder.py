#!/usr/bin/env python3
"""Stands in for image-builder: the same options, lines of progress and templates, without building anything.

RUN steps script it: `fail`, `crash`, `deaf` (hangs, and does not listen to SIGTERM), `flood N`. Files beside it do too: `hang` with the name
of a stage (base, steps, create, push, pull) at which it stops after it has made `at`, and `registry-is-dead`.
"""
import hashlib, json, os, shutil, signal, subprocess, sys

own = os.path.dirname(os.path.abspath(__file__))
assert sys.argv[1] == "--data-dir"
data, verb, rest = sys.argv[2], sys.argv[3], sys.argv[4:]
with open(own + "/calls", "a") as calls:
    calls.write(json.dumps([verb, *rest]) + "\n")


def say(kind, **fields):
    print(json.dumps({"type": kind, "time": "2026-01-01T00:00:00.000Z", **fields}), file=sys.stderr, flush=True)


def option(name):
    return rest[rest.index(name) + 1] if name in rest else None


def fail(words):
    say("error", message="image-builder: " + words)
    sys.exit(1)


def stop_here():
    with open(own + "/at.new", "w") as at:
        at.write(str(os.getpid()))
    os.rename(own + "/at.new", own + "/at")
    while True:
        signal.pause()


def stage(name):
    try:
        with open(own + "/hang") as file:
            wanted = file.read()
    except FileNotFoundError:
        return
    if wanted == name:
        # Something that must not outlive it.
        subprocess.Popen(["sleep", "1000000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0)
        stop_here()


def image(name):
    return data + "/images/" + name.replace("/", "%")


def template(name):
    return data + "/templates/" + name


def write_template(name, reference):
    os.makedirs(template(".new-" + name), exist_ok=True)
    zeros = "sha256:" + "a" * 64
    with open(template(".new-" + name) + "/rootfs.ext4", "w") as rootfs:
        rootfs.write("rootfs")
    with open(template(".new-" + name) + "/template.json", "w") as file:
        json.dump({
            "schema_version": 1, "image": {"reference": reference, "digest": zeros}, "rootfs": {"digest": zeros, "size": 6},
            "runtime": {"user": "user"},
            "machine": {"cpus": int(option("--cpus") or 1), "memory_mib": int(option("--memory") or 64), "disk_mib": 16},
        }, file)
    shutil.rmtree(template(name), ignore_errors=True)
    os.rename(template(".new-" + name), template(name))


os.makedirs(data + "/images", exist_ok=True)
if verb == "build":
    with open(option("--steps")) as file:
        request = json.load(file)
    if "fromImage" in request:
        stage("base")
        if request["fromImage"].startswith("no-such-image"):
            fail("image no-such-image is not there")
        if request["fromImage"].startswith("build.tiffin.invalid") and not os.path.exists(image(request["fromImage"])):
            fail("image of the template is not there")
    else:
        stage("steps")
        if not os.path.exists(image(option("--template-image").split("=", 1)[1])):
            fail("the base is not there")
    for number, step in enumerate(request["steps"], 1):
        kind, args = step["type"], step["args"]
        say("step", step=f"[{number}/{len(request['steps'])}]", status="started", message=" ".join([kind, *args]))
        files = step.get("filesHash")
        if files and not os.path.isfile(os.path.join(option("--files"), files)):
            fail(f"{option('--steps')}: step {number}: files {files} are not there")
        word = args[0].split(" ")
        if kind == "RUN" and word[0] == "fail":
            say("output", step="[1/1]", message="no such luck")
            fail(f"{option('--steps')}: step {number}: the command exited with code 3\n    RUN fail")
        if kind == "RUN" and word[0] == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "RUN" and word[0] == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            stop_here()
        if kind == "RUN" and word[0] == "flood":
            for line in range(int(word[1])):
                say("output", step="[1/1]", message=f"line {line}")
    open(image(option("-t")), "w").close()
    print(json.dumps({"names": [option("-t")]}))
elif verb == "template" and rest[0] == "create":
    stage("create")
    write_template(rest[1], option("--image"))
    print("{}")
elif verb == "template" and rest[0] == "push":
    stage("push")
    if os.path.exists(own + "/registry-is-dead"):
        fail(f"{rest[2]}: connection refused")
    digest = "sha256:" + hashlib.sha256(rest[2].encode()).hexdigest()
    shutil.copytree(template(rest[1]), own + "/registry/" + digest, dirs_exist_ok=True)
    print(json.dumps({"name": rest[1], "digest": digest}))
elif verb == "template" and rest[0] == "pull":
    stage("pull")
    if os.path.exists(own + "/registry-is-dead"):
        print(f"image-builder: {rest[1]}: connection refused", file=sys.stderr)
        sys.exit(1)
    shutil.copytree(own + "/registry/" + rest[1].split("@")[1], template(".new-" + rest[2]))
    os.rename(template(".new-" + rest[2]), template(rest[2]))
elif verb == "rm":
    os.remove(image(rest[0]))
else:
    sys.exit(9)
