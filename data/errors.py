"""What goes wrong with data, in words for the user."""


class DataError(Exception):
    """A data set that is missing, damaged or unknown; the message is one line that also says what
    would be right."""
