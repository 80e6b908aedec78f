"""E2B's published Python client against a gateway: gateway.py sync|async [--checks|--methods]

Where the gateway is and who calls it is in E2B_API_URL, E2B_SANDBOX_URL and E2B_API_KEY (`tiffin-gateway env`). The same checks
run with the blocking and with the asyncio client. Prints a line for each method and case that was checked, `ok METHOD
normal|error|501`, or `failed METHOD CASE: WHY`. `--checks` lists what would be checked, `--methods` every public method of the
client; tests/sdk-methods.txt brings the two together.
"""

import asyncio
import inspect
import sys
import time
import traceback
import urllib.error
import urllib.request
import uuid

import e2b

import template_checks

IS_ASYNC = sys.argv[1] == "async"
Sandbox = e2b.AsyncSandbox if IS_ASYNC else e2b.Sandbox
Template = e2b.AsyncTemplate if IS_ASYNC else e2b.Template
Volume = e2b.AsyncVolume if IS_ASYNC else e2b.Volume
Secret = e2b.AsyncSecret if IS_ASYNC else e2b.Secret

# There only to catch a hang; boots under emulation take their time.
DEADLINE = 300
CHECKS = []


def check(*cases):
    def register(function):
        CHECKS.append((cases, function))
        return function

    return register


async def do(value):
    """The result of a call, of either client."""
    return await value if inspect.isawaitable(value) else value


async def raises(kind, call, text=""):
    try:
        done = await do(call())
    except kind as error:
        assert text in str(error), f"{text!r} is not in {error!r}"
        return error
    raise AssertionError(f"no {getattr(kind, '__name__', kind)} but {done!r}")


async def eventually(condition):
    deadline = time.monotonic() + DEADLINE
    while not await condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.05)


def unknown_id():
    return "none" + uuid.uuid4().hex[:12]


RUN = uuid.uuid4().hex
sandbox = None


@check("Sandbox.create normal")
async def create():
    global sandbox
    sandbox = await do(
        Sandbox.create(timeout=1200, metadata={"who": "é & =", "run": RUN}, envs={"GREETING": "hello"})
    )
    assert (await do(sandbox.commands.run("echo $GREETING $E2B_SANDBOX_ID"))).stdout == f"hello {sandbox.sandbox_id}\n"


@check("Sandbox.create error")
async def create_of_nothing():
    await raises(e2b.SandboxException, lambda: Sandbox.create("no-such-template"), "404")


@check("Sandbox.connect normal", "Sandbox.is_running normal")
async def connect():
    other = await do(Sandbox.connect(sandbox.sandbox_id))
    assert await do(other.is_running())
    assert (await do(other.commands.run("echo $GREETING"))).stdout == "hello\n"


@check("Sandbox.connect error")
async def connect_to_nobody():
    await raises(e2b.SandboxNotFoundException, lambda: Sandbox.connect(unknown_id()))


@check("Sandbox.get_info normal")
async def get_info():
    info = await do(sandbox.get_info())
    assert info.sandbox_id == sandbox.sandbox_id and info.state == e2b.SandboxState.RUNNING, info
    assert info.metadata == {"who": "é & =", "run": RUN}, info
    assert info.cpu_count >= 1 and info.memory_mb >= 64 and info.end_at > info.started_at, info


@check("Sandbox.get_info error")
async def info_of_nobody():
    await raises(e2b.SandboxNotFoundException, lambda: Sandbox.get_info(unknown_id()))


@check(
    "Sandbox.list normal",
    "SandboxPaginator.next_items normal",
    "SandboxPaginator.has_next normal",
    "SandboxPaginator.next_token normal",
)
async def listing():
    second = await do(Sandbox.create(metadata={"run": RUN}))
    try:
        for query, expected in (
            ({"run": RUN}, {sandbox.sandbox_id, second.sandbox_id}),
            ({"run": RUN, "who": "é & ="}, {sandbox.sandbox_id}),
            ({"run": "other"}, set()),
        ):
            pages = Sandbox.list(e2b.SandboxQuery(metadata=query, state=[e2b.SandboxState.RUNNING]), limit=1)
            found = []
            while pages.has_next:
                page = await do(pages.next_items())
                assert len(page) <= 1, page
                found += [item.sandbox_id for item in page]
            assert pages.next_token is None
            assert len(found) == len(expected) and set(found) == expected, (query, found)
    finally:
        await do(second.kill())


