"""4 · Bytes become cache: ranges stream in, are decompressed, verified and written, readers wake.

What belongs here: the event loop's half of one open object, aligned memory, worker threads. What
does not: which bytes to fetch (`fscached.cache`) and where they are (`fscached.source`). Called by
`fscached.daemon` and `fscached.prefetch`.
"""
