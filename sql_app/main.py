"""The application: `uvicorn sql_app.main:app`."""

import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import peewee
from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.routing import Match

from fastapi_peewee import DatabaseUnavailable, Peewee

from . import crud, models, schemas
from .database import db
from .security import ahash_password

SLOWUSERS_STEP = float(os.environ.get("SLOWUSERS_STEP") or 1.0)


async def create_tables() -> None:
    """Create the tables that aren't there; several processes may do so at the same time.

    `IF NOT EXISTS` is no help with a table that another process is just creating: that is an error,
    and there is nothing left to do when one tries again.
    """
    attempts_left = 10
    while True:
        try:
            return await db.acreate_tables([models.User, models.Item])
        except DatabaseUnavailable:
            raise
        except peewee.DatabaseError:
            attempts_left -= 1
            if not attempts_left:
                raise


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await create_tables()
    yield


class ErrorDetail(BaseModel):
    detail: str


# What FastAPI answers of itself, and leaves out of OpenAPI.
ANY_CALL: dict[int | str, dict[str, Any]] = {
    405: {
        "description": "The path has other methods only: those in Allow",
        "headers": {"Allow": {"schema": {"type": "string"}, "required": True}},
        "model": ErrorDetail,
    }
}
WITH_BODY: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body can't be parsed", "model": ErrorDetail},
    413: {"description": "The body is larger than 64 KiB"},
}
REGISTERED: dict[int | str, dict[str, Any]] = {
    **WITH_BODY,
    400: {**WITH_BODY[400], "description": "The email is registered, or the body can't be parsed"},
}

# FastAPI with the assets of /docs on board, instead of on a CDN.
app = FastAPIOffline(
    title="sql_app", lifespan=lifespan, max_body_size=64 * 1024, responses=ANY_CALL
)
Peewee(db).init_app(app)


@app.exception_handler(RequestValidationError)
async def invalid_request(request: Request, error: RequestValidationError) -> Response:
    """FastAPI's own answer without the input, which may be a password or impossible to encode."""
    details = [{key: part[key] for key in ("type", "loc", "msg")} for part in error.errors()]
    return Response(json.dumps({"detail": details}), 422, media_type="application/json")


@app.exception_handler(405)
async def other_methods(request: Request, error: Exception) -> Response:
    """Starlette's own answer with the methods of all routes of the path: it has the first one's."""
    allowed = {
        method
        for route in app.routes
        if route.matches(request.scope)[0] is not Match.NONE
        for method in getattr(route, "methods", None) or ()
    }
    headers = {"Allow": ", ".join(sorted(allowed))}
    return JSONResponse({"detail": "Method Not Allowed"}, 405, headers=headers)


UserId = Annotated[int, Path(ge=-(2**31), lt=2**31)]
Skip = Annotated[int, Query(ge=0, lt=2**63)]
Limit = Annotated[int, Query(ge=1, le=1000)]


async def registration(user: schemas.UserCreate) -> tuple[schemas.UserCreate, str]:
    """The user and the hash of the password, made while no connection is held for it."""
    return user, await ahash_password(user.password.get_secret_value())


@app.post("/users/", response_model=schemas.User, responses=REGISTERED)
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
async def read_user(user_id: UserId) -> Any:
    return crud.user_by_id(user_id=user_id)


@app.post("/users/{user_id}/items/", response_model=schemas.Item, responses=WITH_BODY)
async def create_item_for_user(user_id: UserId, item: schemas.ItemCreate) -> models.Item:
    try:
        return await crud.create_user_item(item, user_id)
    except peewee.IntegrityError as error:
        raise HTTPException(404, "User not found") from error


@app.get("/items/", response_model=list[schemas.Item])
async def read_items(skip: Skip = 0, limit: Limit = 100) -> Any:
    return crud.items_page(skip=skip, limit=limit)


sleep_time = 10


@app.get("/slowusers/", response_model=list[schemas.User])
def read_slow_users(skip: Skip = 0, limit: Limit = 100) -> peewee.ModelSelect:
    """As `/users/`, after a sleep with a connection in its hands, shorter from call to call."""
    global sleep_time
    sleep_time = max(0, sleep_time - 1)
    time.sleep(sleep_time * SLOWUSERS_STEP)
    return crud.get_users(skip, limit)
