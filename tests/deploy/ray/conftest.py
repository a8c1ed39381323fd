"""One cluster of three nodes for the tests of a module."""

from __future__ import annotations