@check("SandboxPaginator.next_items error")
async def listing_past_its_end():
    pages = Sandbox.list(e2b.SandboxQuery(metadata={"run": "other"}))
    await do(pages.next_items())
    await raises(Exception, lambda: pages.next_items(), "No more items")


@check("Sandbox.list error")
async def listing_without_a_key():
    pages = Sandbox.list(api_key="e2b_" + "0" * 40)
    await raises(e2b.AuthenticationException, lambda: pages.next_items())


@check("Sandbox.set_timeout normal")
async def set_timeout():
    await do(sandbox.set_timeout(1800))
    info = await do(sandbox.get_info())
    left = (info.end_at - info.started_at).total_seconds()
    assert 1700 < left < 1800 + DEADLINE, left


@check("Sandbox.set_timeout error")
async def timeout_of_nobody():
    await raises(e2b.NotFoundException, lambda: Sandbox.set_timeout(unknown_id(), 60))


@check("Sandbox.get_metrics normal")
async def get_metrics():
    for metric in await do(sandbox.get_metrics()):
        assert metric.mem_total > 0 and metric.disk_total > 0, metric


@check("Sandbox.get_metrics error")
async def metrics_of_nobody():
    await raises(e2b.SandboxNotFoundException, lambda: Sandbox.get_metrics(unknown_id()))


@check("Sandbox.kill normal", "Sandbox.kill error", "Sandbox.is_running error", "Commands.run error", "Commands.list error")
async def kill():
    victim = await do(Sandbox.create())
    assert await do(victim.kill()) is True
    assert await do(Sandbox.kill(victim.sandbox_id)) is False
    assert await do(victim.is_running()) is False
    await raises(e2b.TimeoutException, lambda: victim.commands.run("true"))
    await raises(e2b.SandboxException, lambda: victim.commands.list())
    await raises(e2b.NotFoundException, lambda: Sandbox.connect(victim.sandbox_id))


@check("Sandbox.get_host normal")
async def get_host():
    assert sandbox.get_host(8080).startswith(f"8080-{sandbox.sandbox_id}."), sandbox.get_host(8080)


@check("Sandbox.download_url normal", "Sandbox.download_url error")
async def download_url():
    await do(sandbox.files.write("/home/user/signed", "signed"))
    # A signed URL carries no routing header: it is for the sandbox's own host name, which a test may not resolve.
    url = await do(sandbox.download_url("/home/user/signed", use_signature_expiration=600))
    assert "signature=v1_" in url and "signature_expiration=" in url, url
    assert (await asyncio.to_thread(by_headers, url))[1] == b"signed"
    late = await do(sandbox.download_url("/home/user/signed", use_signature_expiration=-600))
    status, body = await asyncio.to_thread(by_headers, late)
    assert status == 401 and b"expired" in body, (status, body)


@check("Sandbox.upload_url normal", "Sandbox.upload_url error")
async def upload_url():
    url = await do(sandbox.upload_url("/home/user/uploaded"))
    part = b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\nsent\r\n--b--\r\n'
    assert (await asyncio.to_thread(by_headers, url, part))[0] == 200
    assert await do(sandbox.files.read("/home/user/uploaded")) == "sent"
    status, _ = await asyncio.to_thread(by_headers, url.replace("signature=v1_", "signature=v1_x"), part)
    assert status == 401, status


