"""Imported by a server in its main thread: gives it random numbers of its own in each clone of its sandbox.

A clone's processes go on with the memory of their source, and so with its generators. The hook beside this file (50-reseed,
in the image as /etc/tiffin/resume.d/50-reseed) sends SIGURG to every process that has left its pid in FOLDER. The signal is
one that does nothing where nobody wants it: a file that a killed process left behind harms no other.
"""

import atexit
import contextlib
import os
import random
import signal
import sys
from pathlib import Path

FOLDER = Path(os.environ.get("RESEED_FOLDER", "/run/reseed"))


def reseed(*_):
    random.seed()  # from os.urandom, which the kernel has new entropy for
    if ssl := sys.modules.get("ssl"):
        ssl.RAND_add(os.urandom(32), 32.0)  # OpenSSL's generators reseed at their next use
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # the global one; a Generator of your own is made anew by you


signal.signal(signal.SIGURG, reseed)
FOLDER.mkdir(parents=True, exist_ok=True)
_file = FOLDER / str(os.getpid())
_file.touch()


@atexit.register
def _forget():
    with contextlib.suppress(OSError):
        _file.unlink()
