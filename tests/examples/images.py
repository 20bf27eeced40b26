"""With this recipe, users send images. The server checks and keeps them. The model sees them.

With a key     make run APP=tests/examples/images.py, then drop an image on the composer
Without a key  PROVIDER=mock make run APP=tests/examples/images.py (the reply is canned)
Change         IMAGES names the folder; the default is `images`. Behind a proxy, set IMAGES_URL to
               the address at which users reach /images. nginx needs client_max_body_size 4m.

Other users can neither send nor delete an image. But anyone who knows its address can look at it: a
browser sends no token for an <img>. The images of a deleted thread stay in the folder.
"""

import base64
import os
import secrets
import struct
import zlib
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import anyio
from chatkit.store import AttachmentStore
from chatkit.types import Attachment, ImageAttachment, NoticeEvent, ThreadMetadata, UserMessageItem
from fastapi import HTTPException, Request
from fastapi.staticfiles import StaticFiles
from openai.types.responses import ResponseInputContentParam
from pydantic import AnyUrl
from starlette.datastructures import UploadFile

import main

FOLDER = Path(os.getenv("IMAGES", "images"))
FOLDER.mkdir(exist_ok=True)
IMAGES_URL = os.getenv("IMAGES_URL", "")
# Anthropic's bounds: 5 MB in base64, which makes four bytes of three, and 8000 pixels.
MAX_IMAGE_BYTES = 5_000_000 // 4 * 3
MAX_SIDE = 8000
TOO_LARGE = f"An image may have {MAX_IMAGE_BYTES} bytes and {MAX_SIDE} pixels a side."
PNG, JPEG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\xff\xd8"  # the first bytes of a file
JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the segments that tell the size
model_is_blind: ContextVar[bool] = ContextVar("model_is_blind", default=False)  # of this turn


def read_header(content: bytes) -> tuple[str, tuple[int, int]] | None:
    """Return the kind and the two sides of a PNG or JPEG image, or None if it is broken."""
    if content.startswith(PNG) and content[29:33] == struct.pack(">I", zlib.crc32(content[12:29])):
        return "png", struct.unpack(">II", content[16:24])
    place = len(JPEG)
    # A segment begins with 255, its kind, and its length. A second 255 only fills.
    while content.startswith(JPEG) and content[place : place + 1] == b"\xff":
        segment = content[place + 1 : place + 9]
        if len(segment) == 8 and segment[0] in JPEG_FRAMES:
            return "jpeg", struct.unpack(">HH", segment[4:])
        place += 1 if segment[:1] == b"\xff" else 2 + int.from_bytes(segment[1:3], "big")
    return None


class Images(AttachmentStore[main.Context]):
    async def delete_attachment(self, attachment_id: str, context: main.Context) -> None:
        # main.py has checked that it is this user's.
        for kind in ("png", "jpeg"):
            await anyio.Path(FOLDER / f"{attachment_id}.{kind}").unlink(missing_ok=True)


@main.app.post("/images")
async def upload(request: Request, context: main.RequestContext) -> Attachment:
    """Keep an image, as ChatKit's upload strategy `direct` sends it."""
    length = request.headers.get("Content-Length", "")
    if not length.isdigit() or int(length) > MAX_IMAGE_BYTES + 4096:  # for the form
        raise HTTPException(413, TOO_LARGE)
    async with request.form(max_files=1) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise HTTPException(400, "The form has no file.")
        name, content = file.filename or "image", await file.read()
    header = read_header(content)
    if header is None or 0 in header[1]:
        raise HTTPException(415, "Only PNG and JPEG images can be sent.")
    kind, sides = header
    if len(content) > MAX_IMAGE_BYTES or max(sides) > MAX_SIDE:
        raise HTTPException(413, TOO_LARGE)
    id = f"atc_{secrets.token_hex(16)}"
    await anyio.Path(FOLDER / f"{id}.{kind}").write_bytes(content)
    address = IMAGES_URL or str(request.url_for("images", path=""))
    image = ImageAttachment(
        id=id,
        name=name,
        mime_type=f"image/{kind}",
        preview_url=AnyUrl(f"{address.rstrip('/')}/{id}.{kind}"),
    )
    await main.server.store.save_attachment(image, context)
    return image


class ImageConverter(main.Converter):
    async def attachment_to_message_content(
        self, attachment: Attachment
    ) -> ResponseInputContentParam:
        """Tell the model the image itself: its provider cannot load it from this server."""
        if model_is_blind.get():
            text = f"The image {attachment.name}, which you cannot see."
            return {"type": "input_text", "text": text}
        path = anyio.Path(FOLDER / f"{attachment.id}.{attachment.mime_type.removeprefix('image/')}")
        if not await path.exists():
            return {"type": "input_text", "text": f"The image {attachment.name} was deleted."}
        content = base64.b64encode(await path.read_bytes()).decode()
        url = f"data:{attachment.mime_type};base64,{content}"
        return {"type": "input_image", "image_url": url, "detail": "auto"}


def is_blind(model: Any) -> bool:
    """Return whether LiteLLM knows the model, and knows it to be without vision."""
    import litellm  # not before main.py, which sets its environment

    if isinstance(model, str | None):
        model = main.ProviderModels().get_model(model)
    provider, _, name = getattr(model, "model", "").partition("/")
    known = litellm.model_cost.get(f"{provider}/{name}") or litellm.model_cost.get(name, {})
    return known.get("litellm_provider") == provider and not known.get("supports_vision")


respond_without_notice = main.server.respond


async def respond(
    thread: ThreadMetadata, input: UserMessageItem | None, context: main.Context
) -> main.Events:
    """Answer, after a notice if the model cannot see the message's images."""
    config = await main.server.run_config_for(thread, input, context)
    agent = await main.server.agent_for(thread, input, context)
    model_is_blind.set(is_blind(config.model or agent.model))
    if input and input.attachments and model_is_blind.get():
        notice = "This model cannot see images. It is told their names only."
        yield NoticeEvent(level="warning", message=notice)
    async for event in respond_without_notice(thread, input, context):
        yield event


main.server.attachment_store = Images()
main.server.converter = ImageConverter()
main.server.respond = respond  # type: ignore[method-assign]
main.app.mount("/images", StaticFiles(directory=FOLDER), name="images")
main.PAGE_OPTIONS = """{
  api: { uploadStrategy: { type: "direct", uploadUrl: new URL("images", location).href } },
  composer: {
    attachments: {
      enabled: true,
      accept: { "image/png": [".png"], "image/jpeg": [".jpg", ".jpeg"] },
      maxSize: MAX_IMAGE_BYTES,
    },
  },
}""".replace("MAX_IMAGE_BYTES", str(MAX_IMAGE_BYTES))

if __name__ == "__main__":
    main.serve()
