"""The reference application of fastapi-peewee: users who own items."""
