"""``sql_app`` as it is shipped.

The experiment counts connections from outside, where one that waits in the pool for the next
request looks like one that was forgotten. So the application is asked, beside its own routes, how
many wait.
"""

from sql_app.database import db
from sql_app.main import app

__all__ = ["app"]


@app.get("/experiment/idle", include_in_schema=False)
async def idle_connections() -> int:
    return db.pool.stats.idle
