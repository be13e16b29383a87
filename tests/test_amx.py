"""What a matrix unit (AMX) needs from the system: the kernel's leave, registers of each thread, larger signal
frames. That it computes the same bits as everything else is what test_numbers.py and tests/c show."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tinyllm import backends

# The prompt is long enough for tiles; its logits as bytes.
LOGITS = """
import faulthandler, json, os, signal, sys, tinyllm
from tinyllm import backends
def logits(threads):
    with tinyllm.load("stories", threads=threads) as llm:
        scored = llm.score("Once upon a time there was a little girl who lived in a house near the woods.")
        return [float(x).hex() for x in scored.logprobs if x is not None]
"""

needs_amx = pytest.mark.skipif(
    "amx" not in backends.info()["isa_usable"], reason="this machine has no AMX, or the kernel keeps it"
)


def run(code: str, before: str = LOGITS, **env: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", before + code],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


PLAIN = "print(json.dumps({'logits': logits(2), 'isa': backends.info()['isa']}))"


@needs_amx
def test_without_leave_it_falls_back_and_says_why() -> None:
    """A signal stack that is too small for the unit's registers is a reason for the kernel to say no."""
    small_stack = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(8192)
stack = Stack(ctypes.addressof(memory), 0, len(memory))
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
"""
    code = small_stack + LOGITS
    code += "i = backends.info()\n"
    code += "print(json.dumps({'logits': logits(2), 'isa': i['isa'], 'why': i['isa_refused']}))"
    found = run(code, before="")
    assert found["isa"] == "avx512vnni"
    assert found["why"] == "amx: a signal stack of this process is too small for its registers"
    assert found["logits"] == run(PLAIN, TINYLLM_ISA="amx")["logits"]


def test_what_is_refused_is_said() -> None:
    info = backends.info()
    assert info["isa_refused"] is None or ("amx" not in info["isa_usable"] and "amx" in info["isa_refused"])


@needs_amx
def test_in_a_forked_child() -> None:
    """The child has neither the pool's threads nor their registers; leave is inherited."""
    code = """
before = logits(2)
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.write(write, json.dumps(logits(2)).encode())
    os._exit(0)
os.close(write)
with os.fdopen(read) as pipe:
    inside = json.load(pipe)
assert os.waitpid(child, 0)[1] == 0
print(json.dumps({"same": before == inside == logits(2), "isa": backends.info()["isa"]}))
"""
    assert run(code) == {"same": True, "isa": "amx"}


@needs_amx
def test_signals_while_its_registers_are_in_use() -> None:
    """faulthandler's own stack holds the larger frames; registers are as they were when a handler returns."""
    code = """
import threading, time
quiet = logits(1)
devnull = open(os.devnull, "w")
faulthandler.enable(devnull)
faulthandler.register(signal.SIGUSR1, devnull)
n = 0
def send():
    global n
    while n >= 0:
        os.kill(os.getpid(), signal.SIGUSR1)
        n += 1
        time.sleep(0.0005)
thread = threading.Thread(target=send)
thread.start()
same = all(logits(1) == quiet for _ in range(5))
sent, n = n, -10**9
thread.join()
print(json.dumps({"same": same, "sent": sent > 20, "isa": backends.info()["isa"]}))
"""
    assert run(code) == {"same": True, "sent": True, "isa": "amx"}


@needs_amx
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads: int) -> None:
    code = f"print(json.dumps({{'logits': logits({threads})}}))"
    assert run(code, TINYLLM_ISA="amx") == run(code, TINYLLM_ISA="avx512vnni")
