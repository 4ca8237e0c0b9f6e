"""Start many processes cheaply: a server imports everything once and forks.

JAX is imported but not started before the fork, so that each process starts it anew,
as a process of its own would.
"""

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path


class Forks:
    """A fork server; `start` a function of a module in a process, kill it, `wait`."""

    def __init__(self, cache, *modules):
        here = Path(__file__)
        env = os.environ | {
            "PYTHONPATH": f"{here.parents[1]}:{here.parent}",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.server = subprocess.Popen(
            [sys.executable, here, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.stdin.close()
        self.server.wait(timeout=60)
        self.server.stdout.close()

    def _ask(self, **message):
        print(json.dumps(message), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, out, call, *args, **env):
        """Run `module.function(*args)`; output goes to the file `out`; give the pid."""
        return self._ask(out=str(out), call=call, args=[*map(str, args)], env=env)

    def wait(self, pid):
        """Give the exit code, negative for a signal."""
        return self._ask(wait=pid)

    def run(self, out, call, *args, **env):
        """Run to the end; the output, or an error that shows it."""
        code = self.wait(self.start(out, call, *args, **env))
        text = Path(out).read_text()
        assert code == 0, (code, text[-3000:])
        return text


def until(condition, *, seconds=120):
    """Wait until something holds, looking every millisecond."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def _serve(modules):
    for name in modules:
        importlib.import_module(name)
    for line in sys.stdin:
        ask = json.loads(line)
        if "wait" in ask:
            _, status = os.waitpid(ask["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _child(**ask)
        print(pid, flush=True)


def _child(out, call, args, env):
    code = 1
    try:
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(env)
        module, function = call.split(".")
        getattr(importlib.import_module(module), function)(*args)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1:])
