"""The API described in OpenAPI 3.1, from the models that check requests and the table that serves them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from proxy import __version__
from proxy.admin import answers, asks
from proxy.admin.operations import OPERATIONS
from proxy.admin.problems import MEDIA_TYPE, TITLES
from proxy.periods import PERIODS
from proxy.usage import CostsQuery, ImagesQuery

Json = dict[str, Any]

_SCHEMAS = "#/components/schemas/"

_READ = (400, 401, 404, 429, 503)
_WRITE = (400, 401, 404, 409, 429, 503)
_BODY = (413, 415, 422)

# What the HTTP edge answers before it is known what is asked.
_EDGE = {400: "Not HTTP/1.1", 408: "Too slow", 414: "URI Too Long", 431: "Request Header Fields Too Large"}

_PATH_PARTS: Mapping[str, Json] = {
    "team": {"description": "The name of a team.", "schema": {"type": "string"}, "example": "design"},
    "key_id": {"description": "The id of a key.", "schema": {"type": "string"}, "example": "key_01JD0000000000000000000000"},
    "charge_id": {
        "description": "The id of a charge.",
        "schema": {"type": "string"},
        "example": "chg_01JD0000000000000000000000",
    },
    "period": {"description": "What the budget is per.", "schema": {"type": "string", "enum": list(PERIODS)}},
    "model": {"description": "The name of a model.", "schema": {"type": "string"}, "example": "gpt-image-2"},
}


@dataclass(frozen=True, slots=True)
class _Read:
    """What is read with GET under ``/v1``, with a team's key or, where ``admin``, with the admin token too."""

    name: str
    path: str
    summary: str
    answer: str
    statuses: tuple[int, ...]
    query: type[BaseModel] = asks.Nothing
    admin: bool = False


_V1 = (
    _Read("models", "/v1/models", "The models that have prices", "Models", (401, 503)),
    _Read("model", "/v1/models/{model}", "One of them", "Model", (401, 404, 503)),
    _Read("budget", "/v1/budget", "What the caller may still spend", "OwnBudgets", (401, 503)),
    _Read("prices", "/v1/prices", "The price card in force", "Prices", (401, 429, 503), admin=True),
    _Read(
        "usage_images",
        "/v1/organization/usage/images",
        "Images by UTC day, in OpenAI's shape; a team's key sees its own team",
        "ImagesPage",
        (400, 401, 429, 503),
        ImagesQuery,
        admin=True,
    ),
    _Read(
        "costs",
        "/v1/organization/costs",
        "Settled amounts by UTC day, in OpenAI's shape; a team's key sees its own team",
        "CostsPage",
        (400, 401, 429, 503),
        CostsQuery,
        admin=True,
    ),
)


def describe(prefix: str) -> Json:
    """The whole document. ``prefix`` is where the admin API begins."""
    bodies = [operation.body for operation in OPERATIONS if operation.body is not None]
    names = [operation.answer for operation in OPERATIONS] + [read.answer for read in _V1] + ["Problem", "Refusal"]
    shapes = [getattr(answers, name) for name in dict.fromkeys(names)]
    paths: dict[str, Json] = {}
    for operation in OPERATIONS:
        described = _operation(operation.name, "Admin", operation.summary, operation.path, operation.query)
        described["security"] = [{"adminToken": []}]
        if operation.body is not None:
            described["requestBody"] = {"required": True, "content": _content("application/json", operation.body.__name__)}
        refused = (*(_WRITE if operation.writes else _READ), *(_BODY if operation.body is not None else ()))
        described["responses"] = {
            str(operation.status): _answered(operation.answer),
            **{str(status): {"$ref": f"#/components/responses/Problem{status}"} for status in sorted(refused)},
            **_edge(refused),
        }
        paths.setdefault(prefix + operation.path, {})[operation.method.lower()] = described
    for read in _V1:
        paths[read.path] = {"get": _described(read)}
    paths |= _itself(prefix)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Beanmeter",
            "version": __version__,
            "summary": "Teams, keys, budgets, limits, charges and prices of a cost-metering proxy for images.",
            "description": "Amounts are whole millionths of a US dollar, instants are RFC 3339 in UTC. A listing is read page "
            "by page: 'next_cursor' of one page is 'cursor' of the next.",
        },
        "tags": [
            {"name": "Admin", "description": "What an operator sees and changes, with the admin token."},
            {"name": "Clients", "description": "What clients and tools read, with a team's key."},
            {"name": "Description", "description": "This document, without a token."},
        ],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "adminToken": {"type": "http", "scheme": "bearer", "description": "BEANMETER_ADMIN_TOKEN."},
                "teamKey": {"type": "http", "scheme": "bearer", "description": "A team's key, sk-bm-..."},
            },
            "responses": {f"Problem{status}": _problem(status) for status in TITLES},
            "schemas": _schemas([(model, "validation") for model in bodies] + [(shape, "serialization") for shape in shapes]),
        },
    }


