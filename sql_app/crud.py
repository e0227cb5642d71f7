"""What the application does with the database: plain Peewee.

`def` endpoints call the synchronous functions as they are, `async def` ones with `await db.run(…)`.
Lists are queries: whoever iterates them gets models, and an endpoint that returns one lets the
response model decide what is read.
"""

import peewee

from fastapi_peewee import param, prepared

from . import models, schemas
from .security import hash_password


def get_user(user_id: int) -> models.User | None:
    return models.User.get_or_none(models.User.id == user_id)


#: What is called most is planned and compiled once; so is the page of items, below.
user_by_id = prepared(models.User.select().where(models.User.id == param("user_id")), schemas.User)


def get_user_by_email(email: str) -> models.User | None:
    return models.User.get_or_none(models.User.email == email)


def get_users(skip: int = 0, limit: int = 100) -> peewee.ModelSelect:
    return models.User.select().order_by(models.User.id).offset(skip).limit(limit)


def create_user(user: schemas.UserCreate, hashed_password: str | None = None) -> models.User:
    """Raises `peewee.IntegrityError` if the email is registered already.

    Args:
        user: the email and the password.
        hashed_password: the password's hash, if it has been made already; making it takes a while,
            which is better not spent with a connection in one's hands.
    """
    if hashed_password is None:
        hashed_password = hash_password(user.password.get_secret_value())
    return models.User.create(email=user.email, hashed_password=hashed_password)


def get_items(skip: int = 0, limit: int = 100) -> peewee.ModelSelect:
    return models.Item.select().order_by(models.Item.id).offset(skip).limit(limit)


items_page = prepared(get_items(param("skip"), param("limit")), list[schemas.Item])


async def create_user_item(item: schemas.ItemCreate, user_id: int) -> models.Item:
    """Raises `peewee.IntegrityError` if there is no such user."""
    return await models.Item.acreate(**item.model_dump(), owner=user_id)
