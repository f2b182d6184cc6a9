"""Memory that calls of the ops keep after they have returned."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import pytest

#: Calls whose products are oneDNN's where the processor prefers it, and BLAS's otherwise.
SCRIPT = """
import ctypes, gc, json, torch
from gistops.nn import ConstellationClassifier

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
torch.set_num_threads(1)
head = ConstellationClassifier(128, 2000)
x, y = torch.randn(64, 128, requires_grad=True), torch.randint(2000, (64,))

def loss():
    head.loss(x, y).backward()

def logits():
    head(x).sum().backward()

def topk():
    head.predict_topk(x.detach(), 5)

grown = {}
for call in (loss, logits, topk):
    for i in range(220):
        if i == 20:
            gc.collect()
            before = libc.mallinfo2().uordblks
        call()
        head.zero_grad()
        x.grad = None
    gc.collect()
    grown[call.__name__] = (libc.mallinfo2().uordblks - before) / 200
print(json.dumps(grown))
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs mallinfo2 of glibc 2.33 or newer"
)
@pytest.mark.parametrize("products", ["blas", "onednn"])
def test_calls_keep_no_memory(products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call makes eleven products or more, so that the 48 bytes of a string per product would be above 500."""
    monkeypatch.setenv("GISTOPS_CPU_PRODUCTS", products)
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    grown = json.loads(done.stdout)
    assert all(abs(size) < 100 for size in grown.values()), grown
