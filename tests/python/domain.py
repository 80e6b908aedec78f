"""Python clients that build host names of the domain, as all do by default: domain.py [--checks]

The test sets E2B_DOMAIN to DOMAIN:PORT, E2B_API_KEY, and SSL_CERT_FILE to the gateway's authority; names are in the hosts file.
Prints `ok METHOD normal|error`. Runs with the first and the current client alike.
"""

import inspect
import sys
import urllib.error
import urllib.request

CASES = """Sandbox.create normal
Commands.run normal
Commands.run error
Commands.send_stdin normal
Filesystem.write normal
Filesystem.read normal
Filesystem.read error
Sandbox.get_host normal
Sandbox.list normal
Sandbox.kill normal"""


def ok(name):
    print("ok", name, flush=True)


def main():
    from e2b import CommandExitException, Sandbox

    # The first client's constructor creates.
    create = getattr(Sandbox, "create", None) or Sandbox
    sandbox = create(timeout=1200, metadata={"who": "python"}, envs={"GREETING": "hello"})
    ok("Sandbox.create normal")

    assert sandbox.commands.run("echo $GREETING; whoami").stdout == "hello\nuser\n"
    ok("Commands.run normal")
    try:
        sandbox.commands.run("exit 3")
        raise AssertionError("it did not fail")
    except CommandExitException as error:
        assert error.exit_code == 3
    ok("Commands.run error")

    # Processes of the older one always have a stdin, those of the newer one where it is asked for.
    stdin = {"stdin": True} if "stdin" in inspect.signature(type(sandbox.commands)._start).parameters else {}
    process = sandbox.commands.run("read line; echo got $line", background=True, **stdin)
    sandbox.commands.send_stdin(process.pid, "one\n")
    assert process.wait().stdout == "got one\n"
    ok("Commands.send_stdin normal")

    text = "é" * 500_000
    sandbox.files.write("big", text)
    ok("Filesystem.write normal")
    assert sandbox.files.read("big") == text
    ok("Filesystem.read normal")
    try:
        sandbox.files.read("/no/such")
        raise AssertionError("it did not fail")
    except Exception as error:
        assert "not" in str(error), error
    ok("Filesystem.read error")

    serve = "mkdir -p site && echo served >site/f && cd site && exec python3 -m http.server 3000"
    server = sandbox.commands.run(serve, background=True, timeout=0)
    while True:
        try:
            with urllib.request.urlopen(f"https://{sandbox.get_host(3000)}/f") as answer:
                assert answer.read() == b"served\n"
            break
        except urllib.error.HTTPError as error:
            # It does not listen yet.
            assert error.code == 502, error
    server.kill()
    ok("Sandbox.get_host normal")

    listed = Sandbox.list()
    items = listed if isinstance(listed, list) else listed.next_items()
    assert any(item.metadata.get("who") == "python" for item in items)
    ok("Sandbox.list normal")

    # The older one's says nothing.
    assert sandbox.kill() is not False
    assert Sandbox.kill(sandbox.sandbox_id) is False
    ok("Sandbox.kill normal")


if "--checks" in sys.argv:
    print(CASES)
else:
    main()
