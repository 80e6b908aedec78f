// E2B's published JavaScript client against a gateway: gateway.mjs [--checks|--methods]
//
// Where the gateway is and who calls it is in E2B_API_URL, E2B_SANDBOX_URL and E2B_API_KEY (`tiffin-gateway env`);
// TIFFIN_JAVASCRIPT is the folder that the client is installed in. Prints a line for each method and case that was checked,
// `ok METHOD normal|error|501`, or `failed METHOD CASE: WHY`. `--checks` lists what would be checked, `--methods` every public
// method of the client; tests/sdk-methods.txt brings the two together.

import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'

import { register } from './template-checks.mjs'

const require = createRequire(join(process.env.TIFFIN_JAVASCRIPT, 'package.json'))
const e2b = require('e2b')
const { Sandbox, Template, Volume, Secret } = e2b

// There only to catch a hang; boots under emulation take their time.
const DEADLINE_MS = 300_000
const NOBODY = 4_000_000
const run = randomUUID()
const checks = []
let sandbox

const check = (cases, body) => checks.push({ cases: cases.split(',').map((name) => name.trim()), body })
const both = (names) => names.split(',').map((name) => `${name.trim()} normal, ${name.trim()} error`).join(',')
const unknownId = () => 'none' + randomUUID().replaceAll('-', '').slice(0, 12)

async function raises(kind, call, text = '') {
  let done
  try {
    done = await call()
  } catch (error) {
    assert(error instanceof kind, `expected ${kind.name}, got ${error?.constructor?.name}: ${error}`)
    assert(String(error).includes(text), `${text} is not in ${error}`)
    return error
  }
  assert.fail(`no ${kind.name} but ${done}`)
}

function within(promise) {
  let timer
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error('it took too long')), DEADLINE_MS)
  })
  return Promise.race([promise, late]).finally(() => clearTimeout(timer))
}

check('Sandbox.create normal', async () => {
  sandbox = await Sandbox.create({
    timeoutMs: 1_200_000,
    metadata: { who: 'é & =', run },
    envs: { GREETING: 'hello' },
  })
  const said = await sandbox.commands.run('echo $GREETING $E2B_SANDBOX_ID')
  assert.equal(said.stdout, `hello ${sandbox.sandboxId}\n`)
})

check('Sandbox.create error', () => raises(e2b.SandboxError, () => Sandbox.create('no-such-template'), '404'))

check(`${both('Sandbox.connect')}, Sandbox.isRunning normal`, async () => {
  const other = await Sandbox.connect(sandbox.sandboxId)
  assert(await other.isRunning())
  assert.equal((await other.commands.run('echo $GREETING')).stdout, 'hello\n')
  await raises(e2b.SandboxNotFoundError, () => Sandbox.connect(unknownId()))
})

check(both('Sandbox.getInfo, Sandbox.getFullInfo'), async () => {
  for (const info of [await sandbox.getInfo(), await Sandbox.getFullInfo(sandbox.sandboxId)]) {
    assert.equal(info.sandboxId, sandbox.sandboxId)
    assert.deepEqual(info.metadata, { who: 'é & =', run })
  }
  assert.equal((await sandbox.getInfo()).state, 'running')
  await raises(e2b.SandboxNotFoundError, () => Sandbox.getInfo(unknownId()))
  await raises(e2b.SandboxNotFoundError, () => Sandbox.getFullInfo(unknownId()))
})

check(
  'Sandbox.list normal, Sandbox.list error, Paginator.hasNext normal, Paginator.nextToken normal, ' +
    'SandboxPaginator.nextItems normal, SandboxPaginator.nextItems error',
  async () => {
    const second = await Sandbox.create({ metadata: { run } })
    try {
      for (const [metadata, expected] of [
        [{ run }, [sandbox.sandboxId, second.sandboxId]],
        [{ run, who: 'é & =' }, [sandbox.sandboxId]],
        [{ run: 'other' }, []],
      ]) {
        const pages = Sandbox.list({ query: { metadata, state: ['running'] }, limit: 1 })
        const found = []
        while (pages.hasNext) {
          const page = await pages.nextItems()
          assert(page.length <= 1)
          found.push(...page.map((item) => item.sandboxId))
        }
        assert.equal(pages.nextToken, undefined)
        assert.deepEqual(found.sort(), [...expected].sort())
        await raises(Error, () => pages.nextItems(), 'No more items')
      }
    } finally {
      await second.kill()
    }
    await raises(e2b.AuthenticationError, () => Sandbox.list({ apiKey: 'e2b_' + '0'.repeat(40) }).nextItems())
  },
)

