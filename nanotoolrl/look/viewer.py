"""The page that shows rollouts, one file: viewer.html with its data inside.

Text of models and tools stands in it. It is data: it can neither end the element that holds it nor be run.
The page's Content-Security-Policy lets nothing be run or loaded but its own script, style and figures.
"""

import base64
import hashlib
import json
import re
from pathlib import Path

from nanotoolrl.files import finite

TEMPLATE = Path(__file__).with_name("viewer.html")


def page_of(template: str, data: dict) -> str:
    """The finished page: the data in place of /*DATA*/, and the hashes of the template's script and style in
    its policy, in place of 'unsafe-inline'. Numbers that are not finite are null, lone surrogates "?"."""
    for element in ("script", "style"):
        (source,) = re.findall(f"<{element}>(.*?)</{element}>", template, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        template = template.replace(f"{element}-src 'unsafe-inline'", f"{element}-src 'sha256-{digest}'")
    text = json.dumps(finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # No "<" may stand in the data, or a text in it could end its element.
    text = text.encode("utf-8", "replace").decode().replace("<", "\\u003c")
    return template.replace("/*DATA*/", text)
