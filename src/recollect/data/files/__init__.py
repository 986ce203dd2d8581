"""One's own graph, from files in the common formats: what they hold is told by names, headers and formats.

Sizes and values never decide what an array is. Where a file can be read in two ways, the error says what to write.
Nothing here runs code that a file holds: pickles, and arrays of objects, are not read.
"""

from recollect.data.files._from_file import from_data, from_file

__all__ = ["from_data", "from_file"]
