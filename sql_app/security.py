"""Passwords: stored as argon2id hashes, made without a database connection."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

from pwdlib import PasswordHash

_hasher = PasswordHash.recommended()

# A hash takes 64 MiB and a core for as long as a few hundred queries: no more at a time than there
# are cores, and never on the event loop.
_threads = ThreadPoolExecutor(os.cpu_count() or 1, "password")


def hash_password(password: str) -> str:
    return _hasher.hash(password)


async def ahash_password(password: str) -> str:
    return await asyncio.get_running_loop().run_in_executor(_threads, hash_password, password)
