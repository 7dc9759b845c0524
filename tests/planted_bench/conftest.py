"""The benchmarks' own plugin, for benchmarks that are planted here."""

from benchmarks.conftest import *  # noqa: F403