def by_headers(url, data=None):
    """A signed URL, routed by headers as the SDK's own requests are."""
    request = urllib.request.Request(url, data=data)
    request.add_header("E2b-Sandbox-Id", sandbox.sandbox_id)
    request.add_header("E2b-Sandbox-Port", "49983")
    if data:
        request.add_header("content-type", "multipart/form-data; boundary=b")
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@check("Commands.run normal")
async def run():
    streamed = []
    done = await do(
        sandbox.commands.run("echo out; echo err >&2; printf 'ü\\n'", on_stdout=streamed.append, cwd="/tmp")
    )
    assert (done.stdout, done.stderr, done.exit_code) == ("out\nü\n", "err\n", 0), done
    assert "".join(streamed) == done.stdout
    assert (await do(sandbox.commands.run("whoami; pwd; sudo whoami"))).stdout == "user\n/home/user\nroot\n"
    assert (await do(sandbox.commands.run("echo $A; pwd", envs={"A": "1"}, cwd="/tmp", user="root"))).stdout == "1\n/tmp\n"
    big = await do(sandbox.commands.run("head -c 1000000 /dev/zero | tr '\\0' x"))
    assert big.stdout == "x" * 1_000_000
    error = await raises(e2b.CommandExitException, lambda: sandbox.commands.run("echo bad >&2; exit 3"))
    assert (error.exit_code, error.stderr, error.stdout) == (3, "bad\n", "")
    await raises(e2b.TimeoutException, lambda: sandbox.commands.run("sleep 1000", timeout=1))
    await raises(e2b.InvalidArgumentException, lambda: sandbox.commands.run("true", cwd="/no/such"))
    await raises(e2b.AuthenticationException, lambda: sandbox.commands.run("true", user="nosuchuser"))


@check(
    "Commands.list normal",
    "Commands.kill normal",
    "Commands.kill error",
    "CommandHandle.kill normal",
    "CommandHandle.kill error",
    "CommandHandle.wait error",
    "CommandHandle.pid normal",
)
async def background():
    handle = await do(sandbox.commands.run("sleep 1000", background=True, timeout=0))
    assert handle.pid in [process.pid for process in await do(sandbox.commands.list())]
    assert await do(handle.kill()) is True
    error = await raises(e2b.CommandExitException, lambda: handle.wait())
    assert "killed" in str(error.error), error
    assert await do(sandbox.commands.kill(handle.pid)) is False
    assert await do(handle.kill()) is False
    other = await do(sandbox.commands.run("sleep 1000", background=True, timeout=0))
    assert await do(sandbox.commands.kill(other.pid)) is True
    await raises(e2b.CommandExitException, lambda: other.wait())


@check(
    "Commands.connect normal",
    "Commands.connect error",
    "Commands.send_stdin normal",
    "Commands.send_stdin error",
    "Commands.close_stdin normal",
    "Commands.close_stdin error",
    "CommandHandle.wait normal",
    "CommandHandle.send_stdin normal",
    "CommandHandle.close_stdin normal",
    "CommandHandle.close_stdin error",
    "CommandHandle.disconnect normal",
    "CommandHandle.send_stdin error",
    *(f"CommandHandle.{name} normal" for name in ("stdout", "stderr", "exit_code", "error") if IS_ASYNC),
)
async def input_of_processes():
    first = await do(sandbox.commands.run("cat", background=True, stdin=True, timeout=0))
    second = await do(sandbox.commands.connect(first.pid, timeout=0))
    third = await do(sandbox.commands.connect(first.pid, timeout=0))
    await do(sandbox.commands.send_stdin(first.pid, "hello\n"))
    await do(second.send_stdin("again\n"))
    await do(third.disconnect())
    await do(second.close_stdin())
    for handle in (first, second):
        done = await do(handle.wait())
        assert (done.stdout, done.exit_code) == ("hello\nagain\n", 0), done
    if IS_ASYNC:
        assert (first.stdout, first.stderr, first.exit_code) == ("hello\nagain\n", "", 0) and not first.error
    last = await do(sandbox.commands.run("cat", background=True, stdin=True, timeout=0))
    await do(sandbox.commands.close_stdin(last.pid))
    assert (await do(last.wait())).exit_code == 0
    await raises(e2b.NotFoundException, lambda: sandbox.commands.connect(4_000_000))
    await raises(e2b.SandboxException, lambda: sandbox.commands.send_stdin(4_000_000, "x"))
    await raises(e2b.SandboxException, lambda: sandbox.commands.close_stdin(4_000_000))
    await raises(e2b.SandboxException, lambda: first.send_stdin("x"))
    await raises(e2b.SandboxException, lambda: first.close_stdin())


async def stream(service, pid, *parts):
    """Sends input in one stream: the blocking client takes all at once, the other gives a handle."""
    if not IS_ASYNC:
        return service.stream_input(pid, iter(parts))
    handle = service.stream_input(pid)
    for part in parts:
        await handle.send(part)
    await handle.close()


