#!/usr/bin/env bash
# msgspec 0.22.0: the JSON Schema of a type allows what its decoder refuses: 1.0 for an int, any key of a dict, any duration.
#
# Expected: what is valid by `msgspec.json.schema(T)` is decoded by `msgspec.json.decode(…, type=T)`, so that clients
# in other languages may be generated from the schema and tested against it.
# Observed: JSON Schema counts 1.0 and 1e3 as integers; the decoder says "Expected `int`, got `float`" to both. The
# schema of dict[int, int], or with dates as keys, says nothing of keys. A timedelta is "format: duration", where P1M
# and P1W are valid, and both are refused. Bytes are any text, and need base64 with padding. In return the decoder
# takes a Decimal as a number, a UUID without hyphens, and a tagged struct without its tag, which the schema refuses.
# For Corral: whole numbers may be written as 1.0 in all messages (schemas/codec.py, tests/schemas). Bytes that JSON
# may hold are said to be base64 (docs/reference/messages.md); there is no timedelta and no decimal.
#
# Exits 0 while msgspec behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check msgspec==0.22.0 'jsonschema[format]==4.26.0'
"$folder/venv/bin/python" - <<'PYTHON'
import datetime
import decimal
import json
import uuid

import jsonschema
import msgspec


class Tagged(msgspec.Struct, tag="tagged"):
    a: int


# Type, text, whether it is valid by the schema, whether it is decoded.
CASES = [
    (int, "1", True, True),
    (int, "1.0", True, False),
    (int, "1e3", True, False),
    (int | None, "1.0", True, False),
    (dict[int, int], '{"a": 1}', True, False),
    (dict[datetime.date, int], '{"a": 1}', True, False),
    (datetime.timedelta, '"P1M"', True, False),
    (datetime.timedelta, '"P1W"', True, False),
    (datetime.timedelta, '"P1D"', True, True),
    (bytes, '"YW"', True, False),
    (decimal.Decimal, '"abc"', True, False),
    (decimal.Decimal, "1.5", False, True),
    (uuid.UUID, '"12345678123412341234123456789012"', False, True),
    (Tagged, '{"a": 1}', False, True),
]
print("msgspec", msgspec.__version__)
checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
changed = False
for kind, text, valid, decoded in CASES:
    schema = jsonschema.Draft202012Validator(msgspec.json.schema(kind), format_checker=checker)
    by_schema = schema.is_valid(json.loads(text))
    try:
        msgspec.json.decode(text, type=kind)
        by_decoder = True
    except msgspec.ValidationError:
        by_decoder = False
    print(f"{kind}: {text}: valid {by_schema}, decoded {by_decoder}")
    changed = changed or (by_schema, by_decoder) != (valid, decoded)
raise SystemExit(changed)
PYTHON
