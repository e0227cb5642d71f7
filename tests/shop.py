"""Users who own items: models and schemas that several test modules look at from their side."""

from typing import Any

import peewee
from pydantic import BaseModel

from fastapi_peewee import Database


class ItemOut(BaseModel):
    id: int
    title: str


class BareUserOut(BaseModel):
    id: int
    name: str


class UserOut(BareUserOut):
    items: list[ItemOut]


class Models:
    """The models on a database; their tables aren't created."""

    def __init__(self, db: Database) -> None:
        class User(db.Model):
            name = peewee.CharField()
            note = peewee.CharField(null=True)

        class Item(db.Model):
            title = peewee.CharField()
            owner = peewee.ForeignKeyField(User, backref="items")

        self.User: Any = User
        self.Item: Any = Item
