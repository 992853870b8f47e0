"""Public sources of cat and dog photos, and the layout of their archives."""

from __future__ import annotations

from dataclasses import dataclass

_GIGABYTE = 1 << 30


@dataclass(frozen=True)
class Source:
    """A public dataset and the layout of its archive.

    Attributes:
        description: One line for the help text.
        image_count: Number of published images.
        image_pattern: Regular expression for image paths in the archive, with a group ``label`` for the class and,
            if the source has a split, a group ``split``.
        url: Download URL, or None to download ``competition`` with Kaggle's client.
        competition: Name of the Kaggle competition.
        sha256: Expected sha256 of the archive, if known.
        inner_archive: Archive within the archive that contains the images.
        note: Printed after the download.
        max_members: Maximum number of files in the archive.
        max_bytes: Maximum uncompressed size of the archive in bytes.
    """

    description: str
    image_count: int
    image_pattern: str
    url: str | None = None
    competition: str | None = None
    sha256: str | None = None
    inner_archive: str | None = None
    note: str = ""
    max_members: int = 60_000
    max_bytes: int = 4 * _GIGABYTE

    @property
    def has_split(self) -> bool:
        """Whether the archive has a validation split."""
        return "(?P<split>" in self.image_pattern


SOURCES: dict[str, Source] = {
    "filtered": Source(
        description="2,000 training and 1,000 validation photos, a subset by Google (69 MB)",
        image_count=3_000,
        image_pattern=r"cats_and_dogs_filtered/(?P<split>train|validation)/(?P<label>cats|dogs)/[^/.][^/]*\.(?i:jpe?g)",
        url="https://storage.googleapis.com/mledu-datasets/cats_and_dogs_filtered.zip",
        max_members=10_000,
        max_bytes=_GIGABYTE,
    ),
    "microsoft": Source(
        description="all 25,000 photos from Microsoft (825 MB)",
        image_count=25_000,
        image_pattern=r"PetImages/(?P<label>Cat|Dog)/[^/.][^/]*\.(?i:jpe?g)",
        url="https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/kagglecatsanddogs_5340.zip",
        sha256="b7974bd00a84a99921f36ee4403f089853777b5ae8d151c76a86e64900334af9",
        note="According to the publisher, 1,738 of its files are damaged. They are not removed.",
    ),
    "kaggle": Source(
        description="the 25,000 training photos of the Kaggle competition, with Kaggle's client (about 850 MB)",
        image_count=25_000,
        image_pattern=r"train/(?P<label>cat|dog)\.\d+\.(?i:jpe?g)",
        competition="dogs-vs-cats",
        inner_archive="train.zip",
    ),
}
