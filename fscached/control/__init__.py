"""6 · People and tools: the control API, its client, and who keeps the kernel's fd for us.

What belongs here: HTTP on a unix socket, the shapes of requests and replies, the supervisor. What
does not: what a request does (`fscached.daemon` implements `api.Service`). Called by
`fscached.daemon` and `fscached.cli`.
"""
