"""What comes in and what goes out."""

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SecretStr,
    StringConstraints,
)

#: What every database stores in a column of 255 characters: PostgreSQL knows no NUL.
Text = Annotated[str, StringConstraints(max_length=255, pattern=r"^[^\x00]*$")]


def _encodable(password: SecretStr) -> SecretStr:
    if any("\ud800" <= character <= "\udfff" for character in password.get_secret_value()):
        raise ValueError("a lone surrogate is no character")
    return password


Password = Annotated[
    SecretStr, StringConstraints(min_length=8, max_length=1024), AfterValidator(_encodable)
]


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


def _in_id_order(items: Iterable[Any]) -> list[Any]:
    """Peewee gives a query for `user.items`, or a list if it was loaded with the user."""
    return sorted(items, key=lambda item: item.id)


class User(UserBase):
    model_config = ConfigDict(from_attributes=True)

    id: int
    is_active: bool
    items: Annotated[list[Item], BeforeValidator(_in_id_order)]
