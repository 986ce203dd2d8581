"""What can go wrong between a name and a graph, one class per thing that the user can do about it."""


class UnknownDatasetError(ValueError):
    """There is no graph of this name: choose one of the names in the message."""


class MissingRawFilesError(FileNotFoundError):
    """The raw files are not there, or could not be fetched: put them where the message says."""


class InvalidRawFilesError(ValueError):
    """The raw files are there but cannot be read: replace them."""


class InvalidFileError(ValueError):
    """A file of one's own graph cannot be understood: change it as the message says."""


class MissingDependencyError(ImportError):
    """An optional package is not installed: install the extra that the message names."""
