"""What the applications share, so that they differ in nothing but how they use the database."""

import os
from typing import Annotated

from fastapi import HTTPException, Path, Query
from pydantic import BaseModel, ConfigDict

DATABASE_URL = os.environ["DATABASE_URL"]
#: None if the database is PostgreSQL.
SQLITE_FILE = (
    DATABASE_URL.removeprefix("sqlite:///") if DATABASE_URL.startswith("sqlite:") else None
)
#: The journal mode is a property of the file. These are properties of a connection, and what
#: sql_app's connections have.
PRAGMAS = {"foreign_keys": "1", "synchronous": os.environ.get("SQLITE_SYNCHRONOUS", "2")}
BUSY_TIMEOUT = 5.0
#: Bytes. What is larger is refused by FastAPI, with 413.
MAX_BODY_SIZE = 64 * 1024
POOL_SIZE = 10

UserId = Annotated[int, Path(ge=-(2**31), lt=2**31)]
Skip = Annotated[int, Query(ge=0, lt=2**63)]
Limit = Annotated[int, Query(ge=1, le=1000)]


class ItemCreate(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: str
    description: str | None = None


class Item(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    title: str
    description: str | None
    id: int
    owner_id: int


class User(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    email: str
    id: int
    is_active: bool
    items: list[Item]


def user_not_found() -> HTTPException:
    return HTTPException(404, "User not found")
