"""Everything a caller can be told went wrong, and the HTTP status of each, in one table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldError:
    """What is wrong with one field of a body."""

    field: str
    message: str


class ServerError(Exception):
    """A request cannot be answered with a picture; the message says what to do next."""

    def __init__(self, detail: str, *, fields: tuple[FieldError, ...] = (), retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.fields = fields
        self.retry_after = retry_after  # seconds


class MalformedBody(ServerError):
    """The body is not the JSON, or not the form, that it is declared as."""


class ForeignOrigin(ServerError):
    """The body is a form that a page of another origin sent."""


class BodyTooLarge(ServerError):
    """The body exceeds the bound on its size."""


class UnsupportedMediaType(ServerError):
    """The body is declared neither as JSON nor as a form."""


class NotAcceptable(ServerError):
    """`Accept` names nothing the server makes."""


class InvalidRequest(ServerError):
    """The body can be read, and asks for what cannot be done."""


class QueueFull(ServerError):
    """More requests wait than the bound allows."""


class NotReady(ServerError):
    """The model is loading, or the server is draining."""


class StepFailed(ServerError):
    """The engine failed in a step this request shared."""


class BrokenPicture(ServerError):
    """The model's numbers went beyond their range in this picture."""


class Cancelled(ServerError):
    """The caller went away, or the server stopped before the picture was done."""


STATUS: dict[type[ServerError], int] = {
    MalformedBody: 400,
    ForeignOrigin: 403,
    NotAcceptable: 406,
    BodyTooLarge: 413,
    UnsupportedMediaType: 415,
    InvalidRequest: 422,
    QueueFull: 429,
    Cancelled: 499,
    StepFailed: 500,
    BrokenPicture: 500,
    NotReady: 503,
}
