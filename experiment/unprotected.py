"""The how-to's application with its two protections commented out.

This is how the page's reader has it at the start of the experiment: a plain Peewee database whose
connection state is thread-local, and a ``get_db`` that connects before the path operation and
closes after it. Nothing here is broken on purpose. It fails because FastAPI runs one request in
several threads: ``get_db`` may connect in one, the query run in a second, the lazily read
``items`` in a third, and ``get_db`` close in a fourth.

Its contract is that of ``sql_app``, as far as the experiment needs it.
"""

import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

import peewee
from fastapi import Depends, FastAPI, HTTPException, Query
from fastapi_offline import FastAPIOffline
from playhouse import db_url
from pwdlib import PasswordHash
from pydantic import BaseModel, BeforeValidator, ConfigDict

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///test.db")
SLOWUSERS_STEP = float(os.environ.get("SLOWUSERS_STEP", "1.0"))


def connect_options(url: str) -> dict[str, Any]:
    """What the URL alone does not say: the page's option for SQLite, psycopg 3 for PostgreSQL."""
    options: dict[str, Any] = {"unquote_user": True, "unquote_password": True}
    if url.startswith("sqlite"):
        options["check_same_thread"] = False  # one request crosses threads
    elif url.startswith("postgres"):
        options["prefer_psycopg3"] = True
    return options


db: peewee.Database = db_url.connect(DATABASE_URL, **connect_options(DATABASE_URL))
# Protection one, commented out as the page asks:
# db._state = PeeweeConnectionState()


class User(peewee.Model):
    email = peewee.CharField(unique=True, index=True)
    hashed_password = peewee.CharField()
    is_active = peewee.BooleanField(default=True)

    if TYPE_CHECKING:  # what Peewee adds
        id: peewee.AutoField
        items: peewee.ModelSelect

    class Meta:
        database = db


class Item(peewee.Model):
    title = peewee.CharField(index=True)
    description = peewee.CharField(index=True, null=True)
    owner = peewee.ForeignKeyField(User, backref="items")

    class Meta:
        database = db


class ItemRead(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    title: str
    description: str | None
    id: int
    owner_id: int


class UserCreate(BaseModel):
    email: str
    password: str


class UserRead(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    email: str
    id: int
    is_active: bool
    # ``user.items`` is a query, which runs here: Pydantic 2's form of the page's custom getter.
    items: Annotated[list[ItemRead], BeforeValidator(list)]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    with db:
        db.create_tables([User, Item])
    yield


app = FastAPIOffline(title="Peewee, unprotected", lifespan=lifespan)


def get_db() -> Iterator[None]:  # Protection two, out as well: (state=Depends(reset_db_state))
    try:
        db.connect()
        yield
    finally:
        if not db.is_closed():
            db.close()


Skip = Annotated[int, Query(ge=0)]
Limit = Annotated[int, Query(ge=1, le=1000)]


@app.post("/users/", response_model=UserRead, dependencies=[Depends(get_db)])
def create_user(user: UserCreate) -> User:
    if User.get_or_none(User.email == user.email):
        raise HTTPException(400, "Email already registered")
    hashed = PasswordHash.recommended().hash(user.password)
    created: User = User.create(email=user.email, hashed_password=hashed)
    return created


def users(skip: int, limit: int) -> list[User]:
    return list(User.select().order_by(User.id).offset(skip).limit(limit))


@app.get("/users/", response_model=list[UserRead], dependencies=[Depends(get_db)])
def read_users(skip: Skip = 0, limit: Limit = 100) -> list[User]:
    return users(skip, limit)


sleep_time = 10
countdown = threading.Lock()


@app.get("/slowusers/", response_model=list[UserRead], dependencies=[Depends(get_db)])
def read_slow_users(skip: Skip = 0, limit: Limit = 100) -> list[User]:
    """Sleep with the connection open, a step less at each call, then answer."""
    global sleep_time
    with countdown:  # so that no two calls take the same number; the page leaves this out
        sleep_time = max(0, sleep_time - 1)
        seconds = sleep_time * SLOWUSERS_STEP
    time.sleep(seconds)
    return users(skip, limit)
