"""E2B's published code interpreter client for Python against a gateway: interpreter.py sync|async [--extended TEMPLATE]

Where the gateway is and who calls it is in E2B_API_URL, E2B_SANDBOX_URL and E2B_API_KEY (`tiffin-gateway env`). The same checks
run with the blocking and with the asyncio client, in a sandbox of the template `code-interpreter-v1`, which the client asks for
by itself. TEMPLATE is one whose image adds the package `cowsay`. Prints a line for each check.
"""

import asyncio
import base64
import inspect
import sys
import time
import traceback

import e2b
import e2b_code_interpreter

IS_ASYNC = sys.argv[1] == "async"
EXTENDED = sys.argv[sys.argv.index("--extended") + 1] if "--extended" in sys.argv else None
Sandbox = e2b_code_interpreter.AsyncSandbox if IS_ASYNC else e2b_code_interpreter.Sandbox

# There only to catch a hang; boots and imports under emulation take their time.
DEADLINE = 300
CHECKS = []
sandbox = None


def check(function):
    CHECKS.append(function)
    return function


async def do(value):
    """The result of a call, of either client."""
    return await value if inspect.isawaitable(value) else value


async def run(code, **options):
    return await do(sandbox.run_code(code, **options))


async def raises(kind, call, text=""):
    try:
        done = await do(call())
    except kind as error:
        assert text in str(error), f"{text!r} is not in {error!r}"
        return error
    raise AssertionError(f"no {kind.__name__} but {done!r}")


@check
async def create():
    global sandbox
    sandbox = await do(Sandbox.create(timeout=1800, request_timeout=DEADLINE, envs={"GREETING": "hello"}))
    # Ready means that code runs at once, in the one context that is there.
    (context,) = await do(sandbox.list_code_contexts())
    assert (context.language, context.cwd) == ("python", "/home/user"), context


@check
async def the_base_sdk_works():
    assert (await do(sandbox.commands.run("whoami; pwd; sudo whoami"))).stdout.split() == ["user", "/home/user", "root"]
    await do(sandbox.files.write("note.txt", "from a file"))
    assert (await run("open('note.txt').read()")).text == "from a file"
    await run("open('made.txt', 'w').write('by code')")
    assert await do(sandbox.files.read("made.txt")) == "by code"
    assert (await do(sandbox.files.get_info("made.txt"))).owner == "user"
    # What a shell calls Python is what code runs in.
    path = (await do(sandbox.commands.run("which python3 pip"))).stdout.split()
    assert path == ["/opt/python/bin/python3", "/opt/python/bin/pip"], path


@check
async def output_and_results():
    seen = []
    execution = await run(
        "import sys\nprint('to out: é \U0001f600')\nprint('to err\\u2028', file=sys.stderr)\n6 * 7",
        on_stdout=lambda message: seen.append(("out", message.line, message.error)),
        on_stderr=lambda message: seen.append(("err", message.line, message.error)),
        on_result=lambda result: seen.append(("result", result.text, result.is_main_result)),
    )
    assert execution.error is None and execution.text == "42", execution
    # IPython itself warns about the U+2028 in no line of ours.
    assert "".join(execution.logs.stdout) == "to out: é \U0001f600\n", execution
    assert "".join(execution.logs.stderr) == "to err\u2028\n", execution
    expected = [("err", "to err\u2028\n", True), ("out", "to out: é \U0001f600\n", False), ("result", "42", True)]
    assert sorted(seen) == expected, seen
    again = await run("'a text'")
    assert again.text == "a text" and again.execution_count == execution.execution_count + 1, again
    assert (await run("pass")).results == []


@check
async def rich_results():
    execution = await run(
        "from IPython.display import HTML, JSON, Markdown, display\n"
        "display(HTML('<b>x</b>'), Markdown('*x*'), JSON({'a': 1}))\n"
        "display({'x-made/up': 'y'}, raw=True)"
    )
    html, markdown, json, extra = execution.results
    assert (html.html, markdown.markdown, json.json, extra.extra) == ("<b>x</b>", "*x*", {"a": 1}, {"x-made/up": "y"})
    assert not any(result.is_main_result for result in execution.results) and execution.text is None
    # A message of the code's own making, without what it must have: told, and it ends nothing.
    unreadable = await run(
        "kernel = get_ipython().kernel\n"
        "kernel.session.send(kernel.iopub_socket, 'display_data', {}, parent=kernel.get_parent())\n'after'"
    )
    assert unreadable.error.name == "UnreadableOutput" and unreadable.text == "after", unreadable
    execution = await run("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()")
    (chart,) = execution.results
    assert base64.b64decode(chart.png).startswith(b"\x89PNG"), chart
    table = (await run("import pandas\npandas.DataFrame({'a': [1]})")).results[0]
    assert "<table" in table.html and table.is_main_result, table


