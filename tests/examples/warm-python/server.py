"""A small service of a program that takes long to start: every import below is done once, before the snapshot.

Its answer says how long the imports took in the machine that the snapshot was taken of, which process answers, and whether
this is a clone: its host name is the sandbox's own.
"""
import time

STARTED = time.monotonic()

import asyncio, concurrent.futures, ctypes, dataclasses, decimal, email.message, hashlib, html.parser, http.client  # noqa: E401
import http.server, importlib.metadata, ipaddress, json, logging.config, multiprocessing, os, pickle, random, re  # noqa: E401
import secrets, socket, sqlite3, ssl, statistics, sys, tarfile, tempfile, unittest.mock, urllib.request, uuid  # noqa: E401
import xml.dom.minidom, xmlrpc.client, zipfile  # noqa: E401

IMPORTED = time.monotonic()

# State that a client would otherwise wait for: it is in the snapshot like the modules.
DATABASE = sqlite3.connect(":memory:", check_same_thread=False)
DATABASE.execute("create table squares (number integer primary key, square integer)")
DATABASE.executemany("insert into squares values (?, ?)", ((n, n * n) for n in range(1000)))
TLS = ssl.create_default_context()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        number = int("0" + re.sub(r"\D", "", self.path)) % 1000
        (square,) = DATABASE.execute("select square from squares where number = ?", (number,)).fetchone()
        answer = {
            "square": square,
            "pid": os.getpid(),
            "hostname": socket.gethostname(),
            "modules": len(sys.modules),
            "import_ms": round((IMPORTED - STARTED) * 1000),
            # Drawn when it is asked for: the system's randomness is the clone's own.
            "secret": secrets.token_hex(8),
        }
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