check(both('Sandbox.setTimeout'), async () => {
  await sandbox.setTimeout(1_800_000)
  const info = await sandbox.getInfo()
  const left = info.endAt - info.startedAt
  assert(left > 1_700_000 && left < 1_800_000 + DEADLINE_MS, String(left))
  await raises(e2b.SandboxError, () => Sandbox.setTimeout(unknownId(), 60_000))
})

check(both('Sandbox.getMetrics'), async () => {
  for (const metric of await sandbox.getMetrics()) assert(metric.memTotal > 0 && metric.diskTotal > 0)
  await raises(e2b.SandboxError, () => Sandbox.getMetrics(unknownId()))
})

check(`${both('Sandbox.kill')}, Sandbox.isRunning error, Commands.run error, Commands.list error`, async () => {
  const victim = await Sandbox.create()
  assert.equal(await victim.kill(), true)
  assert.equal(await Sandbox.kill(victim.sandboxId), false)
  assert.equal(await victim.isRunning(), false)
  await raises(e2b.SandboxNotFoundError, () => victim.commands.run('true'))
  await raises(e2b.SandboxError, () => victim.commands.list())
})

check('Sandbox.getHost normal', () => {
  assert(sandbox.getHost(8080).startsWith(`8080-${sandbox.sandboxId}.`), sandbox.getHost(8080))
})

// A signed URL, routed by headers as the SDK's own requests are.
function byHeaders(url, body) {
  const headers = { 'E2b-Sandbox-Id': sandbox.sandboxId, 'E2b-Sandbox-Port': '49983' }
  return fetch(url, { headers, body, method: body ? 'POST' : 'GET' })
}

check(both('Sandbox.downloadUrl, Sandbox.uploadUrl'), async () => {
  const form = () => {
    const data = new FormData()
    data.append('file', new Blob(['sent']), 'x')
    return data
  }
  const upload = await sandbox.uploadUrl('/home/user/signed')
  assert.equal((await byHeaders(upload, form())).status, 200)
  const url = await sandbox.downloadUrl('/home/user/signed', { useSignatureExpiration: 600 })
  assert.equal(await (await byHeaders(url)).text(), 'sent')
  const late = await sandbox.downloadUrl('/home/user/signed', { useSignatureExpiration: -600 })
  assert.equal((await byHeaders(late)).status, 401)
  assert.equal((await byHeaders(upload.replace('signature=v1_', 'signature=v1_x'), form())).status, 401)
})

check('Commands.run normal', async () => {
  let streamed = ''
  const onStdout = (text) => void (streamed += text)
  const done = await sandbox.commands.run("echo out; echo err >&2; printf 'ü\\n'", { onStdout, cwd: '/tmp' })
  assert.deepEqual([done.stdout, done.stderr, done.exitCode, streamed], ['out\nü\n', 'err\n', 0, 'out\nü\n'])
  const who = await sandbox.commands.run('whoami; pwd; sudo whoami')
  assert.equal(who.stdout, 'user\n/home/user\nroot\n')
  const env = await sandbox.commands.run('echo $A; pwd', { envs: { A: '1' }, cwd: '/tmp', user: 'root' })
  assert.equal(env.stdout, '1\n/tmp\n')
  const error = await raises(e2b.CommandExitError, () => sandbox.commands.run('echo bad >&2; exit 3'))
  assert.deepEqual([error.exitCode, error.stderr, error.stdout], [3, 'bad\n', ''])
  await raises(e2b.TimeoutError, () => sandbox.commands.run('sleep 1000', { timeoutMs: 1000 }))
  await raises(e2b.InvalidArgumentError, () => sandbox.commands.run('true', { cwd: '/no/such' }))
  await raises(e2b.AuthenticationError, () => sandbox.commands.run('true', { user: 'nosuchuser' }))
})

