"""What checks images and prompts: by the settings, and by what is there."""

from __future__ import annotations

from importlib import import_module
from inspect import iscoroutinefunction, signature

from engines.backends.registry import install_command
from engines.errors import EngineError
from engines.manifest import Manifest
from server.api.prompt_check import PromptCheck
from server.runtime.pipeline.opennsfw import OpenNsfw, is_installed
from server.runtime.pipeline.safety import UNCHECKED, Mode, Safety

_ADVICE = (
    "write package.module:function, of a module that can be imported (PYTHONPATH) and a function that takes the prompt "
    "and the negative prompt."
)


def choose_safety(mode: Mode | None, manifest: Manifest) -> Safety:
    """The bundle's own checker, or else the classifier of the extra. None: to flag where the bundle has a checker.

    Raises:
        EngineError: images are to be checked, and nothing is there to check them.
    """
    if manifest.has_safety_checker:
        return Safety(mode or "flag")
    if mode is None or mode == "off":
        return UNCHECKED
    if is_installed():
        return Safety(mode, OpenNsfw())
    raise EngineError(
        f"--safety {mode} needs a safety checker, and {manifest.name} was built without one: install the classifier "
        f"({install_command('safety')}), or build from a diffusers folder that has a safety_checker."
    )


def load_prompt_check(name: str) -> PromptCheck:
    """Import `package.module:function`. Raises EngineError where there is no such function of two arguments."""
    module, _, function = name.partition(":")
    try:
        check = getattr(import_module(module), function)
        signature(check).bind("", "")
    except Exception as error:  # importing runs the operator's code
        raise EngineError(
            f"--prompt-check {name} cannot be used ({type(error).__name__}: {error}): {_ADVICE}"
        ) from error
    if iscoroutinefunction(check):
        raise EngineError(f"--prompt-check {name} is a coroutine function: write it without async.")
    return PromptCheck(check, name)
