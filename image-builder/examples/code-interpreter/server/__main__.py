"""The code interpreter of the template `code-interpreter-v1`: Jupyter kernels behind HTTP on port 49999.

    client ── /execute ──► app.py ──► context.py ──► kernel.py ── ZeroMQ ──► kernels/ipython (IPython)
           ◄── lines of JSON ── execution.py ◄── messages.py ◄────────────┘
"""

import pathlib

import uvicorn

import app

PORT = 49999

uvicorn.run(
    app.application(str(pathlib.Path.home())),
    # Streams to ports arrive on the sandbox's loopback.
    host="127.0.0.1",
    port=PORT,
    loop="asyncio",
    http="h11",
    ws="none",
    lifespan="on",
    log_level="warning",
    access_log=False,
)
