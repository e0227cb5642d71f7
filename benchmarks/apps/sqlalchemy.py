"""SQLAlchemy's ORM with its asyncio extension: `async def`, a session for each request."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from sqlalchemy import ForeignKey, String, event, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload

from . import contract

if contract.SQLITE_FILE:
    engine = create_async_engine(
        contract.DATABASE_URL.replace("sqlite:", "sqlite+aiosqlite:"),
        connect_args={"timeout": contract.BUSY_TIMEOUT},
        pool_size=contract.POOL_SIZE,
    )

    @event.listens_for(engine.sync_engine, "connect")
    def set_pragmas(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        for name, value in contract.PRAGMAS.items():
            cursor.execute(f"PRAGMA {name} = {value}")
        cursor.close()
else:
    engine = create_async_engine(
        contract.DATABASE_URL.replace("postgresql:", "postgresql+asyncpg:"),
        pool_size=contract.POOL_SIZE,
    )
sessions = async_sessionmaker(engine, expire_on_commit=False)


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "user"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(255), unique=True)
    hashed_password: Mapped[str] = mapped_column(String(255))
    is_active: Mapped[bool] = mapped_column(default=True)
    items: Mapped[list["Item"]] = relationship(back_populates="owner", order_by="Item.id")


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(255), index=True)
    description: Mapped[str | None] = mapped_column(String(255), index=True)
    owner_id: Mapped[int] = mapped_column(ForeignKey("user.id"), index=True)
    owner: Mapped[User] = relationship(back_populates="items")


async def get_session() -> AsyncIterator[AsyncSession]:
    async with sessions() as session:
        yield session


Session = Annotated[AsyncSession, Depends(get_session)]
with_items = selectinload(User.items)
app = FastAPI(max_body_size=contract.MAX_BODY_SIZE)


@app.get("/users/", response_model=list[contract.User])
async def read_users(session: Session, skip: contract.Skip = 0, limit: contract.Limit = 100) -> Any:
    users = select(User).options(with_items).order_by(User.id).offset(skip).limit(limit)
    return (await session.scalars(users)).all()


@app.get("/users/{user_id}", response_model=contract.User)
async def read_user(session: Session, user_id: contract.UserId) -> Any:
    user = await session.get(User, user_id, options=[with_items])
    if user is None:
        raise contract.user_not_found()
    return user


@app.post("/users/{user_id}/items/", response_model=contract.Item)
async def create_item_for_user(
    session: Session, user_id: contract.UserId, item: contract.ItemCreate
) -> Any:
    created = Item(**item.model_dump(), owner_id=user_id)
    session.add(created)
    try:
        await session.commit()
    except IntegrityError as error:
        raise contract.user_not_found() from error
    return created


@app.get("/items/", response_model=list[contract.Item])
async def read_items(session: Session, skip: contract.Skip = 0, limit: contract.Limit = 100) -> Any:
    return (await session.scalars(select(Item).order_by(Item.id).offset(skip).limit(limit))).all()
