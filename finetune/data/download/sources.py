"""Where photos of cats and dogs are published, and how their archives are laid out."""

from __future__ import annotations

from dataclasses import dataclass

_GIGABYTE = 1 << 30


@dataclass(frozen=True)
class Source:
    """Where photos are published and how their archive is laid out.

    ``image_pattern`` matches the path of a photo in the archive; its group ``label`` is the class and ``split``, where the
    source has a split of its own, the split. No ``url`` means Kaggle's own client and the competition of that name;
    ``inner_archive`` is the archive inside the archive, and ``image_count`` how many were published.
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
        """Whether the archive itself says which photos are for validation."""
        return "(?P<split>" in self.image_pattern


SOURCES: dict[str, Source] = {
    "filtered": Source(
        description="2,000 training and 1,000 validation photos, Google's small extract (69 MB)",
        image_count=3_000,
        image_pattern=r"cats_and_dogs_filtered/(?P<split>train|validation)/(?P<label>cats|dogs)/[^/.][^/]*\.(?i:jpe?g)",
        url="https://storage.googleapis.com/mledu-datasets/cats_and_dogs_filtered.zip",
        max_members=10_000,
        max_bytes=_GIGABYTE,
    ),
    "microsoft": Source(
        description="all 25,000 photos, from Microsoft (825 MB)",
        image_count=25_000,
        image_pattern=r"PetImages/(?P<label>Cat|Dog)/[^/.][^/]*\.(?i:jpe?g)",
        url="https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/kagglecatsanddogs_5340.zip",
        sha256="b7974bd00a84a99921f36ee4403f089853777b5ae8d151c76a86e64900334af9",
        note="By the published count 1,738 of its files are damaged; they were left in.",
    ),
    "kaggle": Source(
        description="the 25,000 training photos of the Kaggle competition, through Kaggle's own client (about 850 MB)",
        image_count=25_000,
        image_pattern=r"train/(?P<label>cat|dog)\.\d+\.(?i:jpe?g)",
        competition="dogs-vs-cats",
        inner_archive="train.zip",
    ),
}
