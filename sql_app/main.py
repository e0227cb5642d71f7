"""The application: `uvicorn sql_app.main:app`."""

import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import peewee
from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline

from fastapi_peewee import Peewee

from . import crud, models, schemas
from .database import db
from .security import ahash_password

SLOWUSERS_STEP = float(os.environ.get("SLOWUSERS_STEP") or 1.0)


async def create_tables() -> None:
    """Create the tables that aren't there; several processes may do so at the same time.

    `IF NOT EXISTS` is no help with a table that another process is just creating: that is an error,
    and there is nothing left to do when one tries again.
    """
    for attempts_left in reversed(range(10)):
        try:
            await db.acreate_tables([models.User, models.Item])
        except peewee.DatabaseError:
            if not attempts_left:
                raise
        else:
            return


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await create_tables()
    yield


# FastAPI with the assets of /docs on board, instead of on a CDN.
app = FastAPIOffline(title="sql_app", lifespan=lifespan, max_body_size=64 * 1024)
Peewee(db).init_app(app)


@app.exception_handler(RequestValidationError)
async def invalid_request(request: Request, error: RequestValidationError) -> Response:
    """FastAPI's own answer without the input, which may be a password or impossible to encode."""
    details = [{key: part[key] for key in ("type", "loc", "msg")} for part in error.errors()]
    return Response(json.dumps({"detail": details}), 422, media_type="application/json")


UserId = Annotated[int, Path(ge=-(2**31), lt=2**31)]
Skip = Annotated[int, Query(ge=0, lt=2**63)]
Limit = Annotated[int, Query(ge=1, le=1000)]


async def registration(user: schemas.UserCreate) -> tuple[schemas.UserCreate, str]:
    """The user and the hash of the password, made while no connection is held for it."""
    return user, await ahash_password(user.password.get_secret_value())


@app.post("/users/", response_model=schemas.User, responses={400: {"description": "Registered"}})
def create_user(
    registration: Annotated[tuple[schemas.UserCreate, str], Depends(registration)],
) -> models.User:
    try:
        return crud.create_user(*registration)
    except peewee.IntegrityError as error:
        raise HTTPException(400, "Email already registered") from error


@app.get("/users/", response_model=list[schemas.User])
async def read_users(skip: Skip = 0, limit: Limit = 100) -> peewee.ModelSelect:
    return crud.get_users(skip, limit)


@app.get("/users/{user_id}", response_model=schemas.User)
async def read_user(user_id: UserId) -> peewee.ModelSelect:
    return models.User.select().where(models.User.id == user_id)


@app.post("/users/{user_id}/items/", response_model=schemas.Item)
def create_item_for_user(user_id: UserId, item: schemas.ItemCreate) -> models.Item:
    try:
        return crud.create_user_item(item, user_id)
    except peewee.IntegrityError as error:
        raise HTTPException(404, "User not found") from error


@app.get("/items/", response_model=list[schemas.Item])
async def read_items(skip: Skip = 0, limit: Limit = 100) -> peewee.ModelSelect:
    return crud.get_items(skip, limit)


sleep_time = 10


@app.get("/slowusers/", response_model=list[schemas.User])
def read_slow_users(skip: Skip = 0, limit: Limit = 100) -> peewee.ModelSelect:
    """As `/users/`, after a sleep with a connection in its hands, shorter from call to call."""
    global sleep_time
    sleep_time = max(0, sleep_time - 1)
    time.sleep(sleep_time * SLOWUSERS_STEP)
    return crud.get_users(skip, limit)
