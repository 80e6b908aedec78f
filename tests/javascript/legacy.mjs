// The first SDK, `@e2b/sdk` 0.12.5, against a gateway: legacy.mjs
//
// With TLS (TIFFIN_TLS=1, NODE_EXTRA_CA_CERTS, names in the hosts file) the client is used without any option of its own making.
// Without it the test sets TIFFIN_DOMAIN and E2B_DOMAIN to DOMAIN:PORT, as the gateway has them (the API is http://api.DOMAIN:PORT then, for
// E2B_SECURE=false), E2B_API_KEY, and NODE_OPTIONS=--require=loopback.cjs; TIFFIN_JAVASCRIPT is where the client is installed.
// Prints `ok METHOD normal|error` or `failed METHOD CASE: WHY`; with `--checks`, what it would check.

import assert from 'node:assert/strict'
import { createRequire } from 'node:module'
import { join } from 'node:path'

const require = createRequire(join(process.env.TIFFIN_JAVASCRIPT, 'package.json'))
const { Sandbox } = require('@e2b/sdk')

// Without it the WebSocket would be wss://; the API is used as ever.
const insecure = process.env.TIFFIN_TLS ? {} : { __debug_devEnv: 'local' }
const options = { ...insecure, timeout: 300_000 }
const checks = []
const check = (cases, body) => checks.push({ cases: cases.split(',').map((name) => name.trim()), body })
const both = (names) => names.split(',').map((name) => `${name.trim()} normal, ${name.trim()} error`).join(',')
let sandbox

async function fails(call, pattern = /./) {
  await assert.rejects(call, (error) => pattern.test(String(error?.message ?? error)))
}

check('Sandbox.create normal, Sandbox.list normal', async () => {
  sandbox = await Sandbox.create({ ...options, metadata: { a: 'b' } })
  const found = (await Sandbox.list()).find(({ sandboxID }) => sandboxID === sandbox.id)
  assert.deepEqual(found?.metadata, { a: 'b' })
})

check('Sandbox.create error', () => fails(() => Sandbox.create({ ...options, template: 'no-such-template' })))

check(`process.start normal, process.startAndWait normal, Process.wait normal`, async () => {
  const lines = []
  const process = await sandbox.process.start({
    cmd: 'echo out; echo; echo err >&2; echo $A $PYTHONUNBUFFERED; pwd; whoami; exit 3',
    envVars: { A: 'a' },
    onStdout: ({ line }) => lines.push(line),
  })
  const output = await process.wait()
  assert.deepEqual(lines, ['out', '', 'a 1', '/home/user', 'user'])
  assert.deepEqual([output.stdout, output.stderr, output.exitCode], [lines.join('\n'), 'err', 3])
  assert.equal((await sandbox.process.startAndWait('seq 3000')).stdout.split('\n').length, 3000)
})

check('process.start error', () =>
  fails(() => sandbox.process.start({ cmd: 'true', cwd: '/no/such' }), /directory that does not exist/),
)

check(`${both('Process.sendStdin')}, Process.kill normal`, async () => {
  const process = await sandbox.process.start('while read line; do echo "got $line"; done')
  let seen
  const arrived = new Promise((resolve) => (seen = resolve))
  const echo = await sandbox.process.start({ cmd: 'cat', onStdout: ({ line }) => line === 'two' && seen() })
  await echo.sendStdin('one\n')
  await echo.sendStdin('two\n')
  await arrived
  await echo.kill()
  assert.equal(echo.output.stdout, 'one\ntwo')
  await process.kill()
  // The client does not wait for the end of what it kills.
  await fails(async () => {
    for (;;) await echo.sendStdin('x')
  }, /not found/)
})

check(
  both('filesystem.list, filesystem.read, filesystem.write, filesystem.makeDir') +
    ', filesystem.remove normal, filesystem.writeBytes normal, filesystem.readBytes normal',
  async () => {
    const files = sandbox.filesystem
    await files.makeDir('/home/user/d')
    await files.makeDir('/home/user/d')
    await files.write('/home/user/d/text', 'é\n')
    assert.equal(await files.read('/home/user/d/text'), 'é\n')
    await files.writeBytes('/home/user/d/bytes', new Uint8Array([0, 255, 10]))
    assert.deepEqual([...(await files.readBytes('/home/user/d/bytes'))], [0, 255, 10])
    const listed = (await files.list('/home/user/d')).map(({ name, isDir }) => [name, isDir])
    assert.deepEqual(listed, [['bytes', false], ['text', false]])
    await files.remove('/home/user/d')
    await fails(() => files.list('/home/user/d'))
    await fails(() => files.read('/home/user/d/text'))
    await fails(() => files.write('/home/user', 'x'))
    await fails(() => files.makeDir('/proc/none'))
  },
)

