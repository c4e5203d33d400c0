"""A process that does what it is told, one JSON line after the other.

``{"do": "sums"}`` is answered by ``{"of": "sums", "done": ...}`` or ``{"of": "sums", "error": "..."}``; what happens
besides is ``{"event": ...}``. It ends when stdin does.
"""

import json
import sys
import threading

_saying = threading.Lock()


def say(message):
    with _saying:
        print(json.dumps(message), flush=True)


def obey(master):
    """Calls the method of ``master`` that each line names, with what else it says."""
    for line in sys.stdin:
        what = json.loads(line)
        do = what.pop("do")
        try:
            say({"of": do, "done": getattr(master, do)(**what)})
        except Exception as error:
            say({"of": do, "error": f"{type(error).__name__}: {error}"})