check(
  `Commands.list normal, ${both('Commands.kill, CommandHandle.kill')}, CommandHandle.wait error`,
  async () => {
    const handle = await sandbox.commands.run('sleep 1000', { background: true, timeoutMs: 0 })
    const pids = (await sandbox.commands.list()).map((process) => process.pid)
    assert(pids.includes(handle.pid))
    assert.equal(await handle.kill(), true)
    await raises(e2b.CommandExitError, () => handle.wait())
    assert.equal(await sandbox.commands.kill(handle.pid), false)
    assert.equal(await handle.kill(), false)
    const other = await sandbox.commands.run('sleep 1000', { background: true, timeoutMs: 0 })
    assert.equal(await sandbox.commands.kill(other.pid), true)
    await raises(e2b.CommandExitError, () => other.wait())
  },
)

check(
  `${both('Commands.connect, Commands.sendStdin, Commands.closeStdin, CommandHandle.sendStdin, CommandHandle.closeStdin')}, ` +
    'CommandHandle.wait normal, CommandHandle.disconnect normal, ' +
    'CommandHandle.stdout normal, CommandHandle.stderr normal, CommandHandle.exitCode normal, CommandHandle.error normal',
  async () => {
    const options = { background: true, stdin: true, timeoutMs: 0 }
    const first = await sandbox.commands.run('cat', options)
    const second = await sandbox.commands.connect(first.pid, { timeoutMs: 0 })
    const third = await sandbox.commands.connect(first.pid, { timeoutMs: 0 })
    await sandbox.commands.sendStdin(first.pid, 'hello\n')
    await second.sendStdin('again\n')
    await third.disconnect()
    await second.closeStdin()
    for (const handle of [first, second]) {
      const done = await handle.wait()
      assert.deepEqual([done.stdout, done.exitCode], ['hello\nagain\n', 0])
      assert.deepEqual([handle.stdout, handle.stderr, handle.exitCode, !handle.error], ['hello\nagain\n', '', 0, true])
    }
    const last = await sandbox.commands.run('cat', options)
    await sandbox.commands.closeStdin(last.pid)
    assert.equal((await last.wait()).exitCode, 0)
    await raises(e2b.NotFoundError, () => sandbox.commands.connect(NOBODY))
    await raises(e2b.SandboxError, () => sandbox.commands.sendStdin(NOBODY, 'x'))
    await raises(e2b.SandboxError, () => sandbox.commands.closeStdin(NOBODY))
    await raises(e2b.SandboxError, () => first.sendStdin('x'))
    await raises(e2b.SandboxError, () => first.closeStdin())
  },
)

check(both('Filesystem.read, Filesystem.write, Filesystem.writeFiles, Filesystem.list'), async () => {
  const data = new Uint8Array(1_000_000).map((_, at) => at)
  const written = await sandbox.files.write('w/deep/er', data.buffer)
  assert.deepEqual([written.name, written.path], ['er', '/home/user/w/deep/er'])
  assert.deepEqual(await sandbox.files.read('w/deep/er', { format: 'bytes' }), data)
  const stream = await sandbox.files.read('w/deep/er', { format: 'stream' })
  assert.equal((await new Response(stream).arrayBuffer()).byteLength, data.length)
  await sandbox.files.write('w/text', 'ü')
  assert.equal(await sandbox.files.read('w/text'), 'ü')
  await sandbox.files.writeFiles([{ path: 'm/1', data: 'a' }, { path: 'm/2', data: 'b' }])
  assert.deepEqual((await sandbox.files.list('m')).map((entry) => entry.name), ['1', '2'])
  await raises(e2b.FileNotFoundError, () => sandbox.files.read('w/missing'))
  await raises(e2b.FileNotFoundError, () => sandbox.files.list('w/missing'))
  await raises(e2b.InvalidArgumentError, () => sandbox.files.write('/home/user', 'x'))
  await raises(e2b.InvalidArgumentError, () => sandbox.files.writeFiles([{ path: '/home/user', data: 'x' }]))
})

check(
  both('Filesystem.makeDir, Filesystem.rename, Filesystem.exists, Filesystem.remove, Filesystem.getInfo'),
  async () => {
    assert.equal(await sandbox.files.makeDir('made/below'), true)
    assert.equal(await sandbox.files.makeDir('made/below'), false)
    assert.equal((await sandbox.files.rename('made', 'moved')).path, '/home/user/moved')
    assert.equal(await sandbox.files.exists('moved/below'), true)
    assert.equal(await sandbox.files.exists('made'), false)
    const info = await sandbox.files.getInfo('moved')
    assert.deepEqual([info.name, info.type, info.owner], ['moved', 'dir', 'user'])
    await sandbox.files.remove('moved')
    await raises(e2b.FileNotFoundError, () => sandbox.files.getInfo('moved'))
    await raises(e2b.FileNotFoundError, () => sandbox.files.rename('moved', 'other'))
    await sandbox.files.write('plain', '')
    await raises(e2b.InvalidArgumentError, () => sandbox.files.makeDir('plain'))
    await raises(e2b.InvalidArgumentError, () => sandbox.files.exists('~nobody/x'))
    await raises(e2b.SandboxError, () => sandbox.files.remove('/proc/1/status'))
  },
)