@check
async def errors():
    seen = []
    execution = await run("print('before')\n1 / 0", on_error=seen.append)
    error = execution.error
    assert (error.name, error.value) == ("ZeroDivisionError", "division by zero"), error
    assert "Traceback" in error.traceback and "1" in error.traceback, error
    assert seen == [error] and execution.logs.stdout == ["before\n"] and execution.results == []
    assert (await run("def f(:")).error.name == "SyntaxError"
    assert (await run("input()")).error.name == "StdinNotImplementedError"
    assert (await run("'after'")).text == "after"


@check
async def state_is_kept():
    await run("kept = ['first']\ndef add(x):\n    kept.append(x)")
    await run("add('second')")
    assert (await run("kept")).text == "['first', 'second']"
    assert (await run("exit()\n'exit ends nothing'")).text == "exit ends nothing"
    assert (await run("len(kept)")).text == "2"


@check
async def contexts():
    await run("here = 'default'")
    context = await do(sandbox.create_code_context(cwd="/tmp", language="python"))
    assert (context.language, context.cwd) == ("python", "/tmp"), context
    listed = {context.id for context in await do(sandbox.list_code_contexts())}
    assert context.id in listed and len(listed) == 2, listed
    assert (await run("here", context=context)).error.name == "NameError"
    assert (await run("import os; here = 'other'; os.getcwd()", context=context)).text == "/tmp"
    assert (await run("here")).text == "default"
    await do(sandbox.restart_code_context(context))
    assert (await run("here", context=context)).error.name == "NameError"
    assert (await run("here")).text == "default"
    await do(sandbox.remove_code_context(context.id))
    assert len(await do(sandbox.list_code_contexts())) == 1
    for call in (
        lambda: sandbox.remove_code_context(context),
        lambda: sandbox.restart_code_context(context),
        lambda: sandbox.run_code("1", context=context),
    ):
        await raises(e2b.NotFoundException, call, "not found")
    await raises(e2b.SandboxException, lambda: sandbox.create_code_context(cwd="/no/such"), "'/no/such' is no directory")
    await raises(e2b.SandboxException, lambda: sandbox.create_code_context(language="cobol"), "there is: python")
    await raises(e2b.SandboxException, lambda: run("1", language="cobol"), "400")
    assert (await run("1", language="python")).text == "1"


@check
async def environment():
    code = "import os; os.environ.get('GREETING'), os.environ.get('MORE')"
    assert (await run(code)).text == "('hello', None)"
    assert (await run(code, envs={"GREETING": "bye", "MORE": "1"})).text == "('bye', '1')"
    assert (await run(code)).text == "('hello', None)"


@check
async def output_arrives_while_code_runs():
    # The code goes on only when the callback has answered the first line: no later event can have brought it.
    def answer(_message):
        return sandbox.files.write("answer", "heard")

    code = (
        "import os, time\nprint('say something', flush=True)\nwhile not os.path.exists('answer'):\n    time.sleep(0.05)\n'answered'"
    )
    assert (await run(code, on_stdout=answer, timeout=DEADLINE)).text == "answered"


@check
async def timeouts_interrupt():
    await run("kept = 'over the interrupt'")
    await raises(e2b.TimeoutException, lambda: run("import time\ntime.sleep(3600)", timeout=2), "Execution timed out")
    # It does not wait for the hour, and the state is still there.
    assert (await run("kept")).text == "over the interrupt"


@check
async def a_dead_kernel_is_told():
    error = (await run("lost = 1\nimport os\nos._exit(3)")).error
    assert error.name == "UnexpectedEndOfExecution" and "exit status 3" in error.value, error
    assert (await run("lost")).error.name == "NameError"


@check
async def much_output():
    execution = await run("for line in range(200000):\n    print(line)")
    assert "".join(execution.logs.stdout) == "".join(f"{line}\n" for line in range(200000))


async def an_image_from_this_one():
    extended = await do(Sandbox.create(EXTENDED, request_timeout=DEADLINE))
    try:
        said = await do(extended.run_code("import cowsay\nprint(cowsay.get_output_string('cow', 'moo'))"))
        assert "| moo |" in "".join(said.logs.stdout), said
    finally:
        await do(extended.kill())


if EXTENDED:
    check(an_image_from_this_one)


async def main():
    failed = False
    for function in CHECKS:
        began = time.monotonic()
        try:
            await asyncio.wait_for(function(), DEADLINE)
            print(f"ok {function.__name__} ({time.monotonic() - began:.2f} s)", flush=True)
        except Exception as error:  # every check is told, whatever the others did
            failed = True
            traceback.print_exc()
            print(f"failed {function.__name__}: {type(error).__name__}: {error}".replace("\n", " "), flush=True)
            if sandbox is None:
                break
    if sandbox is not None:
        await do(sandbox.kill())
    sys.exit(failed)


asyncio.run(main())
