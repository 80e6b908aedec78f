// What `make demo-sdk` shows of the published JavaScript client; the gateway is in the environment.

import { createRequire } from 'node:module'
import { join } from 'node:path'

const require = createRequire(join(process.env.TIFFIN_JAVASCRIPT, 'package.json'))
const { Sandbox } = require('e2b')

const began = performance.now()
const sandbox = await Sandbox.create()
console.log(`create: ${((performance.now() - began) / 1000).toFixed(2)} s, ${sandbox.sandboxId}`)
try {
  process.stdout.write((await sandbox.commands.run('cowsay hello from the JavaScript SDK')).stdout)

  let seen
  const written = new Promise((resolve) => (seen = resolve))
  const watcher = await sandbox.files.watchDir('/home/user', (event) => event.name === 'note.txt' && seen(event))
  await sandbox.files.write('note.txt', 'kept in a file')
  console.log('read:', await sandbox.files.read('note.txt'))
  console.log('list:', (await sandbox.files.list('.')).map(({ name }) => name).filter((name) => !name.startsWith('.')))
  const { type, name } = await written
  console.log('watch:', type, name)
  await watcher.stop()

  let shown = ''
  const text = new TextDecoder()
  const terminal = await sandbox.pty.create({ cols: 80, rows: 24, onData: (data) => (shown += text.decode(data)) })
  await sandbox.pty.sendInput(terminal.pid, new TextEncoder().encode('echo $((6 * 7)) in a terminal; exit\n'))
  await terminal.wait()
  console.log('pty:', shown.split(/[\r\n]+/).find((line) => line.startsWith('42 ')))
} finally {
  console.log('kill:', await sandbox.kill())
}
