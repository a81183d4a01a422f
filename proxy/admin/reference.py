"""The API's description as a page to read: one document, one style sheet, no script, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

Json = Mapping[str, Any]

_BOUNDS = (
    ("minimum", "from {}"),
    ("maximum", "to {}"),
    ("minLength", "at least {} characters"),
    ("maxLength", "at most {} characters"),
    ("maxItems", "at most {} values"),
    ("pattern", "as in {}"),
)


def render(document: Json) -> str:
    """The page, as HTML."""
    info = document["info"]
    title = f"{info['title']} {info['version']}"
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<title>{escape(title)}: API</title><link rel="stylesheet" href="docs.css"></head><body><main>',
            f"<h1>{escape(title)}: API</h1><p>{escape(info['summary'])} {escape(info['description'])}</p>",
            '<p>For programs: <a href="openapi.json">openapi.json</a>, OpenAPI 3.1.</p>',
            *_contents(document),
            *_operations(document),
            *_shapes(document),
            "</main></body></html>",
        ]
    )


def _contents(document: Json) -> Iterator[str]:
    yield '<nav aria-label="Contents">'
    for tag in document["tags"]:
        yield f"<h2>{escape(tag['name'])}</h2><p>{escape(tag['description'])}</p><ul>"
        for method, path, operation in _listed(document, tag["name"]):
            name = escape(operation["operationId"], quote=True)
            yield f'<li><a href="#{name}">{_spelled(method, path)}</a> {escape(operation["summary"])}</li>'
        yield "</ul>"
    yield "</nav>"


def _operations(document: Json) -> Iterator[str]:
    for tag in document["tags"]:
        for method, path, operation in _listed(document, tag["name"]):
            name = escape(operation["operationId"], quote=True)
            yield f'<section id="{name}" aria-labelledby="{name}-title">'
            yield f'<h2 id="{name}-title">{_spelled(method, path)}</h2><p>{escape(operation["summary"])}.</p>'
            yield f"<p>{escape(_admission(document, operation))}</p>"
            yield from _parameters(operation.get("parameters", ()))
            if "requestBody" in operation:
                yield f"<p>Takes JSON: {_content(operation['requestBody'])}.</p>"
            yield from _answers(document, operation["responses"])
            yield "</section>"


def _listed(document: Json, tag: str) -> Iterator[tuple[str, str, Json]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if tag in operation["tags"]:
                yield method.upper(), path, operation


def _admission(document: Json, operation: Json) -> str:
    schemes = document["components"]["securitySchemes"]
    told = [schemes[name]["description"].removesuffix(".") for option in operation["security"] for name in option]
    return f"Authorization: Bearer, with {' or '.join(told)}." if told else "Without a token."


def _parameters(parameters: Sequence[Json]) -> Iterator[str]:
    if parameters:
        rows = [
            [
                f"<code>{escape(one['name'])}</code>",
                escape(one["in"]),
                _kind(one["schema"]),
                _needed(one),
                escape(one["description"]),
            ]
            for one in parameters
        ]
        yield from _table("Parameters", ("Name", "In", "Type", "", "Meaning"), rows)


def _answers(document: Json, responses: Json) -> Iterator[str]:
    rows = []
    for status, answer in responses.items():
        if "$ref" in answer:
            answer = document["components"]["responses"][_last(answer["$ref"])]
        rows.append([f"<code>{status}</code>", escape(answer["description"]), _content(answer)])
    yield from _table("Answers", ("Status", "Meaning", "Content"), rows)


def _content(holder: Json) -> str:
    return ", ".join(f"{_kind(one['schema'])} <small>{escape(kind)}</small>" for kind, one in holder["content"].items())


def _shapes(document: Json) -> Iterator[str]:
    for name, schema in document["components"]["schemas"].items():
        shown = escape(name, quote=True)
        yield f'<section id="shape-{shown}" aria-labelledby="shape-{shown}-title"><h2 id="shape-{shown}-title">{shown}</h2>'
        yield f"<p>{escape(schema.get('description', ''))}</p>"
        required = schema.get("required", ())
        rows = [
            [
                f"<code>{escape(field)}</code>",
                _kind(one),
                "" if field in required else "optional",
                escape(one.get("description", "")),
            ]
            for field, one in schema.get("properties", {}).items()
        ]
        yield from _table("Fields", ("Name", "Type", "", "Meaning"), rows)
        yield "</section>"


def _kind(schema: Json) -> str:
    """A type in words, with a link where it is one of the shapes."""
    if "$ref" in schema:
        name = escape(_last(schema["$ref"]), quote=True)
        return f'<a href="#shape-{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if "const" in schema:
        return f"<code>{escape(str(schema['const']))}</code>"
    if "enum" in schema:
        return ", ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    words = [str(schema.get("format", schema.get("type", "any")))]
    words += [text.format(schema[name]) for name, text in _BOUNDS if name in schema]
    return escape(", ".join(words))


def _needed(parameter: Json) -> str:
    default = parameter["schema"].get("default")
    return "required" if parameter.get("required") else "" if default is None else f"else <code>{escape(str(default))}</code>"


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f'<div class="wide" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption><thead><tr>'
    yield from (f'<th scope="col">{head}</th>' if head else "<td></td>" for head in heads)
    yield "</tr></thead><tbody>"
    yield from (f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    yield "</tbody></table></div>"


def _spelled(method: str, path: str) -> str:
    return f"<code>{escape(method)} {escape(path)}</code>"


def _last(reference: str) -> str:
    return reference.rpartition("/")[2]
