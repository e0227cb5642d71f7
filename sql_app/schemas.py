"""What comes in and what goes out."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, SecretStr, StringConstraints

#: What every database stores in a column of 255 characters: PostgreSQL knows no NUL.
Text = Annotated[str, StringConstraints(max_length=255, pattern=r"^[^\x00]*$")]
Password = Annotated[SecretStr, StringConstraints(min_length=8, max_length=1024)]


class ItemBase(BaseModel):
    title: Text
    description: Text | None = None


class ItemCreate(ItemBase):
    model_config = ConfigDict(extra="forbid")


class Item(ItemBase):
    model_config = ConfigDict(from_attributes=True)

    id: int
    owner_id: int


class UserBase(BaseModel):
    email: Text


class UserCreate(UserBase):
    model_config = ConfigDict(extra="forbid")

    password: Password


class User(UserBase):
    model_config = ConfigDict(from_attributes=True)

    id: int
    is_active: bool
    #: Peewee gives a query for `user.items`, or a list if it was loaded with the user.
    items: Annotated[list[Item], BeforeValidator(list)]
