"""Folders of anyone's pictures, to be scored as the reference tools score them.

A picture's pixels are what ``PIL.Image.open(path).convert("RGB")`` gives, as in torch-fidelity, pytorch-fid and clean-fid: EXIF's
rotation and colour profiles count for nothing, and transparency is dropped. (`pictures`, which prepares datasets, heeds all
three.) Only damage is treated otherwise: it is an error, where those tools score half a picture. Pictures are all below the
folder, in the order of their paths. Called by `folders`.
"""

import collections
import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from pipelines import storage
from pipelines.errors import UserError

EXTENSIONS = ("png", "jpg", "jpeg", "webp")
DECODING = (
    "as Pillow's convert('RGB'); EXIF rotation and colour profiles ignored, transparency dropped"
)

_FORMATS = ("PNG", "JPEG", "WEBP")
_MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")
"""Those of 8 bits or fewer a channel; Pillow cuts others off instead of scaling them."""
_NAMED = 3
"""Sizes that a message names."""


class Size(NamedTuple):
    """Of a picture, in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"


@dataclass(frozen=True, slots=True)
class PictureFolder:
    """A folder that was looked through.

    Args:
        path: absolute.
        names: of its pictures, relative, in order.
        sizes: of each.
        sha256: of all names and contents.
    """

    path: str
    names: tuple[str, ...]
    sizes: tuple[Size, ...]
    sha256: str

    @classmethod
    def open(cls, path: str, key: str, pool: Executor) -> "PictureFolder":
        """Look through a folder; every file is read once, its pixels are not.

        Args:
            path: of the folder.
            key: the argument that gave it, for messages.
            pool: threads that read.

        Raises:
            UserError: there is no such folder, it holds no picture, or a file cannot be read as one.
        """
        folder = storage.absolute(path)
        if not storage.is_directory(folder):
            raise UserError(f"{key}={path!r}: there is no such folder")
        files = storage.walk(folder)
        names = [name for name in files if name.rpartition(".")[2].lower() in EXTENSIONS]
        if not names:
            raise UserError(
                f"{key}={path!r}: holds no pictures ({', '.join(EXTENSIONS)}) "
                f"among its {len(files)} files"
            )
        digest, sizes = hashlib.sha256(), []
        looks = pool.map(lambda name: _look(storage.join(folder, name)), names)
        for name, (content_hash, size) in zip(names, looks, strict=True):
            digest.update(f"{name}\0{content_hash}\n".encode())
            sizes.append(size)
        return cls(folder, tuple(names), tuple(sizes), digest.hexdigest())

    def batches(
        self, images: range, batch_size: int, pool: Executor
    ) -> Iterator[tuple[list[int], UInt8[ndarray, "b h w 3"]]]:
        """Decode some of the pictures; those of one size go together, and one batch is decoded ahead.

        Args:
            images: numbers of the pictures.
            batch_size: of the batches, which depend on this and `images` alone.
            pool: threads that decode.

        Yields:
            Numbers of the batch's pictures, counted from the first of `images`, and their pixels.

        Raises:
            UserError: a picture is damaged.
        """
        by_size: dict[Size, list[int]] = {}
        for number in images:
            by_size.setdefault(self.sizes[number], []).append(number)
        plans = [
            numbers[start : start + batch_size]
            for numbers in by_size.values()
            for start in range(0, len(numbers), batch_size)
        ]
        ahead: collections.deque[tuple[list[int], list[Future[ndarray]]]] = collections.deque()
        for plan in [*plans, None]:
            if plan is not None:
                paths = [storage.join(self.path, self.names[number]) for number in plan]
                ahead.append((plan, [pool.submit(_read_pixels, path) for path in paths]))
            if len(ahead) > (plan is not None):
                numbers, decoded = ahead.popleft()
                pixels = np.stack([future.result() for future in decoded])
                yield [number - images.start for number in numbers], pixels

    def count_sizes(self) -> dict[str, int]:
        """Pictures of each size, the most frequent first."""
        return {str(size): num for size, num in collections.Counter(self.sizes).most_common()}

    def describe_sizes(self) -> str:
        """Sizes with an example of each, for a message."""
        counts = collections.Counter(self.sizes).most_common()
        said = [
            f"{number} of {size} ({self.names[self.sizes.index(size)]})"
            for size, number in counts[:_NAMED]
        ]
        more = len(counts) - len(said)
        return ", ".join([*said, *([f"{more} sizes more"] if more else [])])


def _look(path: str) -> tuple[str, Size]:
    """Hash and size of a picture file."""
    content = _read(path)
    with _opened(path, content) as picture:
        if picture.mode not in _MODES:
            raise UserError(
                f"{path}: pixels of mode {picture.mode} have more than 8 bits; save it with 8 a channel"
            )
        size = Size(*picture.size)
    return hashlib.sha256(content).hexdigest(), size


def _read(path: str) -> bytes:
    try:
        return storage.read_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _opened(path: str, content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=_FORMATS)
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"{path}: is no picture ({', '.join(_FORMATS)}): {error}") from error


def _read_pixels(path: str) -> UInt8[ndarray, "h w 3"]:
    content = _read(path)
    with _opened(path, content) as picture:
        try:
            if picture.format == "JPEG" and picture.mode in ("RGB", "L"):
                # The same decoder as Pillow's, but it tells of damage.
                decoded: ndarray = simplejpeg.decode_jpeg(content, "RGB", strict=True)
                return decoded
            return np.array(picture.convert("RGB"))
        except Exception as error:
            raise UserError(f"{path}: cannot be decoded: {error}") from error


def size_warnings(folders: Sequence[tuple[str, PictureFolder]]) -> list[str]:
    """What must be said of pictures of several sizes, in one folder or between two.

    Args:
        folders: with the argument that gave each.
    """
    said = []
    for key, folder in folders:
        if len(set(folder.sizes)) > 1:
            said.append(
                f"--{key} has pictures of several sizes: {folder.describe_sizes()}; each is resized to the "
                "network's input by itself, whatever its shape"
            )
    if len(folders) == 2 and set(folders[0][1].sizes) != set(folders[1][1].sizes):
        first, second = (f"--{key} {folder.describe_sizes()}" for key, folder in folders)
        said.append(
            f"the folders' pictures differ in size: {first}; {second}; the resize to the network's input "
            "treats them differently, and the distance contains that"
        )
    return said
