"""Python's sqlite3 by hand: `def` endpoints, a connection for each thread, a response model."""

import sqlite3
import threading
from typing import Any

from fastapi import FastAPI

from . import contract

local = threading.local()


def connection() -> sqlite3.Connection:
    try:
        opened: sqlite3.Connection = local.connection
    except AttributeError:
        opened = local.connection = sqlite3.connect(
            str(contract.SQLITE_FILE), timeout=contract.BUSY_TIMEOUT, isolation_level=None
        )
        for name, value in contract.PRAGMAS.items():
            opened.execute(f"PRAGMA {name} = {value}")
    return opened


ITEM = "SELECT id, title, description, owner_id FROM item"
USER = "SELECT id, email, is_active FROM user"


def item(row: tuple[Any, ...]) -> dict[str, Any]:
    number, title, description, owner_id = row
    return {"id": number, "title": title, "description": description, "owner_id": owner_id}


def with_items(rows: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    users = {
        number: {"id": number, "email": email, "is_active": is_active, "items": []}
        for number, email, is_active in rows
    }
    marks = ",".join("?" * len(users))
    for row in connection().execute(
        f"{ITEM} WHERE owner_id IN ({marks}) ORDER BY id", tuple(users)
    ):
        users[row[3]]["items"].append(item(row))
    return list(users.values())


app = FastAPI(max_body_size=contract.MAX_BODY_SIZE)


@app.get("/users/", response_model=list[contract.User])
def read_users(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Any:
    rows = connection().execute(f"{USER} ORDER BY id LIMIT ? OFFSET ?", (limit, skip)).fetchall()
    return with_items(rows)


@app.get("/users/{user_id}", response_model=contract.User)
def read_user(user_id: contract.UserId) -> Any:
    rows = connection().execute(f"{USER} WHERE id = ?", (user_id,)).fetchall()
    if not rows:
        raise contract.user_not_found()
    return with_items(rows)[0]


@app.post("/users/{user_id}/items/", response_model=contract.Item)
def create_item_for_user(user_id: contract.UserId, item: contract.ItemCreate) -> Any:
    try:
        cursor = connection().execute(
            "INSERT INTO item (title, description, owner_id) VALUES (?, ?, ?)",
            (item.title, item.description, user_id),
        )
    except sqlite3.IntegrityError as error:
        raise contract.user_not_found() from error
    return {"id": cursor.lastrowid, "owner_id": user_id, **item.model_dump()}


@app.get("/items/", response_model=list[contract.Item])
def read_items(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Any:
    rows = connection().execute(f"{ITEM} ORDER BY id LIMIT ? OFFSET ?", (limit, skip))
    return [item(row) for row in rows]
