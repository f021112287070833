"""Records as plain data, for result files."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch

from fastcil.contract import Record, Task
from fastcil.engine.gallery import exemplar_gallery
from fastcil.engine.learner import Learner

# A picture whose PNG is larger is kept as JPEG: result files hold thumbnails, not data.
_LARGEST_PNG = 16_384
_QUALITY = 85


def collect_records(learner: Learner, task: Task, gallery: bool) -> list[dict[str, Any]]:
    """What a learner leaves for the report after a task, as `record_to_plain` makes it.

    Args:
        learner: It has learned the task, and its method is not released yet.
        task: The task.
        gallery: Whether to show exemplars beside their originals.
    """
    records = [record for part in learner.parts.learners for record in part.records()]
    if gallery:
        shown = exemplar_gallery(task, learner.memory, learner.class_names)
        records = [shown, *records] if shown.payload["images"] else records
    return [record_to_plain(record, learner.class_names) for record in records]


def record_to_plain(record: Record, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """A record as JSON holds it: arrays as lists, images as ``data:`` URIs.

    Images are PNG up to 16 KiB, and else JPEG of quality 85 without chroma subsampling.

    Args:
        record: What a method or addon left.
        class_names: Of the labels of its images, if it has any.

    Returns:
        ``kind``, ``title`` and ``payload``; captions of labelled images begin with their class.

    Example:
        >>> images = np.zeros((1, 2, 2, 3), dtype=np.uint8)
        >>> plain = record_to_plain(Record("images", "black", {"images": images}))
        >>> plain["payload"]["images"][0][:22]
        'data:image/png;base64,'
    """
    payload = dict(record.payload)
    if record.kind == "images":
        payload["images"] = [_data_uri(np.asarray(image)) for image in payload["images"]]
        if "labels" in payload:
            names = [class_names[label] for label in payload.pop("labels")]
            said = payload.get("captions") or [""] * len(names)
            payload["captions"] = [
                f"{name}: {text}" if text else name for name, text in zip(names, said, strict=True)
            ]
    return {"kind": record.kind, "title": record.title, "payload": _plain(payload)}


def _data_uri(image: np.ndarray[Any, Any]) -> str:
    """An RGB image, uint8 [H, W, 3], as text."""
    bgr = np.ascontiguousarray(image[:, :, ::-1])
    kind, coded = "png", cv2.imencode(".png", bgr)[1]
    if len(coded) > _LARGEST_PNG:
        kind, coded = "jpeg", cv2.imencode(".jpg", bgr, _jpeg_options())[1]
    return f"data:image/{kind};base64,{base64.b64encode(coded.tobytes()).decode()}"


def _jpeg_options() -> list[int]:
    sampling = cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
    return [cv2.IMWRITE_JPEG_QUALITY, _QUALITY, *sampling]


def _plain(value: Any) -> Any:
    """Mappings, sequences, arrays and tensors as dicts, lists and numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return value
