"""What a serving process sets; in a process of its own, as it changes the whole interpreter."""

import subprocess
import sys

SCRIPT = """
import gc, sys, weakref
from mrss_provider.server import process

class Knot:
    def __init__(self):
        self.me = self

process.share_interpreter()
assert sys.getswitchinterval() < 0.001
loaded = Knot()
old = weakref.ref(loaded)
process.settle()
assert gc.get_freeze_count() > 1000
# A model that was replaced is found again, however it hangs together.
del loaded
assert old() is not None
process.settle()
assert old() is None
"""


def test_what_is_loaded_is_not_searched_for_garbage_until_it_is_replaced():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=60)
