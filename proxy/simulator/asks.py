"""What a request asks the simulator for, from its JSON or multipart body. The simulator's only reader of bodies.

It reads as an image service would, with the standard library's JSON and the ``multipart`` package, and shares nothing with the
gateway's reading: each can show where the other errs. A body is parsed whole in memory; its size is bounded by the edge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from multipart import (  # type: ignore[import-untyped]
    MultipartError,
    MultipartSegment,
    PushMultipartParser,
    parse_options_header,
)

from proxy.prices import PriceCard
from proxy.simulator.faults import Fault

# As many reference images as the image API takes.
REFERENCES_MAX = 16

# Fields and files together; well above what any client sends.
_PARTS_MAX = 200

# Text parts above this are no field of the image API.
_TEXT_BYTES_MAX = 1_000_000

_PIECE_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Ask:
    """One well-formed request. ``size`` and ``quality`` are in the price table, or ``auto``."""

    operation: Literal["generation", "edit"]
    model: str
    prompt: str
    size: str
    quality: str
    n: int
    stream: bool
    partial_images: int
    references: int
    has_mask: bool


def read_ask(operation: Literal["generation", "edit"], content_type: str, body: bytes, card: PriceCard) -> Ask:
    """The ask in a body. Raises :class:`Fault` where the image service would refuse it."""
    kind, options = parse_options_header(content_type)
    if kind == "application/json":
        fields, references, has_mask = _from_json(operation, body)
    elif kind == "multipart/form-data" and operation == "edit":
        fields, references, has_mask = _from_multipart(options.get("boundary", ""), body)
    else:
        raise Fault(415, f"Unsupported content type: {kind!r}.", code="unsupported_content_type")
    if operation == "edit" and not 1 <= references <= REFERENCES_MAX:
        raise _invalid("image", f"Send 1 to {REFERENCES_MAX} images to edit.")
    model = _text(fields, "model", None)
    if model not in card.models:
        raise Fault(404, f"The model '{model}' does not exist.", param="model", code="model_not_found")
    prices = card.models[model]
    return Ask(
        operation=operation,
        model=model,
        prompt=_text(fields, "prompt", None),
        size=_choice(fields, "size", prices.sizes),
        quality=_choice(fields, "quality", prices.qualities),
        n=_whole(fields, "n", 1, 1, 10),
        stream=_flag(fields, "stream"),
        partial_images=_whole(fields, "partial_images", 0, 0, 3),
        references=references,
        has_mask=has_mask,
    )


def _from_json(operation: str, body: bytes) -> tuple[Mapping[str, Any], int, bool]:
    """Fields, number of reference images, and whether there is a mask."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise Fault(400, "We could not parse the JSON body of your request.", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise Fault(400, "The body of your request must be a JSON object.", code="invalid_json")
    if operation == "generation":
        return fields, 0, False
    images = fields.get("images")
    if not isinstance(images, list):
        raise _missing("images")
    for index, image in enumerate(images):
        _check_reference(f"images[{index}]", image)
    mask = fields.get("mask")
    if mask is not None:
        _check_reference("mask", mask)
    return fields, len(images), mask is not None


def _check_reference(param: str, image: object) -> None:
    """A reference is an object with a ``file_id`` or an ``image_url`` that is a data URL of an image."""
    if not isinstance(image, dict) or len(image.keys() & {"image_url", "file_id"}) != 1:
        raise _invalid(param, "Give exactly one of 'image_url' and 'file_id'.")
    value = image.get("image_url", image.get("file_id"))
    if not isinstance(value, str) or not value:
        raise _invalid(param, "Give the image as a string.")
    head, comma, data = value[:100].partition(",")
    is_data_url = head.startswith("data:image/") and head.endswith(";base64") and comma and data
    if "image_url" in image and not is_data_url:
        raise _invalid(param, "Give the image as a data URL: data:image/png;base64,...")


def _from_multipart(boundary: str, body: bytes) -> tuple[Mapping[str, Any], int, bool]:
    """Text fields as strings, the number of parts ``image`` or ``image[]``, and whether there is a ``mask``."""
    fields: dict[str, bytes] = {}
    files: list[str] = []
    name = ""
    is_file = False
    size = 0
    try:
        with PushMultipartParser(boundary, max_segment_count=_PARTS_MAX) as parser:
            for start in range(0, len(body), _PIECE_BYTES):
                for event in parser.parse(body[start : start + _PIECE_BYTES]):
                    if isinstance(event, MultipartSegment):
                        name, is_file, size = event.name or "", event.filename is not None, 0
                    elif event is not None:
                        size += len(event)
                        if not is_file and size <= _TEXT_BYTES_MAX:
                            fields[name] = fields.get(name, b"") + event
                    elif is_file:
                        files.append(name if size else "")
    except MultipartError as error:
        raise Fault(400, f"We could not parse the multipart body of your request: {error}.", code="invalid_multipart") from None
    texts = {key: value.decode("utf-8", "replace") for key, value in fields.items()}
    return texts | _typed(texts), files.count("image") + files.count("image[]"), "mask" in files


def _typed(texts: Mapping[str, str]) -> dict[str, Any]:
    """The numbers and flags among text fields; what is neither stays text and is refused as such later."""
    typed: dict[str, Any] = {
        key: int(texts[key]) for key in ("n", "partial_images") if texts.get(key, "").isdecimal() and len(texts[key]) < 10
    }
    flags = {"true": True, "1": True, "false": False, "0": False}
    if texts.get("stream") in flags:
        typed["stream"] = flags[texts["stream"]]
    return typed


def _missing(param: str) -> Fault:
    return Fault(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def _invalid(param: str, message: str) -> Fault:
    return Fault(400, f"Invalid value for '{param}'. {message}", param=param, code="invalid_value")


def _text(fields: Mapping[str, Any], param: str, default: str | None) -> str:
    value = fields.get(param)
    if value is None:
        value = default
    if value is None or value == "":
        raise _missing(param)
    if not isinstance(value, str):
        raise _invalid(param, "It must be a string.")
    return value


def _choice(fields: Mapping[str, Any], param: str, choices: tuple[str, ...]) -> str:
    value = _text(fields, param, "auto")
    if value != "auto" and value not in choices:
        raise _invalid(param, f"Supported values are: 'auto', {', '.join(map(repr, choices))}.")
    return value


def _whole(fields: Mapping[str, Any], param: str, default: int, least: int, most: int) -> int:
    value = fields.get(param)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        raise _invalid(param, f"It must be a whole number from {least} to {most}.")
    return value


def _flag(fields: Mapping[str, Any], param: str) -> bool:
    value = fields.get(param)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _invalid(param, "It must be true or false.")
    return value
