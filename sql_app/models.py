"""The tables. A "model" is Peewee's here; the shapes of requests and responses are `schemas`."""

import peewee

from .database import db


class User(db.Model):
    email = peewee.CharField(unique=True)
    hashed_password = peewee.CharField()
    is_active = peewee.BooleanField(default=True)


class Item(db.Model):
    title = peewee.CharField(index=True)
    description = peewee.CharField(index=True, null=True)
    owner = peewee.ForeignKeyField(User, backref="items")