def _described(read: _Read) -> Json:
    described = _operation(read.name, "Clients", read.summary, read.path, read.query)
    described["security"] = [{"teamKey": []}, *([{"adminToken": []}] if read.admin else [])]
    described["responses"] = {
        "200": _answered(read.answer),
        **{
            str(status): {"description": TITLES[status], "content": _content("application/json", "Refusal")}
            for status in read.statuses
        },
        **_edge(read.statuses),
    }
    return described


def _operation(name: str, tag: str, summary: str, path: str, query: type[BaseModel]) -> Json:
    described: Json = {"operationId": name, "tags": [tag], "summary": summary}
    parts = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    parameters = [{"name": part, "in": "path", "required": True, **_PATH_PARTS[part]} for part in parts]
    parameters += _parameters(query)
    if parameters:
        described["parameters"] = parameters
    return described


def _parameters(query: type[BaseModel]) -> Iterable[Json]:
    schema = query.model_json_schema()
    assert "$defs" not in schema, "a parameter's schema stands by itself"
    for name, field in schema.get("properties", {}).items():
        shape = {key: value for key, value in field.items() if key not in ("title", "description", "default")}
        optional = shape.pop("anyOf", None)
        if optional is not None:
            # In a query string there is no null: what is not given is not there.
            (given,) = [one for one in optional if one != {"type": "null"}]
            shape |= given
        parameter = {"name": name, "in": "query", "description": field["description"], "schema": shape}
        if name in schema.get("required", ()):
            parameter["required"] = True
        elif field.get("default") not in (None, []):
            shape["default"] = field["default"]
        yield parameter


def _schemas(models: Sequence[tuple[type[BaseModel], JsonSchemaMode]]) -> Json:
    unique = list(dict.fromkeys(models))
    _, document = models_json_schema(unique, ref_template=_SCHEMAS + "{model}")
    schemas: Json = document["$defs"]
    for schema in schemas.values():
        # A field's name is its title.
        for field in schema.get("properties", {}).values():
            field.pop("title", None)
    return schemas


def _answered(shape: str) -> Json:
    doc = (getattr(answers, shape).__doc__ or "").partition("\n")[0]
    return {"description": doc.replace("``", "'"), "content": _content("application/json", shape)}


def _problem(status: int) -> Json:
    described: Json = {"description": TITLES[status], "content": _content(MEDIA_TYPE, "Problem")}
    if status == 400:
        # The HTTP edge refuses what is no request at all, before it is known what is asked.
        described["content"] |= _content("application/json", "Refusal")
    if status in (429, 503):
        described["headers"] = {"retry-after": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return described


def _edge(beside: Sequence[int]) -> Json:
    return {
        str(status): {"description": title, "content": _content("application/json", "Refusal")}
        for status, title in _EDGE.items()
        if status not in beside
    }


def _content(media_type: str, shape: str) -> Json:
    return {media_type: {"schema": {"$ref": _SCHEMAS + shape}}}


def _itself(prefix: str) -> Json:
    pages = {
        "/openapi.json": ("openapi", "This document", "application/json", {"type": "object"}),
        "/docs": ("docs", "This document, to be read", "text/html", {"type": "string"}),
    }
    return {
        prefix + path: {
            "get": {
                "operationId": name,
                "tags": ["Description"],
                "summary": summary,
                "security": [],
                "responses": {
                    "200": {"description": summary, "content": {media_type: {"schema": schema}}},
                    "404": {"$ref": "#/components/responses/Problem404"},
                    **_edge(()),
                },
            }
        }
        for path, (name, summary, media_type, schema) in pages.items()
    }
