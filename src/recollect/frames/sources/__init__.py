"""Where the inputs of frames come from in backward: one file for each source."""

from recollect.frames.sources._source import Held, Source

__all__ = ["Held", "Source"]
