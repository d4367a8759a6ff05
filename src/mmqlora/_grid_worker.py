"""The child process that makes runs for `mmqlora.grids`: a function behind a pipe.

A run may crash, hang or be killed, so it gets a process that can be lost. This file is run as a script and imports
nothing but the standard library: what is slow to import is imported once, by the function's own module.
Requests are lines of JSON on stdin; replies are lines of JSON on stdout.

    {"parent": pid, "path": sys.path, "threads": N, "function": "module:name"}   first, no reply
    {"config": {...}, "seed": N}                                                 ->  {"record": {...}}
    any run that fails                                                           ->  {"error": text}
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import json
import operator
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """End this process when its parent is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    # Elsewhere than on Linux, and where the parent went before prctl was called.
    threading.Thread(target=watch, daemon=True).start()


def run(function: str, threads: int, config: dict[str, Any], seed: int) -> bytes:
    """Make one run; the reply as a line."""
    module, name = function.split(":")
    try:
        call = operator.attrgetter(name)(importlib.import_module(module))
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        return json.dumps({"record": call(config, seed)}, allow_nan=False).encode() + b"\n"
    except BaseException:  # sys.exit() is a failure of the run too, not the end of the process
        return json.dumps({"error": traceback.format_exc()}).encode() + b"\n"


def main() -> None:
    """Set up the pipes and serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends this process
    faulthandler.enable()
    # What a run reads or prints must not mix with requests and replies.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    first = json.loads(requests.readline())
    end_with(first["parent"])
    sys.path[:] = first["path"]
    for line in requests:
        replies.write(run(first["function"], first["threads"], **json.loads(line)))
        replies.flush()
        gc.collect()  # what the run held, models above all, must not add to the next one's memory


if __name__ == "__main__":
    main()
