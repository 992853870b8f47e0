"""Examples to copy, in three languages that need nothing installed beyond themselves."""

from __future__ import annotations

Sample = dict[str, str]


def predict_samples(url: str, *, needs_key: bool) -> list[Sample]:
    key = " -H 'Authorization: Bearer KEY'" if needs_key else ""
    python_key = ', "Authorization": "Bearer KEY"' if needs_key else ""
    js_key = ', headers: { Authorization: "Bearer KEY" }' if needs_key else ""
    curl = f"""\
curl{key} -F file=@cat.jpg -F file=@dog.jpg '{url}/predict'

curl{key} -H 'Content-Type: image/jpeg' --data-binary @photo.jpg '{url}/predict?top_k=3'
"""
    python = f"""\
import json
from pathlib import Path
from urllib.request import Request, urlopen

photo = Path("photo.jpg").read_bytes()
request = Request("{url}/predict", photo, {{"Content-Type": "image/jpeg"{python_key}}})
with urlopen(request) as answer:
    for row in json.load(answer)["predictions"]:
        print(row["label"], row["confidence"])
"""
    javascript = f"""\
const body = new FormData();
for (const file of document.querySelector("input[type=file]").files) body.append("file", file);
const answer = await fetch("{url}/predict", {{ method: "POST", body{js_key} }});
const {{ predictions, detail }} = await answer.json();
if (!answer.ok) throw new Error(detail);
for (const row of predictions) console.log(row.file, row.label ?? row.error.detail, row.confidence);
"""
    given = ("shell", "curl", curl), ("python", "Python", python), ("javascript", "JavaScript", javascript)
    return [_sample(*sample) for sample in given]


def models_samples(url: str) -> list[Sample]:
    return [_sample("shell", "curl", f"curl '{url}/models'\n")]


def page_samples(url: str, *, needs_key: bool) -> list[Sample]:
    key = " -F key=KEY" if needs_key else ""
    return [_sample("shell", "curl", f"curl{key} -F file=@photo.jpg '{url}/'\n")]


def _sample(language: str, label: str, source: str) -> Sample:
    return {"lang": language, "label": label, "source": source}
