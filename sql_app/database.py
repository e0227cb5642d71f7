"""The database that `DATABASE_URL` names; a SQLite file in the working directory by default."""

import os

from fastapi_peewee import connect

db = connect(os.environ.get("DATABASE_URL") or "sqlite:///test.db?inline_reads=0.002")
