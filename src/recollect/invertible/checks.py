"""What :meth:`recollect.invertible.Module.check` is made of, for checks of other kinds of modules."""

from recollect.invertible._check import Subject, check_subject, plainly

__all__ = ["Subject", "check_subject", "plainly"]
