"""`python -m benchmarks.limits`: does everybody who waits get an error in time?

As HikariCP's page "Bad Behavior: Handling Database Down" asks of Java's pools: the database goes
away under a pool, and many ask it for a connection. Each should have an error when its limit is
over, neither much later nor never.
"""
