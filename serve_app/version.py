"""The version of the installed product."""

from importlib.metadata import version

VERSION = version("ourvidz-serve")