check(`${both('Filesystem.watchDir')}, WatchHandle.stop normal`, async () => {
  await sandbox.files.makeDir('watched/sub')
  let seen
  const arrived = new Promise((resolve) => (seen = resolve))
  const onEvent = (event) => event.name === 'sub/new' && event.type === 'create' && seen()
  const handle = await sandbox.files.watchDir('watched', onEvent, { recursive: true, timeoutMs: 0 })
  await sandbox.files.write('watched/sub/new', 'x')
  await arrived
  await handle.stop()
  await raises(e2b.FileNotFoundError, () => sandbox.files.watchDir('missing', onEvent))
})

check(both('Pty.create, Pty.resize, Pty.sendInput, Pty.connect, Pty.kill'), async () => {
  const bytes = (text) => new TextEncoder().encode(text)
  const output = { shown: '', again: '' }
  const collect = (name) => (data) => void (output[name] += new TextDecoder().decode(data))
  const handle = await sandbox.pty.create({ cols: 80, rows: 24, onData: collect('shown'), timeoutMs: 0 })
  const other = await sandbox.pty.connect(handle.pid, { onData: collect('again'), timeoutMs: 0 })
  await sandbox.pty.resize(handle.pid, { cols: 101, rows: 33 })
  await sandbox.pty.sendInput(handle.pid, bytes('stty size; exit 5\n'))
  assert.equal((await raises(e2b.CommandExitError, () => handle.wait())).exitCode, 5)
  await raises(e2b.CommandExitError, () => other.wait())
  assert(output.shown.includes('33 101') && output.again.includes('33 101'), JSON.stringify(output))
  const last = await sandbox.pty.create({ cols: 80, rows: 24, onData: () => {}, timeoutMs: 0 })
  assert.equal(await sandbox.pty.kill(last.pid), true)
  await raises(e2b.CommandExitError, () => last.wait())
  assert.equal(await sandbox.pty.kill(last.pid), false)
  const nowhere = { cols: 80, rows: 24, onData: () => {}, cwd: '/no/such' }
  await raises(e2b.InvalidArgumentError, () => sandbox.pty.create(nowhere))
  await raises(e2b.NotFoundError, () => sandbox.pty.connect(NOBODY, { onData: () => {} }))
  await raises(e2b.SandboxError, () => sandbox.pty.resize(NOBODY, { cols: 1, rows: 1 }))
  await raises(e2b.SandboxError, () => sandbox.pty.sendInput(NOBODY, bytes('x')))
})

check(
  both(
    'Git.init, Git.configureUser, Git.setConfig, Git.getConfig, Git.add, Git.commit, Git.status, Git.branches, ' +
      'Git.createBranch, Git.checkoutBranch, Git.deleteBranch, Git.reset, Git.restore',
  ),
  async () => {
    const git = sandbox.git
    await git.init('repo', { initialBranch: 'main' })
    await git.configureUser('Tiffin', 'tiffin@example.com')
    await git.setConfig('pull.rebase', 'true')
    assert.equal(await git.getConfig('pull.rebase'), 'true')
    await sandbox.files.write('repo/a', '1')
    await git.add('repo')
    await git.commit('repo', 'first')
    assert.equal((await git.status('repo')).isClean, true)
    await git.createBranch('repo', 'side')
    assert.equal((await git.branches('repo')).currentBranch, 'side')
    await git.checkoutBranch('repo', 'main')
    await git.deleteBranch('repo', 'side')
    await sandbox.files.write('repo/a', '2')
    await git.restore('repo', { paths: ['a'] })
    assert.equal(await sandbox.files.read('repo/a'), '1')
    await sandbox.files.write('repo/a', '3')
    await git.reset('repo', { mode: 'hard' })
    assert.equal(await sandbox.files.read('repo/a'), '1')
    const no = '/no/such'
    for (const call of [
      () => git.init('/proc/none'),
      () => git.configureUser('a', 'b', { scope: 'local', path: no }),
      () => git.setConfig('bad key', 'x'),
      () => git.getConfig('', {}),
      () => git.add(no),
      () => git.commit('repo', 'nothing'),
      () => git.status(no),
      () => git.branches(no),
      () => git.createBranch(no, 'x'),
      () => git.checkoutBranch('repo', 'none'),
      () => git.deleteBranch('repo', 'none'),
      () => git.reset('repo', { target: 'none' }),
      () => git.restore('repo', { paths: ['none'] }),
    ]) {
      await raises(Error, call)
    }
  },
)

