"""Virtual machines on stock Debian kernels: what scenarios, the demo and the benches run in.

What belongs here: making a guest (kernel, disks, project) and talking to it. What does not:
anything that knows what fscached should do; that is the scenarios' business. Standard library only,
so that `scripts/kernel-modules` works on a bare machine.
"""
