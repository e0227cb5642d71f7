"""`respond(query, type)`: a response that reads what it sends, whole or as a stream."""

import asyncio
import contextlib
import csv
import functools
import io
import json
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Literal

from fastapi import Response
from fastapi.exceptions import ResponseValidationError
from pydantic import ValidationError
from starlette.background import BackgroundTask
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .calls import uninterrupted
from .loading import Plans, database_of, is_query
from .plans import Texts
from .response_types import Response as Type

#: Rows that are fetched and sent at a time.
_ROWS_AT_ONCE = 500

#: Bytes of a stream that are kept in memory, before a temporary file takes what isn't sent yet.
_IN_MEMORY = 2**20

_SENT_AT_ONCE = 2**16

_MEDIA_TYPES = {
    "json": "application/json",
    "jsonl": "application/jsonl",
    "csv": "text/csv; charset=utf-8",
}


def respond(
    returned: Any,
    type_: Any,
    *,
    stream: Literal[False, True, "json", "jsonl", "csv"] = False,
    status_code: int = 200,
    headers: Mapping[str, str] | None = None,
    background: BackgroundTask | None = None,
) -> Response:
    """A response of what a query finds, on any route, `def` or `async def`.

    ::

        return respond(User.select(), list[UserOut])
        return respond(Event.select().order_by(Event.id), list[EventOut], stream="jsonl")

    What `PeeweeRoute` does with a returned query, for responses whose type is known only in the
    endpoint, and for streams. The query runs when the response is sent, with a connection of its
    own if the request holds none; what goes wrong then, before the first byte, is answered as if
    the endpoint had raised it.

    Args:
        returned: a query that reads, not executed; an instance or list of a model; or None.
        type_: a Pydantic class, an optional one, or `list[…]` of one.
        stream: send rows while others are still read: as a JSON array (True or "json"), as one JSON
            text a line ("jsonl"), or as comma-separated values under a line of names ("csv";
            nested values as JSON). Memory stays flat whatever the number of rows. The connection is
            held while the database is read, not while a slow client is sent to: what is read and
            not sent yet waits in a temporary file.
        status_code, headers, background: as for any response.

    Raises:
        TypeError: a stream of something else than a query and a list type.
        peewee.DoesNotExist: (when it is sent) no row, and the type is neither list nor optional.
    """
    plans = _plans(type_, repr(type_))
    if stream is False:
        return QueryResponse(returned, plans, status_code, headers, background)
    form = "json" if stream is True else stream
    if form not in _MEDIA_TYPES:
        raise ValueError(
            f"stream must be True or one of {', '.join(_MEDIA_TYPES)}; got: {stream!r}"
        )
    response = plans.response
    if response.schema is None or not response.many or response.whole or not is_query(returned):
        raise TypeError(
            "A stream needs a query that wasn't executed and the type of a list of Pydantic "
            f"models, as list[UserOut], with nothing around the list; got: {returned!r}, {type_!r}"
        )
    return QueryStream(returned, plans, form, status_code, headers, background)


@functools.lru_cache(maxsize=1024)
def _plans(type_: Any, written: str) -> Plans:
    """Also by the text of a type: `A | B == B | A`, though Pydantic chooses by their order."""
    return Plans(type_)


class QueryResponse(Response):
    """A response whose body is read from the database when it is sent."""

    media_type = "application/json"

    def __init__(
        self,
        returned: Any,
        plans: Plans,
        status_code: int,
        headers: Mapping[str, str] | None,
        background: BackgroundTask | None,
    ) -> None:
        self._returned = returned
        self._plans = plans
        super().__init__(None, status_code, headers, background=background)
        self._is_loaded = False

    def load(self) -> Any:
        """Read, with a connection: what `finish` takes."""
        value = self._plans.load(self._returned)
        if isinstance(value, Texts):
            return value
        try:
            return self._plans.response.validated(value, read=is_query(self._returned))
        except ValidationError as error:
            raise ResponseValidationError(errors=error.errors(), body=value) from error

    def finish(self, value: Any) -> None:
        """Make the body, without a connection."""
        if isinstance(value, Texts):
            self.body = value.body()
        else:
            self.body = self._plans.response.adapter.dump_json(value, by_alias=True)
        self.headers["content-length"] = str(len(self.body))
        self._is_loaded = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._is_loaded:
            await self._read()
        await super().__call__(scope, receive, send)

    async def _read(self) -> None:
        if is_query(self._returned) and (texts := await self._plans.aload(self._returned)):
            self.finish(texts)
        elif self._plans.needs_database(self._returned):
            await database_of(self._returned).call(self.load, self.finish)
        else:
            self.finish(self.load())


