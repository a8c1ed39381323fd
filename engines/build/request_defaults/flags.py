"""The flags of the build that decide what requests have by default, and what users are told of the model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from engines.build.api import OWN
from engines.build.values import ONE_OF_PRESETS, Eta, Guidance, PresetName, Prompt, SchedulerName, Steps
from engines.cli import CommandLine, Metavar, Repeatable
from engines.schedulers import Spacing


class RequestFlags(CommandLine):
    preset: Annotated[PresetName | None, ONE_OF_PRESETS] = Field(
        None,
        description="defaults of requests for a distilled model, as its authors say; the flags below replace single "
        f"ones (default: that of a published model or LoRA, by its name; {OWN}: the checkpoint's own)",
    )
    steps: Steps | None = Field(
        None, description="default denoising steps of requests (default: 50; 4 for latent consistency models)"
    )
    guidance: Guidance | None = Field(
        None, description="default guidance scale of requests (default: 7.5; 8.5 for latent consistency models)"
    )
    scheduler: Annotated[SchedulerName | None, Metavar("NAME")] = Field(
        None, description="default scheduler of requests, such as dpmpp_2m_karras (default: the checkpoint's)"
    )
    timestep_spacing: Spacing | None = Field(
        None, description="default spacing of the timesteps (default: the checkpoint's)"
    )
    eta: Eta | None = Field(None, description="default share of fresh noise, 0 to 1, of ddim and tcd")
    example: Annotated[Repeatable[Prompt], Metavar("PROMPT")] = Field(
        (), description="a prompt that shows what the model can draw, repeatable"
    )
    notes: str = Field("", max_length=1000, description="what users should know of the model; the web page shows it")

    def of_requests(self) -> dict[str, Any]:
        """These flags as fields of `ExportOptions`."""
        given = {name: getattr(self, name) for name in RequestFlags.model_fields}
        return {"examples": given.pop("example"), **given}