def stream_cases(name):
    handle = ["CommandInputHandle.send normal", "CommandInputHandle.close normal", "CommandInputHandle.close error"]
    return [f"{name} normal", f"{name} error"] + (handle if IS_ASYNC else [])


@check(*stream_cases("Commands.stream_input"))
async def stream_input():
    handle = await do(sandbox.commands.run("cat", background=True, stdin=True, timeout=0))
    await stream(sandbox.commands, handle.pid, b"one ", b"two")
    await do(sandbox.commands.close_stdin(handle.pid))
    assert (await do(handle.wait())).stdout == "one two"
    await raises(e2b.SandboxException, lambda: stream(sandbox.commands, 4_000_000, b"x"))


@check("Filesystem.write normal", "Filesystem.write error", "Filesystem.read normal", "Filesystem.read error")
async def write_and_read():
    data = bytes(range(256)) * 5000
    written = await do(sandbox.files.write("w/deep/er", data, metadata={"k": "v"}))
    assert (written.name, written.path) == ("er", "/home/user/w/deep/er"), written
    assert bytes(await do(sandbox.files.read("w/deep/er", format="bytes"))) == data
    stream = await do(sandbox.files.read("w/deep/er", format="stream"))
    if IS_ASYNC:
        assert b"".join([chunk async for chunk in stream]) == data
    else:
        assert b"".join(stream) == data
    await do(sandbox.files.write("w/text", "ü", gzip=True))
    assert await do(sandbox.files.read("w/text", gzip=True)) == "ü"
    await raises(e2b.FileNotFoundException, lambda: sandbox.files.read("w/missing"))
    await raises(e2b.InvalidArgumentException, lambda: sandbox.files.write("/home/user", "x"))


@check("Filesystem.write_files normal", "Filesystem.write_files error", "Filesystem.list normal", "Filesystem.list error")
async def write_files():
    await do(sandbox.files.write_files([{"path": "m/1", "data": "a"}, {"path": "m/2", "data": b"b"}]))
    assert [entry.name for entry in await do(sandbox.files.list("m"))] == ["1", "2"]
    assert len(await do(sandbox.files.list("/home/user", depth=2))) > 2
    await raises(e2b.FileNotFoundException, lambda: sandbox.files.list("m/none"))
    await raises(
        e2b.InvalidArgumentException, lambda: sandbox.files.write_files([{"path": "/home/user", "data": "a"}])
    )


@check(
    "Filesystem.make_dir normal",
    "Filesystem.make_dir error",
    "Filesystem.rename normal",
    "Filesystem.rename error",
    "Filesystem.exists normal",
    "Filesystem.exists error",
    "Filesystem.remove normal",
    "Filesystem.remove error",
    "Filesystem.get_info normal",
    "Filesystem.get_info error",
)
async def folders():
    assert await do(sandbox.files.make_dir("made/below")) is True
    assert await do(sandbox.files.make_dir("made/below")) is False
    assert (await do(sandbox.files.rename("made", "moved"))).path == "/home/user/moved"
    assert await do(sandbox.files.exists("moved/below"))
    assert not await do(sandbox.files.exists("made"))
    info = await do(sandbox.files.get_info("moved"))
    assert (info.name, info.type, info.owner) == ("moved", e2b.FileType.DIR, "user"), info
    await do(sandbox.files.remove("moved"))
    await do(sandbox.files.remove("moved"))
    assert not await do(sandbox.files.exists("moved"))
    await raises(e2b.FileNotFoundException, lambda: sandbox.files.get_info("moved"))
    await raises(e2b.FileNotFoundException, lambda: sandbox.files.rename("moved", "other"))
    await do(sandbox.files.write("plain", ""))
    await raises(e2b.InvalidArgumentException, lambda: sandbox.files.make_dir("plain"))
    await raises(e2b.InvalidArgumentException, lambda: sandbox.files.exists("~nobody/x"))
    await raises(e2b.SandboxException, lambda: sandbox.files.remove("/proc/1/status"))


