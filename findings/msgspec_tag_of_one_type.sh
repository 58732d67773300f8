#!/usr/bin/env bash
# msgspec 0.22.0 requires the tag of a struct in a union, but not that of a single struct.
#
# Expected: a struct with a tag (`tag="lease"`) decodes from an object that has it: without it the object is of an
# unknown kind, and refused. At least it makes no difference whether the type is alone or in a union.
# Observed: alone, a wrong tag is refused, but an object without a tag is accepted, whatever it was meant to be: if all
# fields have defaults and unknown ones are ignored, `{}` is a valid message. In a union it is refused, and so is an
# array (`array_like`) without a tag in both cases. The JSON schema that msgspec writes names the tag as required.
# For Corral: no harm: streams are told apart by subject. A message without `type` is taken for the one of its subject,
# as a client in another language would wish, although the reference lists `type` as required.
#
# Exits 0 while msgspec behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check msgspec==0.22.0
"$folder/venv/bin/python" - <<'PYTHON'
import msgspec


class Lease(msgspec.Struct, tag="lease"):
    devices: list[str] = []


class Error(msgspec.Struct, tag="error"):
    message: str = ""


class Row(msgspec.Struct, tag="row", array_like=True):
    devices: list[str] = []


def outcome(text: str, kind: object) -> str:
    try:
        return repr(msgspec.json.decode(text, type=kind))
    except msgspec.ValidationError as error:
        return f"refused: {error}"


print("msgspec", msgspec.__version__)
found = {
    "alone, without tag": outcome('{"message":"no capacity"}', Lease),
    "alone, wrong tag": outcome('{"type":"error","message":"no capacity"}', Lease),
    "in a union, without tag": outcome('{"message":"no capacity"}', Lease | Error),
    "array, without tag": outcome('[["gpu-0"]]', Row),
}
for name, text in found.items():
    print(f"{name}: {text}")
[schema] = msgspec.json.schema_components([Lease])[1].values()
print("required by the schema:", schema["required"])
accepted = [name for name, text in found.items() if not text.startswith("refused")]
raise SystemExit(accepted != ["alone, without tag"] or schema["required"] != ["type"])
PYTHON
