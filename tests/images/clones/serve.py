"""A server that has begun to draw random numbers before its snapshot: serve.py PORT [reseed]

Each connection is one question, a line: `count` how often it was asked so far, `random` the next number of Python's own
generator, `pid` who it is.
"""

import os
import random
import socketserver
import sys

random.random()
if "reseed" in sys.argv:
    import reseed  # noqa: F401
with open("/root/starts", "a") as starts:
    print("serve", *sys.argv[1:], file=starts)
count = 0


class Answer(socketserver.StreamRequestHandler):
    def handle(self):
        global count
        question = self.rfile.readline().strip()
        if not question:
            return
        count += 1
        answers = {b"count": lambda: count, b"random": lambda: random.getrandbits(64), b"pid": os.getpid}
        self.wfile.write(b"%d\n" % answers[question]())


socketserver.TCPServer.allow_reuse_address = True
socketserver.TCPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