def watch_cases():
    handle = "WatchHandle.stop normal"
    new = [] if IS_ASYNC else ["WatchHandle.get_new_events normal", "WatchHandle.get_new_events error"]
    return ["Filesystem.watch_dir normal", "Filesystem.watch_dir error", handle, *new]


@check(*watch_cases())
async def watch():
    await do(sandbox.files.make_dir("watched/sub"))
    seen = []
    if IS_ASYNC:
        handle = await sandbox.files.watch_dir("watched", on_event=seen.append, recursive=True)
    else:
        handle = sandbox.files.watch_dir("watched", recursive=True)
    await do(sandbox.files.write("watched/sub/new", "x"))

    async def arrived():
        if not IS_ASYNC:
            seen.extend(handle.get_new_events())
        return any(e.name == "sub/new" and e.type == e2b.FilesystemEventType.CREATE for e in seen)

    await eventually(arrived)
    await do(handle.stop())
    if not IS_ASYNC:
        await raises(e2b.SandboxException, lambda: handle.get_new_events())
        await raises(e2b.FileNotFoundException, lambda: sandbox.files.watch_dir("missing"))
    else:
        await raises(e2b.FileNotFoundException, lambda: sandbox.files.watch_dir("missing", on_event=seen.append))


async def terminal(output):
    size = e2b.PtySize(rows=24, cols=80)
    if IS_ASYNC:
        return await sandbox.pty.create(size=size, on_data=output.extend, timeout=0)
    return sandbox.pty.create(size=size, timeout=0)


async def shown(handle, output):
    if IS_ASYNC:
        return await handle.wait()
    return handle.wait(on_pty=output.extend)


@check("Pty.create normal", "Pty.resize normal", "Pty.send_stdin normal")
async def pty():
    output = bytearray()
    handle = await terminal(output)
    await do(sandbox.pty.resize(handle.pid, e2b.PtySize(rows=33, cols=101)))
    await do(sandbox.pty.send_stdin(handle.pid, b"stty size; printf 'a\\377b\\n'; exit 5\n"))
    error = await raises(e2b.CommandExitException, lambda: shown(handle, output))
    assert error.exit_code == 5
    assert b"33 101" in output and b"a\xffb" in output, bytes(output)


@check("Pty.connect normal", "Pty.stream_input normal", "Pty.kill normal", "Pty.kill error")
async def pty_shared():
    output = bytearray()
    handle = await terminal(bytearray())
    if IS_ASYNC:
        other = await sandbox.pty.connect(handle.pid, on_data=output.extend, timeout=0)
    else:
        other = sandbox.pty.connect(handle.pid, timeout=0)
    await stream(sandbox.pty, handle.pid, b"echo one$((1", b"+1))\nexit\n")
    await shown(other, output)
    assert b"one2" in output, bytes(output)
    last = await terminal(bytearray())
    assert await do(sandbox.pty.kill(last.pid)) is True
    await raises(e2b.CommandExitException, lambda: last.wait())
    assert await do(sandbox.pty.kill(last.pid)) is False


@check("Pty.create error", "Pty.connect error", "Pty.resize error", "Pty.send_stdin error", "Pty.stream_input error")
async def pty_of_nobody():
    size, none = e2b.PtySize(rows=24, cols=80), 4_000_000
    extra = {"on_data": print} if IS_ASYNC else {}
    await raises(e2b.InvalidArgumentException, lambda: sandbox.pty.create(size=size, cwd="/no/such", **extra))
    await raises(e2b.NotFoundException, lambda: sandbox.pty.connect(none, **extra))
    await raises(e2b.SandboxException, lambda: sandbox.pty.resize(none, size))
    await raises(e2b.SandboxException, lambda: sandbox.pty.send_stdin(none, b"x"))
    await raises(e2b.SandboxException, lambda: stream(sandbox.pty, none, b"x"))


def both(class_name, *names):
    return [f"{class_name}.{name} {case}" for name in names for case in ("normal", "error")]


