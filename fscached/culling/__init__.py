"""5b · Room is made: cache files that nobody needs any more are deleted.

What belongs here: which files those are, and asking for each until it is gone. What does not: how a
file is deleted (`fscached.transport`). Called by `fscached.daemon` and `fscached.control`.
"""
