"""Tables of embeddings: rows with the time of their last push, in memory, on a device or in files.

A backend is one file, such as ``_memory.py``: rows, and a clock that counts pushes, as ``_table.py`` wants them.
"""

from recollect.autoscale.histories._file_layout import HistoryFileError
from recollect.autoscale.histories._history import History, history_bytes
from recollect.autoscale.histories._plain import PlainRows, Where
from recollect.autoscale.histories._pool import AsyncIOPool
from recollect.autoscale.histories._queues import Worker
from recollect.autoscale.histories._rows_source import Rows

__all__ = ["AsyncIOPool", "History", "HistoryFileError", "PlainRows", "Rows", "Where", "Worker", "history_bytes"]
