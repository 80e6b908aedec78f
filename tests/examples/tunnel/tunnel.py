"""A client of the gateway's tunnel (host-shim/gateway/tunnel.md), on nothing but Python 3.9 itself.

    python3 tunnel.py SANDBOX_ID PORT [LOCAL_PORT]      a port of a sandbox becomes one of this machine

$E2B_API_URL and $E2B_API_KEY say where the gateway is and who asks.
"""

import asyncio
import base64
import os
import struct
import sys
import urllib.parse

DATA, UPDATE, PING = 0, 1, 2
SYN, ACK, FIN, RST = 1, 2, 4, 8
WINDOW = 256 * 1024


class Stream:
    def __init__(self, tunnel, number):
        self.tunnel, self.number = tunnel, number
        self.credit, self.taken, self.held, self.ended, self.broken = WINDOW, 0, bytearray(), False, None
        self.came, self.grown = asyncio.Event(), asyncio.Event()

    async def read(self, most=65536):
        while not (self.held or self.ended or self.broken):
            self.came.clear()
            await self.came.wait()
        data = bytes(self.held[:most])
        del self.held[:most]
        if not data and self.broken:
            raise ConnectionResetError(self.broken)
        self.taken += len(data)
        if self.taken >= WINDOW // 2 and not self.ended:  # There is room again: so may the gateway send.
            taken, self.taken = self.taken, 0
            await self.tunnel.send(UPDATE, 0, self.number, taken)
        return data

    async def write(self, data):
        while data:
            while not (self.credit or self.broken):
                self.grown.clear()
                await self.grown.wait()
            if self.broken:
                raise ConnectionResetError(self.broken)
            now, data = data[: min(self.credit, 16384)], data[min(self.credit, 16384) :]
            self.credit -= len(now)
            await self.tunnel.send(DATA, 0, self.number, len(now), now)

    async def end(self):
        await self.tunnel.send(DATA, FIN, self.number, 0)

    async def reset(self):
        if self.tunnel.streams.pop(self.number, None):
            await self.tunnel.send(DATA, RST, self.number, 0)

    def receive(self, kind, flags, length, body):
        self.credit += length if kind == UPDATE else 0
        self.held += body
        self.ended |= bool(flags & FIN)
        self.broken = "the stream was reset" if flags & RST else self.broken
        self.came.set()
        self.grown.set()


class Tunnel:
    @classmethod
    async def open(cls, url, headers):
        self, parts, tls = cls(), urllib.parse.urlsplit(url), url.startswith("https:")
        self.streams, self.last = {}, -1
        where = (parts.hostname, parts.port or (443 if tls else 80))
        self.reader, self.writer = await asyncio.open_connection(*where, ssl=tls or None)
        key = base64.b64encode(os.urandom(16)).decode()
        headers = {"Host": parts.netloc, "Connection": "Upgrade", "Upgrade": "websocket", **headers,
                   "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": key}
        lines = [f"GET {parts.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        self.writer.write("\r\n".join([*lines, "", ""]).encode())
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        if " 101 " not in head.splitlines()[0]:
            raise ConnectionError(head.splitlines()[0])
        return self

    async def connect(self, port):
        self.last += 2
        stream = self.streams[self.last] = Stream(self, self.last)
        await self.send(UPDATE, SYN, stream.number, 0)
        await stream.write(f"CONNECT {port}\n".encode())
        answer = b""
        while not answer.endswith(b"\n"):
            answer += await stream.read(1)
        if answer == b"OK\n":
            return stream
        await stream.reset()
        raise ConnectionRefusedError(answer.decode().strip())

    async def send(self, kind, flags, number, length, body=b""):
        await self.message(2, struct.pack("!BBHII", 0, kind, flags, number, length) + body)

    async def message(self, opcode, data):  # RFC 6455, 5.2
        size, mask = len(data), os.urandom(4)
        long = struct.pack("!BH", 0xFE, size) if size < 65536 else struct.pack("!BQ", 0xFF, size)
        head = bytes([0x80 | opcode]) + (bytes([0x80 | size]) if size < 126 else long) + mask
        pad = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
        self.writer.write(head + (int.from_bytes(data, "big") ^ pad).to_bytes(size, "big"))
        await self.writer.drain()

    async def run(self):
        """Serves the streams until the tunnel is closed, which it raises."""
        held, exactly = bytearray(), self.reader.readexactly
        try:
            while True:
                first, size = await exactly(2)
                if size >= 126:
                    size = int.from_bytes(await exactly(2 if size == 126 else 8), "big")
                body, opcode = await exactly(size), first & 15
                if opcode == 8:
                    code = int.from_bytes(body[:2], "big")
                    raise ConnectionError(f"the tunnel is closed: {code} {body[2:].decode()}")
                if opcode == 9:
                    await self.message(10, body)
                held += body if opcode in (0, 2) else b""
                while len(held) >= 12:
                    _, kind, flags, number, length = struct.unpack_from("!BBHII", held)
                    end = 12 + (length if kind == DATA else 0)
                    if len(held) < end:
                        break
                    if kind == PING and not flags & ACK:
                        await self.send(PING, ACK, 0, length)
                    if number in self.streams:
                        self.streams[number].receive(kind, flags, length, held[12:end])
                    del held[:end]
        finally:
            for stream in self.streams.values():
                stream.receive(DATA, RST, 0, b"")


async def main(sandbox, port, local=0):
    url = os.environ.get("E2B_API_URL", "http://127.0.0.1:3000")
    headers = {"X-API-KEY": os.environ["E2B_API_KEY"]}
    tunnel = await Tunnel.open(f"{url}/v1/sandboxes/{sandbox}/tunnel", headers)

    async def serve(reader, writer):
        async def up():
            while data := await reader.read(65536):
                await stream.write(data)
            await stream.end()

        async def down():
            while data := await stream.read():
                writer.write(data)
                await writer.drain()
            writer.write_eof()

        try:
            stream = await tunnel.connect(port)
            try:
                await asyncio.gather(up(), down())
                tunnel.streams.pop(stream.number, None)
            finally:
                await stream.reset()
        except ConnectionError as error:
            print(error, file=sys.stderr)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", int(local))
    print("listening on 127.0.0.1:%d" % server.sockets[0].getsockname()[1], flush=True)
    await tunnel.run()


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except (ConnectionError, KeyboardInterrupt) as error:
        sys.exit(str(error))
