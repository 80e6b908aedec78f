"""What a kernel says, as the clients' events.

Sources: jupyter-client's "Messaging in Jupyter" 5.4, and how npm `@e2b/code-interpreter` 2.8.0 and PyPI `e2b-code-interpreter`
2.11.5 read the lines of `/execute`.
"""

import json
import time

# The names that the clients have for MIME types; every other type travels in `extra`.
FORMATS = {
    "text/plain": "text",
    "text/html": "html",
    "text/markdown": "markdown",
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "application/pdf": "pdf",
    "text/latex": "latex",
    "application/json": "json",
    "application/javascript": "javascript",
}


def line(event):
    """An event as a line.

    ASCII only: the JavaScript client decodes each chunk by itself, which breaks a character that two chunks share, and the
    Python client ends lines at U+2028 and its like.
    """
    return json.dumps(event, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def error(name, value, traceback=""):
    return {"type": "error", "name": name, "value": value, "traceback": traceback}


def event(message):
    """The event of a message of the kernel's IOPub channel, or None."""
    content = message["content"]
    match message["header"]["msg_type"]:
        case "stream":
            return {"type": content["name"], "text": content["text"], "timestamp": time.time_ns()}
        case "execute_result" | "display_data" as kind:
            return result(content["data"], kind == "execute_result")
        case "error":
            return error(content["ename"], content["evalue"], "\n".join(content["traceback"]))
        case "execute_input":
            return {"type": "number_of_executions", "execution_count": content["execution_count"]}
    return None


def result(data, is_main_result):
    found = {"type": "result", "is_main_result": is_main_result}
    extra = {}
    for kind, value in data.items():
        if kind in FORMATS:
            found[FORMATS[kind]] = value
        else:
            extra[kind] = value
    # A string is told by its characters and not by its literal, as the clients' documentation shows it.
    text = found.get("text")
    if text and len(text) >= 2 and text[0] == text[-1] == "'":
        found["text"] = text[1:-1]
    if extra:
        found["extra"] = extra
    return found


def is_idle(message):
    return message["header"]["msg_type"] == "status" and message["content"]["execution_state"] == "idle"
