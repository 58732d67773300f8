#!/usr/bin/env bash
# msgspec 0.22.0: `omit_defaults` compares by identity, so equal structs have different encodings.
#
# Expected: a field is left out if its value equals the default. So two structs that are equal are encoded alike, and it
# makes no difference whether the sender wrote a default out: decoding and encoding is a canonical form.
# Observed: a float, a text or an integer above 256 that equals the default is written unless it is the very object that
# the class has. What comes over the wire never is, so `{"cost":1.0}` stays, and `{}` stays, too. Small integers, the
# empty text, booleans, null and empty collections are left out in both cases, since Python has one object of each or
# msgspec looks at their length; so a test with those does not notice. `order="deterministic"` changes nothing.
# For Corral: the digest of a work request promises that defaults make no difference, but a retry that wrote out the
# default cost of a work item had another digest, and was answered `conflict`. Costs are now compared by value first
# (`digest_of` in planner/broker/idempotency.py, tests/planner/test_service_requests.py).
#
# Exits 0 while msgspec behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check msgspec==0.22.0
"$folder/venv/bin/python" - <<'PYTHON'
import msgspec


class Item(msgspec.Struct, omit_defaults=True):
    cost: float = 1.0
    zone: str = "default"
    limit: int = 1000
    count: int = 10
    name: str = ""
    shared: bool = False
    models: list[str] = []


print("msgspec", msgspec.__version__)
encoder = msgspec.json.Encoder(order="deterministic")
short = msgspec.json.decode(b"{}", type=Item)
text = b'{"cost":1.0,"zone":"default","limit":1000,"count":10,"name":"","shared":false,"models":[]}'
long = msgspec.json.decode(text, type=Item)
packed = msgspec.msgpack.decode(msgspec.msgpack.encode(msgspec.json.decode(text)), type=Item)
structs = {"nothing written": short, "all written": long, "packed": packed}
found = {name: encoder.encode(struct) for name, struct in structs.items()}
for name, encoded in found.items():
    print(f"{name}: {encoded.decode()}")
print("equal:", short == long == packed)
kept = b'{"cost":1.0,"zone":"default","limit":1000}'
wanted = {"nothing written": b"{}", "all written": kept, "packed": kept}
raise SystemExit(not (short == long == packed and found == wanted))
PYTHON
