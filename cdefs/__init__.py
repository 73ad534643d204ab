"""The kernel's ABI, transcribed once: one `.h` and one `.py` per kernel header.

What belongs here: declarations, and system calls in the shape a Python programmer expects (bytes
in, OSError out). What does not: anything that decides. The `.h` files are compiled against the
building machine's headers (`build.py`), so a wrong constant or offset does not get past the tests.
"""