check(
  both('Git.clone, Git.remoteAdd, Git.push, Git.pull, Git.dangerouslyAuthenticate') + ', Git.remoteGet normal',
  async () => {
    const git = sandbox.git
    await git.init('/home/user/bare.git', { bare: true, initialBranch: 'main' })
    await git.init('/home/user/work', { initialBranch: 'main' })
    await git.configureUser('Tiffin', 'tiffin@example.com')
    await git.remoteAdd('work', 'origin', '/home/user/bare.git')
    assert.equal(await git.remoteGet('work', 'origin'), '/home/user/bare.git')
    assert.equal(await git.remoteGet('work', 'none'), undefined)
    await git.commit('work', 'first', { allowEmpty: true })
    await git.push('work', { remote: 'origin', branch: 'main' })
    await git.clone('/home/user/bare.git', { path: 'copy' })
    await git.pull('copy')
    await git.dangerouslyAuthenticate({ username: 'me', password: 'secret', host: 'git.example.com' })
    for (const call of [
      () => git.clone('/no/such.git', { path: 'other' }),
      () => git.remoteAdd('/no/such', 'x', '/y'),
      () => git.push('work', { remote: 'none', branch: 'main' }),
      () => git.pull('/no/such'),
      () => git.dangerouslyAuthenticate({ username: '', password: '' }),
    ]) {
      await raises(Error, call)
    }
  },
)

check(both('Template.exists, Template.aliasExists'), async () => {
  assert.equal(await Template.exists('base'), true)
  assert.equal(await Template.aliasExists('base'), true)
  assert.equal(await Template.exists('no-such-template'), false)
  assert.equal(await Template.aliasExists('no-such-template'), false)
})

register({ e2b, check, both, raises, deadline: DEADLINE_MS })

const BOOT = 'cat /proc/sys/kernel/random/boot_id; cat ~/note'

check(both('Sandbox.pause, Sandbox.betaPause'), async () => {
  const own = await Sandbox.create({
    timeoutMs: 1_200_000,
    metadata: { run: `${run}p` },
    lifecycle: { onTimeout: 'pause', autoResume: true },
  })
  try {
    const before = (await own.commands.run(`echo kept > ~/note; ${BOOT}`)).stdout
    assert.deepEqual((await own.getInfo()).lifecycle, { onTimeout: 'pause', autoResume: true })
    assert.equal(await own.pause(), true)
    assert.equal(await own.pause(), false, 'it is paused already')
    const listed = await Sandbox.list({ query: { metadata: { run: `${run}p` }, state: ['paused'] } }).nextItems()
    assert.deepEqual(listed.map(({ sandboxId, state }) => [sandboxId, state]), [[own.sandboxId, 'paused']])
    await raises(e2b.SandboxError, () => own.setTimeout(60_000), '409')
    const again = await Sandbox.connect(own.sandboxId, { timeoutMs: 1_200_000 })
    assert.equal((await again.commands.run(BOOT)).stdout, before, 'the same machine goes on')
    assert.equal(await again.betaPause(), true)
    // Requests at once resume it, and share that.
    const all = await Promise.all([1, 2, 3].map(() => own.commands.run(BOOT)))
    for (const { stdout } of all) assert.equal(stdout, before)
  } finally {
    assert.equal(await own.kill(), true)
  }
  await raises(e2b.SandboxNotFoundError, () => Sandbox.pause(unknownId()))
  await raises(e2b.SandboxNotFoundError, () => Sandbox.betaPause(unknownId()))
})

