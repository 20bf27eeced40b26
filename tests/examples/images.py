"""Images from the composer: kept on disk, shown in the chat, and told to the model.

Copy this file beside main.py and run it in its place. The images are kept in the folder that IMAGES
names, `images` by default. Behind a proxy, IMAGES_URL is the address at which users reach /images.
Only their user can send or delete them. Who knows the address of an image can look at it: a browser
sends no token for an <img>.
"""

import base64
import os
import secrets
from pathlib import Path

import anyio
from chatkit.store import AttachmentStore
from chatkit.types import Attachment, AttachmentCreateParams, ImageAttachment
from fastapi import HTTPException, Request
from fastapi.staticfiles import StaticFiles
from openai.types.responses import ResponseInputContentParam
from pydantic import AnyUrl
from starlette.datastructures import UploadFile

import main

FOLDER = Path(os.getenv("IMAGES", "images"))
FOLDER.mkdir(exist_ok=True)
IMAGES_URL = os.getenv("IMAGES_URL", "")
MAX_IMAGE_BYTES = 4 * 1024 * 1024
FORM_BYTES = 4 * 1024  # what a form adds to its file
STARTS = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff"}  # the first bytes of a file


class Images(AttachmentStore[main.Context]):
    async def create_attachment(
        self, input: AttachmentCreateParams, context: main.Context
    ) -> Attachment:
        raise HTTPException(400, "Upload the image to /images.")

    async def delete_attachment(self, attachment_id: str, context: main.Context) -> None:
        await main.server.store.load_attachment(attachment_id, context)  # raises NotFoundError
        for kind in STARTS:
            await anyio.Path(FOLDER / f"{attachment_id}.{kind}").unlink(missing_ok=True)


@main.app.post("/images")
async def upload(request: Request, context: main.RequestContext) -> Attachment:
    """Keep an image, as ChatKit's upload strategy `direct` sends it."""
    length = request.headers.get("Content-Length", "")
    if not length.isdigit() or int(length) > MAX_IMAGE_BYTES + FORM_BYTES:
        raise HTTPException(413, f"An image may have {MAX_IMAGE_BYTES} bytes.")
    async with request.form(max_files=1) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise HTTPException(400, "The form has no file.")
        name, content = file.filename or "image", await file.read()
    kind = next((kind for kind, start in STARTS.items() if content.startswith(start)), None)
    if kind is None:
        raise HTTPException(415, "Only PNG and JPEG images can be sent.")
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
        path = anyio.Path(FOLDER / f"{attachment.id}.{attachment.mime_type.removeprefix('image/')}")
        if not await path.exists():
            return {"type": "input_text", "text": f"The image {attachment.name} was deleted."}
        content = base64.b64encode(await path.read_bytes()).decode()
        url = f"data:{attachment.mime_type};base64,{content}"
        return {"type": "input_image", "image_url": url, "detail": "auto"}


main.server.attachment_store = Images()
main.server.converter = ImageConverter()
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
