"""What Metaflow's cards hold."""

import base64
import re
from pathlib import Path


def pictures_of(card: Path) -> int:
    """Return how many pictures a card shows; the page's own icon is not among them."""
    data = re.findall(r'__MF_DATA__\["[\w-]+"\] = "([\w+/=]+)"', card.read_text())
    return b"".join(map(base64.b64decode, data)).count(b"data:image/png;base64,")
