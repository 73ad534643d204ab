"""2 · What is missing: given what is resident and in flight, what to fetch and whom to wake.

What belongs here: decisions. What does not: event loops, clocks, file descriptors; time comes in
as an argument, so that every interleaving can be tested without a kernel. Called by
`fscached.fill`.
"""