@check(
    *both("Git", "init", "configure_user", "set_config", "get_config", "add", "commit", "status", "branches"),
    *both("Git", "create_branch", "checkout_branch", "delete_branch", "reset", "restore"),
)
async def git():
    git = sandbox.git
    await do(git.init("repo", initial_branch="main"))
    await do(git.configure_user("Tiffin", "tiffin@example.com"))
    await do(git.set_config("pull.rebase", "true"))
    assert await do(git.get_config("pull.rebase")) == "true"
    assert await do(git.get_config("no.such")) is None
    await do(sandbox.files.write("repo/a", "1"))
    await do(git.add("repo"))
    await do(git.commit("repo", "first"))
    assert (await do(git.status("repo"))).is_clean
    await do(git.create_branch("repo", "side"))
    assert (await do(git.branches("repo"))).current_branch == "side"
    await do(git.checkout_branch("repo", "main"))
    await do(git.delete_branch("repo", "side"))
    await do(sandbox.files.write("repo/a", "2"))
    await do(git.restore("repo", ["a"]))
    assert await do(sandbox.files.read("repo/a")) == "1"
    await do(sandbox.files.write("repo/a", "3"))
    await do(git.add("repo"))
    await do(git.reset("repo", mode="hard"))
    assert await do(sandbox.files.read("repo/a")) == "1"
    no = "/no/such"
    for call in (
        lambda: git.init("/proc/none"),
        lambda: git.configure_user("a", "b", scope="local", path=no),
        lambda: git.set_config("", "x"),
        lambda: git.get_config(""),
        lambda: git.add(no),
        lambda: git.commit("repo", "nothing"),
        lambda: git.status(no),
        lambda: git.branches(no),
        lambda: git.create_branch(no, "x"),
        lambda: git.checkout_branch("repo", "none"),
        lambda: git.delete_branch("repo", "none"),
        lambda: git.reset("repo", target="none"),
        lambda: git.restore("repo", ["none"]),
    ):
        await raises(Exception, call)


@check(*both("Git", "clone", "remote_add", "remote_get", "push", "pull", "dangerously_authenticate"))
async def git_remotes():
    git, no = sandbox.git, "/no/such"
    await do(git.init("/home/user/bare.git", bare=True, initial_branch="main"))
    await do(git.init("/home/user/work", initial_branch="main"))
    await do(git.configure_user("Tiffin", "tiffin@example.com"))
    await do(git.remote_add("work", "origin", "/home/user/bare.git"))
    assert await do(git.remote_get("work", "origin")) == "/home/user/bare.git"
    assert await do(git.remote_get("work", "none")) is None
    await do(git.commit("work", "first", allow_empty=True))
    await do(git.push("work", remote="origin", branch="main"))
    await do(git.clone("/home/user/bare.git", "copy"))
    await do(git.pull("copy"))
    await do(git.dangerously_authenticate("me", "secret", host="git.example.com"))
    for call in (
        lambda: git.clone("/no/such.git", "other"),
        lambda: git.remote_add(no, "x", "/y"),
        lambda: git.push("work", remote="none", branch="main"),
        lambda: git.pull(no),
        lambda: git.dangerously_authenticate("", ""),
    ):
        await raises(Exception, call)
    assert await do(git.remote_get(no, "origin")) is None


@check(*both("Template", "exists", "alias_exists"))
async def templates():
    assert await do(Template.exists("base")) is True
    assert await do(Template.alias_exists("base")) is True
    assert await do(Template.exists("no-such-template")) is False
    assert await do(Template.alias_exists("no-such-template")) is False


template_checks.register(sys.modules[__name__])


BOOT = "cat /proc/sys/kernel/random/boot_id; cat ~/note; cat /tmp/counter"


@check("Sandbox.pause normal", "Sandbox.beta_pause normal")
async def pause():
    own = await do(Sandbox.create(timeout=1200, metadata={"run": RUN + "p"}))
    try:
        await do(own.files.write("note", "kept\n"))
        await do(own.commands.run("echo 1 > /tmp/counter"))
        process = await do(own.commands.run("sleep 1000000", background=True))
        before = (await do(own.commands.run(BOOT))).stdout
        assert await do(own.pause()) is True
        assert await do(own.pause()) is False, "it is paused already"
        assert (await do(own.get_info())).state == e2b.SandboxState.PAUSED
        assert not await do(own.is_running())
        for state, expected in ((e2b.SandboxState.PAUSED, {own.sandbox_id}), (e2b.SandboxState.RUNNING, set())):
            query = e2b.SandboxQuery(metadata={"run": RUN + "p"}, state=[state])
            page = await do(Sandbox.list(query=query).next_items())
            assert {one.sandbox_id for one in page} == expected, (state, page)
        await raises(e2b.SandboxException, lambda: own.set_timeout(60), "409")
        again = await do(Sandbox.connect(own.sandbox_id, timeout=1200))
        assert (await do(again.commands.run(BOOT))).stdout == before, "the same machine goes on"
        assert process.pid in {one.pid for one in await do(again.commands.list())}, "its processes too"
        assert await do(again.beta_pause()) is True
    finally:
        assert await do(own.kill()), "a paused one can be killed"


