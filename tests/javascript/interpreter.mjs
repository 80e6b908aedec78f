// E2B's published code interpreter client for JavaScript against a gateway.
//
// Where the gateway is and who calls it is in E2B_API_URL, E2B_SANDBOX_URL and E2B_API_KEY (`tiffin-gateway env`);
// TIFFIN_JAVASCRIPT is the folder that the client is installed in. The sandbox is of the template `code-interpreter-v1`, which
// the client asks for by itself. Prints a line for each check.

import assert from 'node:assert/strict'
import { createRequire } from 'node:module'
import { join } from 'node:path'

const require = createRequire(join(process.env.TIFFIN_JAVASCRIPT, 'package.json'))
const { Sandbox, NotFoundError, SandboxError, TimeoutError } = require('@e2b/code-interpreter')

// There only to catch a hang; boots and imports under emulation take their time.
const DEADLINE_MS = 300_000
const checks = []
let sandbox

const check = (name, body) => checks.push({ name, body })
const run = (code, options) => sandbox.runCode(code, { timeoutMs: DEADLINE_MS, ...options })

async function raises(kind, call, text = '') {
  let done
  try {
    done = await call()
  } catch (error) {
    assert(error instanceof kind, `expected ${kind.name}, got ${error?.constructor?.name}: ${error}`)
    assert(String(error).includes(text), `${text} is not in ${error}`)
    return error
  }
  assert.fail(`no ${kind.name} but ${JSON.stringify(done)}`)
}

function within(promise) {
  let timer
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error('it took too long')), DEADLINE_MS)
  })
  return Promise.race([promise, late]).finally(() => clearTimeout(timer))
}

check('create', async () => {
  sandbox = await Sandbox.create({
    timeoutMs: 1_800_000,
    requestTimeoutMs: DEADLINE_MS,
    envs: { GREETING: 'hello' },
  })
  const contexts = await sandbox.listCodeContexts()
  assert.deepEqual(contexts.map(({ language, cwd }) => [language, cwd]), [['python', '/home/user']])
})

check('the base SDK works', async () => {
  assert.equal((await sandbox.commands.run('whoami; sudo whoami')).stdout, 'user\nroot\n')
  await sandbox.files.write('note.txt', 'from a file')
  assert.equal((await run("open('note.txt').read()")).text, 'from a file')
  await run("open('made.txt', 'w').write('by code')")
  assert.equal(await sandbox.files.read('made.txt'), 'by code')
})

check('output and results', async () => {
  const seen = []
  const execution = await run("import sys\nprint('to out: é 😀')\nprint('to err', file=sys.stderr)\n6 * 7", {
    onStdout: ({ line, error }) => seen.push(['out', line, error]),
    onStderr: ({ line, error }) => seen.push(['err', line, error]),
    onResult: ({ text, isMainResult }) => seen.push(['result', text, isMainResult]),
  })
  assert.equal(execution.error, undefined)
  assert.equal(execution.text, '42')
  assert.equal(execution.logs.stdout.join(''), 'to out: é 😀\n')
  assert.equal(execution.logs.stderr.join(''), 'to err\n')
  const expected = [
    ['err', 'to err\n', true],
    ['out', 'to out: é 😀\n', false],
    ['result', '42', true],
  ]
  assert.deepEqual(seen.sort(), expected)
  const again = await run("'a text'")
  assert.equal(again.text, 'a text')
  assert.equal(again.executionCount, execution.executionCount + 1)
})

check('rich results', async () => {
  const execution = await run(
    "from IPython.display import HTML, JSON, display\ndisplay(HTML('<b>x</b>'), JSON({'a': 1}))\n" +
      'import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()',
  )
  const [html, json, chart] = execution.results
  assert.equal(html.html, '<b>x</b>')
  assert.deepEqual(json.json, { a: 1 })
  assert.equal(Buffer.from(chart.png, 'base64').toString('latin1', 1, 4), 'PNG')
  assert.deepEqual([html.isMainResult, Object.keys(html.extra)], [false, []])
})

check('errors', async () => {
  const seen = []
  const { error, logs } = await run("print('before')\n1 / 0", { onError: (error) => seen.push(error) })
  assert.deepEqual([error.name, error.value], ['ZeroDivisionError', 'division by zero'])
  assert(error.traceback.includes('Traceback'), error.traceback)
  assert.deepEqual([seen.length, logs.stdout], [1, ['before\n']])
  assert.equal((await run("'after'")).text, 'after')
})

check('state is kept, in each context its own', async () => {
  await run("kept = ['first']")
  await run("kept.append('second')")
  assert.equal((await run('kept')).text, "['first', 'second']")
  const context = await sandbox.createCodeContext({ cwd: '/tmp' })
  assert.deepEqual([context.language, context.cwd], ['python', '/tmp'])
  assert.equal((await run('kept', { context })).error.name, 'NameError')
  assert.equal((await run("import os; kept = 'other'; os.getcwd()", { context })).text, '/tmp')
  await sandbox.restartCodeContext(context)
  assert.equal((await run('kept', { context })).error.name, 'NameError')
  assert.equal((await run('len(kept)')).text, '2')
  await sandbox.removeCodeContext(context)
  assert.equal((await sandbox.listCodeContexts()).length, 1)
  for (const call of [
    () => sandbox.removeCodeContext(context.id),
    () => sandbox.restartCodeContext(context),
    () => run('1', { context }),
  ]) {
    await raises(NotFoundError, call, 'not found')
  }
  await raises(SandboxError, () => sandbox.createCodeContext({ cwd: '/no/such' }), '400')
  await raises(SandboxError, () => run('1', { language: 'cobol' }), '400')
  assert.equal((await run('1', { language: 'python' })).text, '1')
})

check('environment', async () => {
  const code = "import os; os.environ.get('GREETING'), os.environ.get('MORE')"
  assert.equal((await run(code)).text, "('hello', None)")
  assert.equal((await run(code, { envs: { GREETING: 'bye', MORE: '1' } })).text, "('bye', '1')")
  assert.equal((await run(code)).text, "('hello', None)")
})

check('output arrives while code runs', async () => {
  // The code goes on only when the callback has answered the first line: no later event can have brought it.
  const code =
    "import os, time\nprint('say something', flush=True)\n" +
    "while not os.path.exists('answer'):\n    time.sleep(0.05)\n'answered'"
  const onStdout = () => sandbox.files.write('answer', 'heard')
  assert.equal((await run(code, { onStdout })).text, 'answered')
})

check('timeouts interrupt', async () => {
  await run("kept = 'over the interrupt'")
  await raises(TimeoutError, () => run('import time\ntime.sleep(3600)', { timeoutMs: 2000 }), 'Execution timed out')
  assert.equal((await run('kept')).text, 'over the interrupt')
})

check('a dead kernel is told', async () => {
  const { error } = await run('lost = 1\nimport os\nos._exit(3)')
  assert.equal(error.name, 'UnexpectedEndOfExecution')
  assert.equal((await run('lost')).error.name, 'NameError')
})

let failed = false
for (const { name, body } of checks) {
  const began = performance.now()
  try {
    await within(body())
    console.log(`ok ${name} (${((performance.now() - began) / 1000).toFixed(2)} s)`)
  } catch (error) {
    failed = true
    console.error(error)
    console.log(`failed ${name}: ${String(error).replaceAll('\n', ' ')}`)
    if (!sandbox) break
  }
}
await sandbox?.kill()
// The client leaves the timers of its requests behind.
process.exit(failed ? 1 : 0)
