"""FastAPI and no database: constants as large as the others' answers: what is left to win."""

from fastapi import FastAPI, Response

from . import contract

_item = contract.Item(
    title="Item 2500 “of” user 500",
    description='What user 500 says of "2500"',
    id=2500,
    owner_id=500,
)
_user = contract.User(email="user0500@example.com", id=500, is_active=True, items=[_item] * 5)
ITEM = _item.model_dump_json().encode()
USER = _user.model_dump_json().encode()
ITEMS = b"[" + b",".join([ITEM] * 100) + b"]"
USERS = b"[" + b",".join([USER] * 100) + b"]"


def constant(body: bytes) -> Response:
    return Response(body, media_type="application/json")


app = FastAPI(max_body_size=contract.MAX_BODY_SIZE)


@app.get("/users/")
async def read_users(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Response:
    return constant(USERS)


@app.get("/users/{user_id}")
async def read_user(user_id: contract.UserId) -> Response:
    return constant(USER)


@app.post("/users/{user_id}/items/")
async def create_item_for_user(user_id: contract.UserId, item: contract.ItemCreate) -> Response:
    return constant(ITEM)


@app.get("/items/")
async def read_items(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Response:
    return constant(ITEMS)
