"""What FastAPI's withdrawn how-to for Peewee asks its reader to try, as one command.

``python -m experiment`` serves the same small application twice: with Peewee's own thread-local
connection state (``unprotected``) and as this project ships it (``sql_app``). It sends both the
same slow requests at once and shows what became of them.
"""
