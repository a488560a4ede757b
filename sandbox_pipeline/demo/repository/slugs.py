"""Names for URLs."""


def slugify(title: str) -> str:
    """Turn a title into lower-case words joined by single dashes."""
    return title.lower().replace(" ", "-")
