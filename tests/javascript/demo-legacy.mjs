// What `make demo-sdk` shows of the first SDK, which speaks JSON-RPC over a WebSocket.

import { createRequire } from 'node:module'
import { join } from 'node:path'

const require = createRequire(join(process.env.TIFFIN_JAVASCRIPT, 'package.json'))
const { Sandbox } = require('@e2b/sdk')

const began = performance.now()
// Without __debug_devEnv its WebSocket would be wss://.
const sandbox = await Sandbox.create({ __debug_devEnv: 'local', timeout: 300_000 })
console.log(`create: ${((performance.now() - began) / 1000).toFixed(2)} s, ${sandbox.id}`)
await sandbox.filesystem.write('/home/user/hello.txt', 'written over the WebSocket')
const cow = await sandbox.process.start({
  cmd: 'cowsay < /home/user/hello.txt',
  onStdout: ({ line }) => console.log(line),
})
console.log('exit code:', (await cow.wait()).exitCode)
const { id } = sandbox
await sandbox.close()
await Sandbox.kill(id)
console.log('closed')
process.exit(0)
