"""The RAFS v6 image format: bytes in, bytes out.

What belongs here: on-disk structures, readers, builders, checks. What does not: sockets, event
loops, the daemon. Usable on its own.
"""


class ImageError(ValueError):
    """An image that is not what it should be: what is wrong, where, and what to do about it."""
