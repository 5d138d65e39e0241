"""The installed version of clipfit."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("clipfit")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
