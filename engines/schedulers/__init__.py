"""Schedulers as tables: every step of every method is linear in x, the model's output, fresh noise and the memory.

The reference is diffusers' class of the same method, configured by `from_config(the checkpoint's scheduler config)`:
the same calls, the same timesteps, and x in the same space, so that one row of a table stands for one `step()`.
"""

from engines.schedulers.catalogue import NAMES, complete, describe, find, table
from engines.schedulers.levels import Sigmas, Spacing
from engines.schedulers.methods import METHODS, Description, Method
from engines.schedulers.steps import NUMBERS, FinalSigma, Scheduler, Step, Table

__all__ = [
    "METHODS",
    "NAMES",
    "NUMBERS",
    "Description",
    "FinalSigma",
    "Method",
    "Scheduler",
    "Sigmas",
    "Spacing",
    "Step",
    "Table",
    "complete",
    "describe",
    "find",
    "table",
]
