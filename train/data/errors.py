"""What is said of data that cannot be used."""


class DataError(ValueError):
    """Something that is no data set; the message says what was expected and what came."""
