"""5 · Before anybody asks: whole images, in the background.

What belongs here: what to fetch next when nobody waits. What does not: how it is fetched. Called by
`fscached.daemon`.
"""
