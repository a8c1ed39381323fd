"""ASGI middleware: what holds for every answer, whichever route gives it."""