@check("Sandbox.pause error", "Sandbox.beta_pause error")
async def pause_of_nobody():
    await raises(e2b.SandboxNotFoundException, lambda: Sandbox.pause(unknown_id()))
    await raises(e2b.SandboxNotFoundException, lambda: Sandbox.beta_pause(unknown_id()))
    await raises(e2b.SandboxException, lambda: sandbox.pause(mode="filesystem"), "400")
    assert await do(sandbox.is_running())


@check("Sandbox.create normal")
async def auto_pause_and_auto_resume():
    own = await do(Sandbox.create(timeout=1200, lifecycle={"on_timeout": "pause", "auto_resume": True}))
    try:
        before = (await do(own.commands.run(f"echo a > note; echo 2 > /tmp/counter; {BOOT}"))).stdout
        assert (await do(own.get_info())).lifecycle == {"on_timeout": "pause", "auto_resume": True}
        await do(own.set_timeout(0))

        async def is_paused():
            return (await do(own.get_info())).state == e2b.SandboxState.PAUSED

        await eventually(is_paused)
        # Nobody asks for it but its own requests, several at once.
        calls = [asyncio.to_thread(own.commands.run, BOOT) for _ in range(3)] if not IS_ASYNC else [own.commands.run(BOOT) for _ in range(3)]
        for done in await asyncio.gather(*calls):
            assert done.stdout == before
        assert (await do(own.get_info())).state == e2b.SandboxState.RUNNING
    finally:
        assert await do(own.kill())


@check(
    *both("Sandbox", "create_snapshot", "list_snapshots", "delete_snapshot"),
    "SnapshotPaginator.next_items normal",
    "SnapshotPaginator.next_items error",
    "SnapshotPaginator.has_next normal",
    "SnapshotPaginator.next_token normal",
)
async def snapshots():
    name = "snap-" + RUN[:12]
    await do(sandbox.files.write("note", "of the snapshot\n"))
    made = await do(sandbox.create_snapshot(name))
    assert made.names == [f"{name}:default"], made
    try:
        assert await do(sandbox.is_running()), "it goes on"
        pages = sandbox.list_snapshots()
        assert pages.has_next and [one.snapshot_id for one in await do(pages.next_items())] == [made.snapshot_id]
        assert not pages.has_next and pages.next_token is None
        await do(sandbox.files.write("note", "later\n"))
        own = await do(Sandbox.create(made.snapshot_id, timeout=1200))
        try:
            assert await do(own.files.read("note")) == "of the snapshot\n"
            assert (await do(own.commands.run("echo $E2B_SANDBOX_ID"))).stdout.strip() == own.sandbox_id
        finally:
            await do(own.kill())
    finally:
        assert await do(Sandbox.delete_snapshot(made.snapshot_id)) is True
    assert await do(Sandbox.delete_snapshot(made.snapshot_id)) is False
    assert await do(Sandbox.list_snapshots(sandbox_id=sandbox.sandbox_id).next_items()) == []
    await raises(e2b.SandboxException, lambda: Sandbox.create(made.snapshot_id), "404")
    await raises(e2b.SandboxNotFoundException, lambda: Sandbox.create_snapshot(unknown_id()))
    await raises(e2b.SandboxException, lambda: sandbox.create_snapshot("base"), "400")
    await raises(e2b.SandboxException, lambda: Sandbox.list_snapshots(limit=1000).next_items(), "400")


