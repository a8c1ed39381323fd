"""The choice of what checks images, by the setting and by what is there."""

from __future__ import annotations

from engines.backends.registry import install_command
from engines.errors import EngineError
from engines.manifest import Manifest
from server.runtime.opennsfw import OpenNsfw, is_installed
from server.runtime.safety import UNCHECKED, Mode, Safety


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
