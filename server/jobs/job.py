"""A job: a request that its caller asks about later."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from server.requests.context import Api, Priority
from server.requests.errors import STATUS, Cancelled, FieldError, InternalError, NotDone, ServerError
from server.requests.images import ImageFormat
from server.requests.request import Request
from server.requests.schemas import MAX_SEED, GenerateRequest, Parameters, Timings

JobStatus = Literal["queued", "running", "completed", "failed", "cancelled"]

_BY_NAME = {error.__name__: error for error in STATUS}


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True)


class StoredError(_Stored):
    """A `ServerError` that can be stored."""

    kind: str
    detail: str
    fields: dict[str, str] = {}

    @classmethod
    def of(cls, error: ServerError) -> Self:
        fields = {field.field: field.message for field in error.fields}
        return cls(kind=type(error).__name__, detail=error.detail, fields=fields)

    def restore(self) -> ServerError:
        fields = tuple(FieldError(name, message) for name, message in self.fields.items())
        return _BY_NAME.get(self.kind, InternalError)(self.detail, fields=fields)


class Facts(_Stored):
    """What the caller may know of a job, as of its last change that was stored."""

    model: str
    parameters: Parameters
    warnings: list[str]
    steps: int
    image_format: ImageFormat  # of the images in a JSON document
    priority: Priority
    request_id: str
    created: datetime
    deadline: datetime | None = None
    status: JobStatus = "queued"
    started: datetime | None = None
    finished: datetime | None = None
    step: int = 0
    timings: Timings | None = None
    error: StoredError | None = None
    flagged: tuple[bool | None, ...] = ()  # of each image, whether the safety checker flagged it; None: not checked

    @classmethod
    def of(cls, request: Request, body: GenerateRequest, *, model: str, deadline: datetime | None) -> Self:
        """The facts of a request that is about to be queued."""
        params = request.params
        return cls(
            model=model,
            parameters=Parameters.of(params),
            warnings=params.warnings,
            steps=request.steps,
            image_format=body.image_format,
            priority=request.priority,
            request_id=request.id,
            created=now(),
            deadline=deadline,
        )

    @property
    def why_not(self) -> ServerError | None:
        """Why a job that has ended has no images."""
        if self.status == "cancelled":
            return NotDone("The job was cancelled.")
        return self.error.restore() if self.error else None

    def completed(self, timings: Timings, started: datetime | None, flagged: tuple[bool | None, ...] = ()) -> Facts:
        ending = {"status": "completed", "timings": timings, "step": self.steps, "flagged": flagged}
        return self.model_copy(update={**ending, "started": started, "finished": now()})

    def failed(self, error: ServerError, *, started: datetime | None = None, step: int = 0) -> Facts:
        """With `error` as the reason; only the caller's own wish makes the job a cancelled one."""
        status: JobStatus = "cancelled" if type(error) is Cancelled else "failed"
        ending = {"status": status, "error": StoredError.of(error), "step": step}
        return self.model_copy(update={**ending, "started": started, "finished": now()})


@dataclass(frozen=True, slots=True)
class Key:
    """An `Idempotency-Key`: with the same caller and name it stands for the same job, and for no other body."""

    caller: str
    name: str
    fingerprint: str  # of the body


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it is stored, without its images."""

    id: str
    owner: str | None  # name of the API key; None: no key is needed, the id is enough
    facts: Facts
    key: Key | None = None

    @property
    def seeds(self) -> list[int]:
        """One per image."""
        params = self.facts.parameters
        return [(params.seed + index) % (MAX_SEED + 1) for index in range(params.num_images)]

    @property
    def flagged(self) -> tuple[bool | None, ...]:
        """Whether the safety checker flagged each image; None: not checked."""
        return self.facts.flagged or (None,) * len(self.seeds)

    def with_facts(self, facts: Facts) -> Job:
        return Job(self.id, self.owner, facts, self.key)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a job that has not ended is run again from. The body has its seed, its model and its cache."""

    body: GenerateRequest
    caller: str
    api: Api


def now() -> datetime:
    return datetime.now(UTC)