@check(*both("Sandbox", "fork"))
async def fork():
    await do(sandbox.files.write("note", "of the fork\n"))
    (own,) = await do(sandbox.fork(timeout=1200))
    try:
        assert own.sandbox_id != sandbox.sandbox_id
        await do(sandbox.files.write("note", "of the source\n"))
        assert await do(own.files.read("note")) == "of the fork\n"
        assert (await do(own.commands.run("echo $GREETING $E2B_SANDBOX_ID"))).stdout.split() == ["hello", own.sandbox_id]
    finally:
        await do(own.kill())
    assert await do(sandbox.is_running())
    await raises(e2b.SandboxNotFoundException, lambda: Sandbox.fork(unknown_id()))


@check(
    "Sandbox.update_network 501",
    "Volume.list 501",
    "Volume.create 501",
    "Volume.connect 501",
    "Volume.get_info 501",
    "Volume.destroy 501",
    "Secret.list 501",
    "Secret.create 501",
    "Secret.get_info 501",
    "Secret.update 501",
    "Secret.destroy 501",
    "Secret.exists 501",
    "SecretPaginator.next_items 501",
)
async def what_is_not_served():
    for call in (
        lambda: sandbox.update_network({"deny_out": []}),
        lambda: Volume.list(),
        lambda: Volume.create("x"),
        lambda: Volume.connect("x"),
        lambda: Volume.get_info("x"),
        lambda: Volume.destroy("x"),
        lambda: Secret.list().next_items(),
        lambda: Secret.create("x", "y"),
        lambda: Secret.get_info("x"),
        lambda: Secret.update("x", "y"),
        lambda: Secret.destroy("x"),
        lambda: Secret.exists("x"),
    ):
        await raises(Exception, call, "501")


def methods():
    """Every public method of the client, `Class.method`, under the blocking client's class names."""
    # What only carries data has no methods of its own worth a test; what the SDK has for itself is not public.
    from e2b.sandbox_async.commands.command import Commands as AsyncCommands
    from e2b.sandbox_async.commands.pty import Pty as AsyncPty
    from e2b.sandbox_async.filesystem.filesystem import Filesystem as AsyncFilesystem
    from e2b.sandbox_async.git import Git as AsyncGit
    from e2b.sandbox_sync.commands.command import Commands
    from e2b.sandbox_sync.commands.pty import Pty
    from e2b.sandbox_sync.filesystem.filesystem import Filesystem

    plain = [Commands, Filesystem, Pty, e2b.Git]
    named = ["CommandHandle", "CommandInputHandle", "SandboxPaginator", "SecretPaginator", "SnapshotPaginator"]
    named += ["Secret", "Volume", "WatchHandle", "Sandbox", "Template"]
    if IS_ASYNC:
        plain = [AsyncCommands, AsyncFilesystem, AsyncPty, AsyncGit]
    for kind in plain + [getattr(e2b, ("Async" if IS_ASYNC else "") + name, None) for name in named]:
        for name in dir(kind) if kind else ():
            if not name.startswith("_"):
                yield f"{kind.__name__.removeprefix('Async')}.{name}"
    # Whatever class the package exports and nobody has looked at yet.
    known = {"Async" + name for name in named} | set(named) | {"Git"}
    for name, kind in vars(e2b).items():
        is_client = inspect.isclass(kind) and any(
            inspect.isfunction(member) and not member_name.startswith("_")
            for member_name, member in vars(kind).items()
        )
        if is_client and name not in known and kind.__module__.startswith("e2b"):
            yield f"{name}.*"


async def main():
    failed = False
    for cases, function in CHECKS:
        try:
            await asyncio.wait_for(function(), DEADLINE)
        except Exception as error:  # every check is told, whatever the others did
            failed = True
            traceback.print_exc()
            for case in cases:
                print(f"failed {case}: {type(error).__name__}: {error}".replace("\n", " "), flush=True)
            if sandbox is None:
                break
            continue
        for case in cases:
            print(f"ok {case}", flush=True)
    if sandbox is not None:
        await do(sandbox.kill())
    sys.exit(failed)


if "--methods" in sys.argv:
    print("\n".join(sorted(set(methods()))))
elif "--checks" in sys.argv:
    print("\n".join(case for cases, _ in CHECKS for case in cases))
else:
    asyncio.run(main())