class QueryStream(StreamingResponse):
    """Reads in one thread, as fast as the database gives; sends as fast as the client takes."""

    def __init__(
        self,
        query: Any,
        plans: Plans,
        form: str,
        status_code: int,
        headers: Mapping[str, str] | None,
        background: BackgroundTask | None,
    ) -> None:
        self._query = query
        self._plans = plans
        self._encode = _ENCODERS[form]
        super().__init__(
            (), status_code, headers, media_type=_MEDIA_TYPES[form], background=background
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # It comes when the connection has gone back, also if the client didn't hear to the end.
        background, self.background = self.background, None
        with tempfile.SpooledTemporaryFile(_IN_MEMORY) as file:
            await self._send(_Pipe(file), scope, receive, send)
        if background is not None:
            await background()

    async def _send(self, pipe: "_Pipe", scope: Scope, receive: Receive, send: Send) -> None:
        reading = asyncio.ensure_future(
            database_of(self._query).call(functools.partial(self._read, pipe))
        )
        reading.add_done_callback(pipe.end)
        try:
            # What fails before the first row is an error response, not a broken stream.
            await pipe.filled.wait()
            pipe.check()
            if scope["method"] != "HEAD":  # whose body is empty, and needs no reading on
                self.body_iterator = pipe.chunks()
            await super().__call__(scope, receive, send)
        finally:
            pipe.stopped = True
            reading.cancel()  # it may still wait for a connection
            if cancelled := await uninterrupted(reading):
                raise cancelled
            if not reading.cancelled():
                reading.exception()  # it has been raised already, or nobody is left to hear of it

    def _read(self, pipe: "_Pipe") -> None:
        chunks = self._plans.plan(self._query).stream(database_of(self._query), _ROWS_AT_ONCE)
        with contextlib.closing(chunks):
            for data in self._encode(chunks, self._plans.response):
                if pipe.stopped:
                    return
                pipe.write(data)


class _Pipe:
    """From a thread to a task: bytes, in memory while they are few, else in a temporary file.

    Made on the event loop of the task. The lock covers the file, which both sides use.
    """

    def __init__(self, file: Any) -> None:
        self.filled = asyncio.Event()
        self.stopped = False
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._file = file
        self._start = self._stop = 0  # what isn't read yet
        self._ended: asyncio.Future[Any] | None = None

    def write(self, data: bytes) -> None:
        with self._lock:
            self._file.seek(self._stop)
            self._file.write(data)
            self._stop += len(data)
        self._loop.call_soon_threadsafe(self.filled.set)

    def end(self, reading: "asyncio.Future[Any]") -> None:
        self._ended = reading
        self.filled.set()

    def check(self) -> None:
        """Raise what went wrong, once all that was written before has been read."""
        if self._ended is not None and self._start == self._stop:
            self._ended.result()

    async def chunks(self) -> AsyncIterator[bytes]:
        while True:
            await self.filled.wait()
            if data := self._take():
                yield data
            elif self._ended is None:
                self.filled.clear()
            else:
                self.check()
                return

    def _take(self) -> bytes:
        with self._lock:
            self._file.seek(self._start)
            data = self._file.read(min(_SENT_AT_ONCE, self._stop - self._start))
            self._start += len(data)
            if self._start == self._stop and self._start:
                self._file.seek(0)
                self._file.truncate()
                self._start = self._stop = 0
            return data


def _as_array(chunks: Iterator[list[bytes]], response: Type) -> Iterator[bytes]:
    before = b"["
    for chunk in chunks:
        yield before + b",".join(chunk)
        before = b","
    yield b"]" if before == b"," else b"[]"


def _as_lines(chunks: Iterator[list[bytes]], response: Type) -> Iterator[bytes]:
    for chunk in chunks:
        # PostgreSQL's `json` keeps white space; inside of texts, JSON has no line break.
        lines = [text.replace(b"\n", b" ").replace(b"\r", b" ") for text in chunk]
        yield b"\n".join(lines) + b"\n"


def _as_csv(chunks: Iterator[list[bytes]], response: Type) -> Iterator[bytes]:
    names = response.names
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(names)
    for chunk in chunks:
        for row in map(json.loads, chunk):
            writer.writerow([_cell(row.get(name)) for name in names])
        yield text.getvalue().encode()
        text.seek(0)
        text.truncate()
    yield text.getvalue().encode()  # the names, if there was no row


def _cell(value: Any) -> Any:
    if isinstance(value, bool | dict | list):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return value


_Encoder = Callable[[Iterator[list[bytes]], Type], Iterator[bytes]]
_ENCODERS: dict[str, _Encoder] = {"json": _as_array, "jsonl": _as_lines, "csv": _as_csv}
