// A client of the gateway's tunnel (host-shim/gateway/tunnel.md), on nothing but Node.js 22.
//
//     node tunnel.mjs SANDBOX_ID PORT [LOCAL_PORT]      a port of a sandbox becomes one of this machine
//
// $E2B_API_URL and $E2B_API_KEY say where the gateway is and who asks.

import { once } from 'node:events'
import net from 'node:net'
import { Duplex } from 'node:stream'

const [DATA, UPDATE, PING] = [0, 1, 2]
const [SYN, ACK, FIN, RST] = [1, 2, 4, 8]
const WINDOW = 256 * 1024

class Stream extends Duplex {
  constructor(tunnel, id) {
    super()
    Object.assign(this, { tunnel, id, credit: WINDOW, taken: 0 })
  }
  _write(bytes, encoding, done) {
    const now = bytes.subarray(0, Math.min(this.credit, 16384))
    this.credit -= now.length
    if (now.length) this.tunnel.send(DATA, 0, this.id, now.length, now)
    const rest = bytes.subarray(now.length)
    if (!rest.length) done()
    else if (this.credit) this._write(rest, encoding, done)
    else this.grown = () => this._write(rest, encoding, done)
  }
  _final(done) {
    this.tunnel.send(DATA, FIN, this.id, 0)
    done()
  }
  _read() { // Whoever reads has room again: so may the gateway send.
    if (this.taken < WINDOW / 2) return
    this.tunnel.send(UPDATE, 0, this.id, this.taken)
    this.taken = 0
  }
  _destroy(error, done) {
    this.tunnel.streams.delete(this.id)
    if (!this.readableEnded || !this.writableFinished) this.tunnel.send(DATA, RST, this.id, 0)
    done(error)
  }
  receive(kind, flags, length, body) {
    if (kind === UPDATE && length) {
      this.credit += length
      const { grown } = this
      this.grown = undefined
      grown?.()
    }
    this.taken += body.length
    if (body.length) this.push(body)
    if (flags & FIN) this.push(null)
    if (flags & RST) this.destroy(new Error('the stream was reset'))
  }
}

export class Tunnel {
  streams = new Map()
  input = Buffer.alloc(0)
  last = -1

  static async open(url, headers) {
    const tunnel = new Tunnel()
    tunnel.socket = new WebSocket(url, { headers })
    tunnel.socket.binaryType = 'arraybuffer'
    tunnel.socket.onmessage = ({ data }) => tunnel.receive(Buffer.from(data))
    tunnel.closed = new Promise((resolve) => { tunnel.socket.onclose = resolve })
    tunnel.closed.then(({ code, reason }) => {
      for (const stream of tunnel.streams.values()) stream.destroy(new Error(`the tunnel is closed: ${code} ${reason}`))
    })
    await once(tunnel.socket, 'open')
    return tunnel
  }

  async connect(port) {
    const stream = new Stream(this, this.last += 2)
    this.streams.set(stream.id, stream)
    this.send(UPDATE, SYN, stream.id, 0)
    stream.write(`CONNECT ${port}\n`)
    let answer = ''
    while (!answer.endsWith('\n')) {
      const byte = stream.read(1)
      if (byte) answer += byte
      else await once(stream, 'readable')
    }
    if (answer === 'OK\n') return stream
    stream.destroy()
    throw new Error(answer.trim())
  }

  send(kind, flags, id, length, body = Buffer.alloc(0)) {
    const header = Buffer.alloc(12)
    header[1] = kind
    header.writeUInt16BE(flags, 2)
    header.writeUInt32BE(id, 4)
    header.writeUInt32BE(length, 8)
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(Buffer.concat([header, body]))
  }

  receive(bytes) {
    this.input = Buffer.concat([this.input, bytes])
    while (this.input.length >= 12) {
      const [kind, flags] = [this.input[1], this.input.readUInt16BE(2)]
      const [id, length] = [this.input.readUInt32BE(4), this.input.readUInt32BE(8)]
      const end = 12 + (kind === DATA ? length : 0)
      if (this.input.length < end) return
      const body = this.input.subarray(12, end)
      this.input = this.input.subarray(end)
      if (kind === PING && !(flags & ACK)) this.send(PING, ACK, 0, length)
      this.streams.get(id)?.receive(kind, flags, length, body)
    }
  }
}

if (process.argv[1] === import.meta.filename) {
  const [id, port, local = 0] = process.argv.slice(2)
  const { E2B_API_URL = 'http://127.0.0.1:3000', E2B_API_KEY } = process.env
  const url = `${E2B_API_URL.replace(/^http/, 'ws')}/v1/sandboxes/${id}/tunnel`
  const tunnel = await Tunnel.open(url, { 'X-API-KEY': E2B_API_KEY })
  tunnel.closed.then(({ code, reason }) => {
    console.error(`the tunnel is closed: ${code} ${reason}`)
    process.exit(1)
  })
  const server = net.createServer({ allowHalfOpen: true }, (socket) => {
    const failed = (error) => socket.destroy() && console.error(error.message)
    tunnel.connect(port).then((stream) => {
      socket.on('error', () => {}).on('close', () => stream.destroy())
      stream.on('error', failed)
      socket.pipe(stream).pipe(socket)
    }, failed)
  })
  server.listen(local, '127.0.0.1', () => console.log(`listening on 127.0.0.1:${server.address().port}`))
}
