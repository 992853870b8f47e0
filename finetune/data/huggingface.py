"""Save a dataset of the Hugging Face Hub, or one that its library wrote, as a folder of images with a table of labels."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from finetune.config import HUB
from finetune.data.label_table import IMAGE, LABEL, SPLIT
from finetune.io.output_folder import atomic_folder, require_empty_folder
from models.artifacts.atomic_io import atomic_write_text
from models.artifacts.data_folder import EXTENSIONS, split_of
from models.errors import DataError

TABLE, RECORD = "labels.parquet", "DATASET.json"
INSTALL = "Install the library with: pip install -e '.[huggingface]'"
MAX_REASON_CHARS = 200


def save_hub_dataset(source: str, folder: Path) -> Path:
    """Save the images and labels of a dataset to ``folder`` atomically, unless they are already there.

    The columns with text, numbers and names of classes are kept. Splits whose name is not known are left out.

    Args:
        source: hf://DATASET or hf://DATASET:CONFIG, where DATASET is a name on the Hub or a local folder.
        folder: A new or empty folder.

    Returns:
        The table of labels.

    Raises:
        DataError: The library is not installed, the dataset cannot be loaded, or it has no images with labels.
    """
    record = folder / RECORD
    if record.is_file():
        saved = json.loads(record.read_text(encoding="utf-8"))["source"]
        if saved != source:
            raise DataError(f"{folder} contains {saved}, not {source}. Set --data-dir to another folder.")
        return folder / TABLE
    require_empty_folder(folder)
    splits = _load(source)
    known = {name: part for name, part in splits.items() if split_of(name)}
    if not known:
        raise DataError(f"{source} has no split named train, valid or test (found: {', '.join(splits)}).")
    rows: list[dict[str, str]] = []
    with atomic_folder(folder) as new:
        for name, part in known.items():
            rows += _save_split(part, name, new, source)
        if not rows:
            raise DataError(f"{source} has no images with a label.")
        columns = list(dict.fromkeys(name for row in rows for name in row))
        pq.write_table(pa.table({name: [row.get(name, "") for row in rows] for name in columns}), new / TABLE)
        atomic_write_text(new / RECORD, json.dumps({"source": source, "images": len(rows)}, indent=2) + "\n")
    left_out = [name for name in splits if name not in known]
    note = f" Left out: {', '.join(left_out)}." if left_out else ""
    print(f"Saved {len(rows):,} images of {source} to {folder}.{note}")
    return folder / TABLE


def _load(source: str) -> Mapping[str, Any]:
    """Load the splits of a dataset by their names."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise DataError(f"{source} requires the library datasets. {INSTALL}") from None
    name, _, config = source.removeprefix(HUB).partition(":")
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # the library raises errors of many kinds for names, configurations, files and connections
        reason = " ".join(str(error).split())[:MAX_REASON_CHARS] or type(error).__name__
        raise DataError(f"Cannot load {source} ({reason}). Check the name, the configuration and the connection.") from None
    return loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}


def _save_split(part: Any, split: str, folder: Path, source: str) -> Iterator[dict[str, str]]:
    """Write the images of a split, and yield the row of each that has a label."""
    import datasets

    image, label = _find_columns(part.features, source)
    names = {name: feature.names for name, feature in part.features.items() if isinstance(feature, datasets.ClassLabel)}
    kept = [name for name, feature in part.features.items() if name in names or isinstance(feature, datasets.Value)]
    part = part.select_columns(list({image, label, *kept})).cast_column(image, datasets.Image(decode=False))
    (folder / "images" / split).mkdir(parents=True)
    for number, row in enumerate(tqdm(part, desc=f"saving {split}", unit="image", disable=None)):
        texts = {name: _text(row[name], names.get(name)) for name in kept}
        if not texts[label]:
            continue  # a public test split often has no labels
        data = row[image]["bytes"] or Path(row[image]["path"]).read_bytes()
        path = f"images/{split}/{number:06d}{_suffix(row[image]['path'], data)}"
        (folder / path).write_bytes(data)
        others = {name: text for name, text in texts.items() if name not in (label, IMAGE, LABEL, SPLIT)}
        yield {IMAGE: path, LABEL: texts[label].replace("/", "-"), SPLIT: split, **others}


def _find_columns(features: Mapping[str, Any], source: str) -> tuple[str, str]:
    """Return the names of the columns with the image and with the label."""
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name in ("label", "labels") if name in features]
    labels += [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not images or not labels:
        raise DataError(
            f"{source} has no column of {'labels' if images else 'images'} (found: {', '.join(features)}). Use a dataset for "
            "image classification."
        )
    return images[0], labels[0]


def _text(value: Any, names: list[str] | None) -> str:
    """Return a value as text: the name of a class, or empty if there is none (the library writes -1)."""
    if value is None or (names and value < 0):
        return ""
    return names[value] if names else str(value)


def _suffix(path: str | None, data: bytes) -> str:
    """Return the suffix of an image file: that of its name, or that of its format."""
    suffix = Path(path or "").suffix.lower()
    if suffix in EXTENSIONS:
        return suffix
    try:
        with Image.open(io.BytesIO(data)) as image:
            return f".{(image.format or 'jpg').lower()}"
    except OSError:
        return ".jpg"  # damaged; the inspection reports it
