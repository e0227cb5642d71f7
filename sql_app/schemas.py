"""What comes in and what goes out."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, SecretStr, StringConstraints

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
    title: str
    description: str | None = None


class ItemCreate(ItemBase):
    model_config = ConfigDict(extra="forbid")

    title: Text
    description: Text | None = None


class Item(ItemBase):
    id: int
    owner_id: int


class UserBase(BaseModel):
    email: str


class UserCreate(UserBase):
    model_config = ConfigDict(extra="forbid")

    email: Text
    password: Password


class User(UserBase):
    id: int
    is_active: bool
    items: list[Item]
