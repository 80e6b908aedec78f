// JavaScript clients that build host names of the domain, as all do by default: domain.mjs e2b|e2b-1|e2b-sdk-2 [--checks]
//
// The test sets E2B_DOMAIN to DOMAIN:PORT, E2B_API_KEY, and NODE_EXTRA_CA_CERTS to the gateway's authority; names are in the hosts
// file. TIFFIN_JAVASCRIPT is where the client is installed. Prints `ok METHOD normal|error` or `failed METHOD CASE: WHY`.

import assert from 'node:assert/strict'
import { createRequire } from 'node:module'
import { join } from 'node:path'

const client = process.argv[2]
const require = createRequire(join(process.env.TIFFIN_JAVASCRIPT, 'package.json'))
const { Sandbox } = require(client)

const checks = []
const check = (cases, body) => checks.push({ cases: cases.split(',').map((name) => name.trim()), body })
let sandbox

check('Sandbox.create normal', async () => {
  sandbox = await Sandbox.create({ timeoutMs: 1_200_000, metadata: { who: client }, envs: { GREETING: 'hello' } })
})

check('Sandbox.create error', () => assert.rejects(Sandbox.create('no-such-template'), /404|not found/i))

check('apiKey error', () => assert.rejects(Sandbox.create({ apiKey: 'e2b_' + '0'.repeat(40) }), /API key|401/i))

check('Commands.run normal, Commands.run error', async () => {
  const said = await sandbox.commands.run('echo $GREETING; whoami')
  assert.equal(said.stdout, 'hello\nuser\n')
  await assert.rejects(sandbox.commands.run('echo out; exit 3'), (error) => error.exitCode === 3)
})

check('Commands.sendStdin normal', async () => {
  let seen
  const arrived = new Promise((resolve) => (seen = resolve))
  const onStdout = (text) => text.includes('got one') && seen()
  const process = await sandbox.commands.run('read line; echo got $line', { background: true, stdin: true, onStdout })
  await sandbox.commands.sendStdin(process.pid, 'one\n')
  await arrived
  await process.wait()
})

check('Filesystem.write normal, Filesystem.read normal, Filesystem.read error', async () => {
  const text = 'é'.repeat(500_000)
  await sandbox.files.write('big', text)
  assert((await sandbox.files.read('big')) === text)
  await assert.rejects(sandbox.files.read('/no/such'))
})

check('Filesystem.watchDir normal', async () => {
  await sandbox.files.makeDir('watched')
  let seen
  const arrived = new Promise((resolve) => (seen = resolve))
  const watch = await sandbox.files.watchDir('watched', (event) => event.name === 'new' && seen())
  await sandbox.files.write('watched/new', 'x')
  await arrived
  await watch.stop()
})

check('Sandbox.getHost normal', async () => {
  const host = sandbox.getHost(3000)
  assert(host.endsWith(`.${process.env.E2B_DOMAIN}`), host)
  const server = await sandbox.commands.run('mkdir -p site && echo served >site/f && cd site && exec python3 -m http.server 3000', {
    background: true,
    timeoutMs: 0,
  })
  // It listens once it says so; until then the gateway answers 502.
  let answer
  do {
    answer = await fetch(`https://${host}/f`)
  } while (answer.status === 502)
  assert.equal(await answer.text(), 'served\n')
  await server.kill()
})

check('Sandbox.list normal', async () => {
  const listed = await Sandbox.list()
  const items = Array.isArray(listed) ? listed : await listed.nextItems()
  assert(items.some(({ metadata }) => metadata.who === client))
})

check('Sandbox.setTimeout normal, Sandbox.kill normal', async () => {
  await sandbox.setTimeout(60_000)
  await sandbox.kill()
  await assert.rejects(sandbox.commands.run('true'))
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
