"""Images inside a page."""

import base64
import io

from PIL import Image
from torch import Tensor

SMALL = 64  # pixels up to which an image stays as it is
SHOWN = 160  # pixels of the longer side of a larger one


def data_uri(image: Tensor) -> str:
    """Returns an image uint8 (H, W, 3) as a data URI: small ones as PNG, larger ones as JPEG of 160 pixels."""
    picture, buffer = Image.fromarray(image.cpu().numpy()), io.BytesIO()
    kind = "png" if max(picture.size) <= SMALL else "jpeg"
    if kind == "jpeg":
        picture.thumbnail((SHOWN, SHOWN), Image.Resampling.BICUBIC)
    picture.save(buffer, format=kind, **({"quality": 80} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
