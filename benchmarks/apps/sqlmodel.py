"""SQLModel, as its tutorial and FastAPI's have it: `def` endpoints, a session for each request."""

from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import selectinload
from sqlmodel import Field, Relationship, Session, SQLModel, create_engine, select

from . import contract

if contract.SQLITE_FILE:
    engine = create_engine(
        contract.DATABASE_URL,
        connect_args={"check_same_thread": False, "timeout": contract.BUSY_TIMEOUT},
        pool_size=contract.POOL_SIZE,
    )

    @event.listens_for(engine, "connect")
    def set_pragmas(connection: Any, _: Any) -> None:
        for name, value in contract.PRAGMAS.items():
            connection.execute(f"PRAGMA {name} = {value}")
else:
    engine = create_engine(
        contract.DATABASE_URL.replace("postgresql://", "postgresql+psycopg://"),
        pool_size=contract.POOL_SIZE,
    )


class UserBase(SQLModel):
    email: str = Field(unique=True, max_length=255)
    is_active: bool = True


class User(UserBase, table=True):
    id: int | None = Field(default=None, primary_key=True)
    hashed_password: str = Field(max_length=255)

    items: list["Item"] = Relationship(
        back_populates="owner", sa_relationship_kwargs={"order_by": "Item.id"}
    )


class ItemBase(SQLModel):
    title: str = Field(index=True, max_length=255)
    description: str | None = Field(default=None, index=True, max_length=255)


class Item(ItemBase, table=True):
    id: int | None = Field(default=None, primary_key=True)
    owner_id: int = Field(foreign_key="user.id")

    owner: User = Relationship(back_populates="items")


class ItemPublic(ItemBase):
    id: int
    owner_id: int


class UserPublic(UserBase):
    id: int
    items: list[ItemPublic] = []


def get_session() -> Iterator[Session]:
    with Session(engine) as session:
        yield session


SessionDep = Annotated[Session, Depends(get_session)]
with_items = selectinload(User.items)  # type: ignore[arg-type]
app = FastAPI(max_body_size=contract.MAX_BODY_SIZE)


@app.get("/users/", response_model=list[UserPublic])
def read_users(session: SessionDep, skip: contract.Skip = 0, limit: contract.Limit = 100) -> Any:
    users = select(User).options(with_items).order_by(User.id).offset(skip).limit(limit)
    return session.exec(users).all()


@app.get("/users/{user_id}", response_model=UserPublic)
def read_user(session: SessionDep, user_id: contract.UserId) -> Any:
    user = session.get(User, user_id, options=[with_items])
    if user is None:
        raise contract.user_not_found()
    return user


@app.post("/users/{user_id}/items/", response_model=ItemPublic)
def create_item_for_user(
    session: SessionDep, user_id: contract.UserId, item: contract.ItemCreate
) -> Any:
    created = Item.model_validate(item, update={"owner_id": user_id})
    session.add(created)
    try:
        session.commit()
    except IntegrityError as error:
        raise contract.user_not_found() from error
    session.refresh(created)
    return created


@app.get("/items/", response_model=list[ItemPublic])
def read_items(session: SessionDep, skip: contract.Skip = 0, limit: contract.Limit = 100) -> Any:
    return session.exec(select(Item).order_by(Item.id).offset(skip).limit(limit)).all()
