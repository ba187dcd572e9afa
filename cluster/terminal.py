"""Text for a terminal."""


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters and surrogates as escapes."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