check(`${both('filesystem.watchDir')}, FilesystemWatcher.stop normal`, async () => {
  await sandbox.filesystem.makeDir('/home/user/watched')
  const watcher = sandbox.filesystem.watchDir('/home/user/watched')
  let seen
  const arrived = new Promise((resolve) => (seen = resolve))
  watcher.addEventListener((event) => event.operation === 'Create' && seen(event))
  await watcher.start()
  await sandbox.filesystem.write('/home/user/watched/new', 'x')
  const { path, name, isDir } = await arrived
  assert.deepEqual([path, name, isDir], ['/home/user/watched/new', 'new', false])
  await watcher.stop()
  await fails(() => sandbox.filesystem.watchDir('/no/such').start())
})

check(`${both('terminal.start, Terminal.sendData, Terminal.resize')}, Terminal.kill normal`, async () => {
  const size = { cols: 80, rows: 24 }
  const terminal = await sandbox.terminal.start({ size, onData: () => {} })
  await terminal.resize({ cols: 101, rows: 33 })
  await terminal.sendData('stty size; exit\n')
  assert((await terminal.wait()).data.includes('33 101'), terminal.data)
  await fails(() => terminal.sendData('x'), /not found/)
  await fails(() => terminal.resize(size), /not found/)
  const last = await sandbox.terminal.start({ size, onData: () => {}, cmd: 'sleep 1000' })
  await last.kill()
  await fails(() => sandbox.terminal.start({ size, onData: () => {}, cmd: 'true', cwd: '/no/such' }))
})

check('Sandbox.uploadFile normal, Sandbox.downloadFile normal, Sandbox.downloadFile error', async () => {
  const port = process.env.TIFFIN_DOMAIN
  assert(sandbox.fileURL.endsWith(`.${port}/file`), sandbox.fileURL)
  const data = Buffer.alloc(1_000_000, 'x')
  assert.equal(await sandbox.uploadFile(data, 'up'), '/home/user/up')
  assert(data.equals(await sandbox.downloadFile('/home/user/up', 'buffer')))
  await fails(() => sandbox.downloadFile('/no/such'))
})

check('onScanPorts normal', async () => {
  let seen
  const arrived = new Promise((resolve) => (seen = resolve))
  const onScanPorts = (ports) => ports.some(({ port, state }) => port === 8123 && state === 'LISTEN') && seen()
  const other = await Sandbox.create({ ...options, onScanPorts })
  const server = await other.process.start('python3 -m http.server 8123')
  await arrived
  await server.kill()
  const id = other.id
  await other.close()
  await Sandbox.kill(id)
})

check('Sandbox.keepAlive normal, Sandbox.reconnect normal, Sandbox.close normal, Sandbox.kill normal', async () => {
  await sandbox.keepAlive(60_000)
  await sandbox.filesystem.write('/home/user/kept', 'kept')
  const { id } = sandbox
  await sandbox.close()
  sandbox = await Sandbox.reconnect({ ...options, sandboxID: id })
  assert.equal(await sandbox.filesystem.read('/home/user/kept'), 'kept')
  await sandbox.close()
  await Sandbox.kill(id)
  assert(!(await Sandbox.list()).some(({ sandboxID }) => sandboxID === id))
})

async function main() {
  let failed = false
  for (const { cases, body } of checks) {
    try {
      await body()
      for (const name of cases) console.log(`ok ${name}`)
    } catch (error) {
      failed = true
      console.error(error)
      for (const name of cases) console.log(`failed ${name}: ${String(error).replaceAll('\n', ' ')}`)
      if (!sandbox) break
    }
  }
  process.exit(failed ? 1 : 0)
}

if (process.argv.includes('--checks')) console.log(checks.flatMap(({ cases }) => cases).join('\n'))
else await main()
