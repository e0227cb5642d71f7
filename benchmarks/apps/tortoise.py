"""Tortoise ORM with its own integration into FastAPI.

Its `pydantic_model_creator` would do, too; response models written by hand are faster.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import FastAPI
from pydantic import BeforeValidator
from tortoise import fields
from tortoise.contrib.fastapi import RegisterTortoise
from tortoise.exceptions import DoesNotExist, IntegrityError
from tortoise.models import Model

from . import contract


class User(Model):
    id = fields.IntField(primary_key=True)
    email = fields.CharField(255, unique=True)
    hashed_password = fields.CharField(255)
    is_active = fields.BooleanField(default=True)
    items: fields.ReverseRelation["Item"]

    class Meta:
        table = "user"


class Item(Model):
    id = fields.IntField(primary_key=True)
    title = fields.CharField(255, db_index=True)
    description = fields.CharField(255, db_index=True, null=True)
    owner: fields.ForeignKeyRelation[User] = fields.ForeignKeyField(
        "models.User", related_name="items"
    )

    class Meta:
        table = "item"
        ordering = ("id",)


class UserRead(contract.User):
    items: Annotated[list[contract.Item], BeforeValidator(list)]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings = contract.PRAGMAS if contract.SQLITE_FILE else {"maxsize": contract.POOL_SIZE}
    # It takes what follows two slashes for a file's name, and asyncpg where it has the choice.
    url = f"sqlite://{contract.SQLITE_FILE}" if contract.SQLITE_FILE else contract.DATABASE_URL
    async with RegisterTortoise(
        app, db_url=f"{url}?{urlencode(settings)}", modules={"models": [__name__]}
    ):
        yield


app = FastAPI(lifespan=lifespan, max_body_size=contract.MAX_BODY_SIZE)


@app.get("/users/", response_model=list[UserRead])
async def read_users(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Any:
    users = User.all().order_by("id").offset(skip).limit(limit)
    return await users.prefetch_related("items")


@app.get("/users/{user_id}", response_model=UserRead)
async def read_user(user_id: contract.UserId) -> Any:
    try:
        return await User.get(id=user_id).prefetch_related("items")
    except DoesNotExist as error:
        raise contract.user_not_found() from error


@app.post("/users/{user_id}/items/", response_model=contract.Item)
async def create_item_for_user(user_id: contract.UserId, item: contract.ItemCreate) -> Any:
    try:
        return await Item.create(**item.model_dump(), owner_id=user_id)
    except IntegrityError as error:
        raise contract.user_not_found() from error


@app.get("/items/", response_model=list[contract.Item])
async def read_items(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Any:
    return await Item.all().order_by("id").offset(skip).limit(limit)