check(both('Sandbox.createSnapshot, Sandbox.listSnapshots, Sandbox.deleteSnapshot, SnapshotPaginator.nextItems'), async () => {
  const name = `snap-${run.slice(0, 8)}`
  await sandbox.files.write('note', 'of the snapshot')
  const made = await sandbox.createSnapshot({ name })
  assert.deepEqual(made.names, [`${name}:default`])
  try {
    const pages = sandbox.listSnapshots()
    assert.deepEqual((await pages.nextItems()).map((one) => one.snapshotId), [made.snapshotId])
    assert.equal(pages.hasNext, false)
    await sandbox.files.write('note', 'later')
    const own = await Sandbox.create(name, { timeoutMs: 1_200_000 })
    try {
      assert.equal(await own.files.read('note'), 'of the snapshot')
    } finally {
      await own.kill()
    }
  } finally {
    assert.equal(await Sandbox.deleteSnapshot(made.snapshotId), true)
  }
  assert.equal(await Sandbox.deleteSnapshot(made.snapshotId), false)
  await raises(e2b.SandboxNotFoundError, () => Sandbox.createSnapshot(unknownId()))
  await raises(e2b.SandboxError, () => Sandbox.listSnapshots({ limit: 1000 }).nextItems(), '400')
})

check(both('Sandbox.fork'), async () => {
  await sandbox.files.write('note', 'of the fork')
  const [own] = await sandbox.fork({ timeoutMs: 1_200_000 })
  try {
    assert.notEqual(own.sandboxId, sandbox.sandboxId)
    await sandbox.files.write('note', 'of the source')
    assert.equal(await own.files.read('note'), 'of the fork')
    assert.equal((await own.commands.run('echo $E2B_SANDBOX_ID')).stdout, `${own.sandboxId}\n`)
  } finally {
    await own.kill()
  }
  await raises(e2b.SandboxNotFoundError, () => Sandbox.fork(unknownId()))
})

const NOT_SERVED = {
  'Sandbox.updateNetwork': () => sandbox.updateNetwork({ denyOut: [] }),
  'Volume.list': () => Volume.list(),
  'Volume.create': () => Volume.create('x'),
  'Volume.connect': () => Volume.connect('x'),
  'Volume.getInfo': () => Volume.getInfo('x'),
  'Volume.destroy': () => Volume.destroy('x'),
  'Secret.list': () => Secret.list().nextItems(),
  'SecretPaginator.nextItems': () => Secret.list().nextItems(),
  'Secret.create': () => Secret.create('x', 'y'),
  'Secret.getInfo': () => Secret.getInfo('x'),
  'Secret.update': () => Secret.update('x', 'y'),
  'Secret.destroy': () => Secret.destroy('x'),
  'Secret.exists': () => Secret.exists('x'),
}
for (const [name, call] of Object.entries(NOT_SERVED)) check(`${name} 501`, () => raises(Error, call, '501'))

// Every public method, out of the client's own declarations: at run time its private ones look like all others.
function* methods() {
  const text = readFileSync(join(process.env.TIFFIN_JAVASCRIPT, 'node_modules/e2b/dist/index.d.ts'), 'utf8')
  // What only carries data or configures the client; errors.
  const skip = /Error$|Config$|^(ClientFactory|ApiClient|EnvdApiClient|E2B|LogEntry.*|ReadyCmd)$/
  for (const [, name, body] of text.matchAll(/^declare (?:abstract )?class (\w+)[^\n]*\{\n(.*?)^\}/gms)) {
    if (skip.test(name)) continue
    const shown = { SandboxApi: 'Sandbox', TemplateBase: 'Template' }[name] ?? name
    for (const [, member] of body.matchAll(/^ {2}(?:static )?(?:get )?(?:abstract )?(\w+)(?:<[^\n]*>)?\(/gm)) {
      if (member !== 'constructor') yield `${shown}.${member}`
    }
  }
}

async function main() {
  let failed = false
  for (const { cases, body } of checks) {
    try {
      await within(Promise.resolve().then(body))
      for (const name of cases) console.log(`ok ${name}`)
    } catch (error) {
      failed = true
      console.error(error)
      for (const name of cases) console.log(`failed ${name}: ${String(error).replaceAll('\n', ' ')}`)
      if (!sandbox) break
    }
  }
  await sandbox?.kill()
  process.exit(failed ? 1 : 0)
}

if (process.argv.includes('--methods')) console.log([...new Set(methods())].sort().join('\n'))
else if (process.argv.includes('--checks')) console.log(checks.flatMap(({ cases }) => cases).join('\n'))
else await main()
