"""What is shared between the processes of ``torch.distributed``: which rows each rank owns, and how others get them."""

from recollect.distributed._shares import Shares, SharesError

__all__ = ["Shares", "SharesError"]
