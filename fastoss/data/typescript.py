"""Tool definitions as gpt-oss reads them: JSON Schema → the TypeScript-like text of harmony's developer message.

Character for character what openai-harmony 0.0.8 writes (its `json_schema_to_typescript`), oddities of indentation
included: this text is what the model was trained on. Tests hold the two against each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from fastoss.data.conversation import Tool


def tools_section(tools: Sequence[Tool]) -> str:
    """The `# Tools` section for functions."""
    parts = ["## functions\n", "namespace functions {\n"]
    for tool in tools:
        parts += [f"// {line}" for line in _lines(tool.description)]
        shape = "()" if tool.parameters is None else f"(_: {_type(tool.parameters, '')})"
        parts.append(f"type {tool.name} = {shape} => any;\n")
    return "# Tools\n\n" + "\n".join([*parts, "} // namespace functions"])


def _type(schema: Any, indent: str) -> str:
    if not isinstance(schema, dict):
        return "any"
    if isinstance(schema.get("oneOf"), list):
        return "".join(
            f"\n{indent} | {_variant_type(variant, indent)}{_comment([_description(variant), _default(variant, escaped=True)])}"
            for variant in schema["oneOf"]
        )
    kind = schema.get("type")
    if isinstance(kind, list):
        names = ["number" if name == "integer" else name for name in kind if isinstance(name, str)]
        if names:
            return " | ".join(names)
    if kind == "object":
        return _object(schema, indent)
    if kind == "string":
        values = [f'"{value}"' for value in schema.get("enum") or [] if isinstance(value, str)] if isinstance(schema.get("enum"), list) else []
        return " | ".join(values) or "string"
    if kind == "array":
        return f"{_type(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    return {"number": "number", "integer": "number", "boolean": "boolean"}.get(kind, "any") if isinstance(kind, str) else "any"


def _object(schema: dict[str, Any], indent: str) -> str:
    out = f"{indent}// {schema['description']}\n" if isinstance(schema.get("description"), str) else ""
    out += "{\n"
    properties = schema.get("properties")
    required = schema.get("required")
    required = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    for name, value in properties.items() if isinstance(properties, dict) else ():
        out += _property(name if name in required else f"{name}?", value if isinstance(value, dict) else {}, indent)
    return out + f"{indent}}}"


def _property(name: str, schema: dict[str, Any], indent: str) -> str:
    out = f"{indent}// {schema['title']}\n{indent}//\n" if isinstance(schema.get("title"), str) else ""
    description = schema.get("description") if isinstance(schema.get("description"), str) else None
    if description is not None and "oneOf" not in schema:
        out += f"{indent}// {description}\n"
    examples = schema.get("examples")
    if isinstance(examples, list) and examples:
        out += f"{indent}// Examples:\n" + "".join(f'{indent}// - "{example}"\n' for example in examples if isinstance(example, str))
    if isinstance(schema.get("oneOf"), list):
        return out + _one_of(name, schema, description, indent)
    out += f"{indent}{name}: {_variant_type(schema, indent, '    ')},"
    return out + _comment([_default(schema) if "oneOf" not in schema else None]) + "\n"


def _one_of(name: str, schema: dict[str, Any], description: str | None, indent: str) -> str:
    variants = schema["oneOf"]
    above = description is not None and not (variants and _description(variants[0]) == description)
    out = f"{indent}// {description}\n" if above else ""
    default = _default(schema)
    out += f"{indent}// {default}\n" if default else ""
    out += f"{indent}{name}:\n"
    for number, variant in enumerate(variants):
        said = _description(variant)
        own = None if (number == 0 and above) or said == description else said
        out += f"{indent} | {_variant_type(variant, indent)}{_comment([own, _default(variant)])}\n"
    return out + f"{indent},\n"


def _variant_type(schema: Any, indent: str, deeper: str = "   ") -> str:
    text = _type(schema, indent + deeper)
    nullable = isinstance(schema, dict) and schema.get("nullable") is True
    return f"{text} | null" if nullable and "null" not in text else text


def _description(schema: Any) -> str | None:
    value = schema.get("description") if isinstance(schema, dict) else None
    return value if isinstance(value, str) else None


def _default(schema: Any, *, escaped: bool = False) -> str | None:
    """The `default: …` of a comment. `escaped`: in a `oneOf` that is no property, the text of an enum is written as JSON."""
    if not isinstance(schema, dict) or "default" not in schema:
        return None
    value = schema["default"]
    if not isinstance(value, str):
        return "default: " + _json(value)
    enum = schema.get("enum")
    if not isinstance(enum, list) or not enum:
        return f'default: "{value}"'
    return "default: " + (_json(value) if escaped else value)


def _json(value: Any) -> str:
    """JSON without spaces, numbers as serde_json 1.0.140 (in openai-harmony) reads them from Python's JSON and writes them again."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_json(key)}:{_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_json, value)) + "]"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _number(value)
    return json.dumps(value, ensure_ascii=False)


def _number(value: int | float) -> str:
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return str(value)
    if not math.isfinite(float(repr(value))):
        return json.dumps(value)
    # It reads the digits as one number and scales that, which may move the last digit: 123456789.12345679 becomes ….1234568.
    digits = Decimal(repr(value))
    sign, exponent = ("-" if digits.is_signed() else ""), int(digits.as_tuple().exponent)
    significand = int("".join(map(str, digits.as_tuple().digits)))
    while significand >= 2**64:
        significand, exponent = significand // 10, exponent + 1
    read = float(significand)
    while exponent < -308:
        read, exponent = read / 1e308, exponent + 308
    read = read / float(f"1e{-exponent}") if exponent < 0 else read * float(f"1e{exponent}")
    mantissa, _, power = repr(read).partition("e")
    if not power:
        return sign + mantissa
    return sign + (f"0.0000{mantissa.replace('.', '')}" if int(power) == -5 else f"{mantissa}e{int(power)}")


def _comment(parts: list[str | None]) -> str:
    said = [part for part in parts if part is not None]
    return f" // {' '.join(said)}" if said else ""


def _lines(text: str) -> list[str]:
    """Lines as Rust's `str::lines` cuts them: at `\\n` or `\\r\\n` only; a last `\\r` stays."""
    *lines, last = text.split("\n")
    return [line.removesuffix("\r") for line in lines] + ([last] if last else [])
