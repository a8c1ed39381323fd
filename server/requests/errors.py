"""Errors that are reported to callers, and the HTTP status of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class FieldError:
    """A validation error of one field."""

    field: str
    message: str


class ServerError(Exception):
    """Base of the errors that end a request; the message says what to do next."""

    def __init__(self, detail: str, *, fields: tuple[FieldError, ...] = (), retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.fields = fields
        self.retry_after = retry_after  # seconds


class MalformedBody(ServerError):
    """The body is not valid JSON, or not a valid form."""


class NotFound(ServerError):
    """There is nothing at this path, or no longer."""


class UnknownModel(NotFound):
    """The server has no model of that name."""


class MethodNotAllowed(ServerError):
    """The path does not support this method."""


class Unauthenticated(ServerError):
    """The request has no API key, or one that is not known."""


class Forbidden(ServerError):
    """The API key does not allow this."""


class UnknownHost(ServerError):
    """The Host header does not name this server."""


class ForeignOrigin(ServerError):
    """A form was submitted from a page of another origin."""


class NotDone(ServerError):
    """The job has no image yet, or will have none."""


class BodyTooLarge(ServerError):
    """The body exceeds the size limit."""


class UnsupportedMediaType(ServerError):
    """The Content-Type is neither JSON nor a form, or the body is compressed."""


class NotAcceptable(ServerError):
    """`Accept` names no media type that the server produces."""


class InvalidRequest(ServerError):
    """The body is well-formed, but a value is invalid or unsupported."""


class PromptRefused(ServerError):
    """The operator's check refuses the prompt; the message is its reason."""


class ContentBlocked(ServerError):
    """The safety checker flagged an image, and the operator has such requests blocked."""

    seeds: tuple[int, ...] = ()  # of the flagged images

    @classmethod
    def of(cls, seeds: tuple[int, ...]) -> Self:
        named = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
        error = cls(f"The safety checker flagged the image of {named}: use another seed, or another prompt.")
        error.seeds = seeds
        return error


class QueueFull(ServerError):
    """The queue has reached its limit."""


class RateLimited(ServerError):
    """The caller has reached its own limit of requests."""


class NotReady(ServerError):
    """The model is loading, or the server is draining."""


class ModelNotLoaded(NotReady):
    """The server has the model, and it is not loaded, or is about to be unloaded."""


class TooManyBodies(ServerError):
    """The bodies of other requests take all the memory that there is for them."""


class StorageFailed(ServerError):
    """The database of jobs cannot be read or written."""


class LoraUnreadable(ServerError):
    """The file of a LoRA cannot be read now, or there is no memory for it."""


class InternalError(ServerError):
    """An unexpected error of the server, which its log describes."""


class StepFailed(ServerError):
    """An engine failed in a step that included this request."""


class BrokenPicture(ServerError):
    """The image contains NaN or infinite values."""


class Cancelled(ServerError):
    """The caller disconnected, or cancelled the request, before it was complete."""


class DeadlineExceeded(Cancelled):
    """The time limit that the caller set passed before the request was complete."""


class ServerStopping(Cancelled):
    """The server stopped before the request was complete."""


STATUS: dict[type[ServerError], int] = {
    MalformedBody: 400,
    Unauthenticated: 401,
    Forbidden: 403,
    ForeignOrigin: 403,
    NotFound: 404,
    UnknownModel: 404,
    MethodNotAllowed: 405,
    NotAcceptable: 406,
    NotDone: 409,
    BodyTooLarge: 413,
    UnsupportedMediaType: 415,
    UnknownHost: 421,
    InvalidRequest: 422,
    PromptRefused: 422,
    ContentBlocked: 422,
    QueueFull: 429,
    RateLimited: 429,
    Cancelled: 499,
    InternalError: 500,
    StepFailed: 500,
    BrokenPicture: 500,
    NotReady: 503,
    ModelNotLoaded: 503,
    TooManyBodies: 503,
    StorageFailed: 503,
    LoraUnreadable: 503,
    ServerStopping: 503,
    DeadlineExceeded: 504,
}
