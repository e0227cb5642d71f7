"""``make soak``: random faults under load, and what must hold whatever happens.

The tests of faults are made of the same parts: servers that may be killed, a proxy that cuts the
wire, transfers between accounts, and histories of lists.
"""
