#!/usr/bin/env bash
# nkeys 0.2.1 in Python: a seed with a mistyped letter is taken, and is another key.
#
# Expected: a seed ends with a CRC-16, and the library has the error ErrInvalidSeed. So from_seed() refuses one whose
# checksum is wrong, as the library for Go does.
# Observed: from_seed() looks at the prefix and drops the last two bytes. The key pair is another one, and nothing says so
# before a server refuses it.
# For Corral: a damaged token would have been asked about on the bus, and answered as if it had been revoked.
# bus/access/tokens.py checks the CRC (tests/gateway/test_gateway_contract.py).
#
# Exits 0 while nkeys behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check nkeys==0.2.1
"$folder/venv/bin/python" - <<'PYTHON'
import base64
import binascii

import nkeys

seed = nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER)
typed = seed[:20] + (b"A" if seed[20:21] != b"A" else b"B") + seed[21:]


def checksum_is_right(text: bytes) -> bool:
    raw = base64.b32decode(text + b"=" * (-len(text) % 8))
    return binascii.crc_hqx(raw[:-2], 0) == int.from_bytes(raw[-2:], "little")


print("checksums:", checksum_is_right(seed), checksum_is_right(typed))
try:
    keys = [nkeys.from_seed(bytearray(text)).public_key for text in (seed, typed)]
except Exception as error:
    raise SystemExit(f"refused: {error!r}")
print("public keys:", *(key.decode() for key in keys))
raise SystemExit(not (checksum_is_right(seed) and not checksum_is_right(typed) and keys[0] != keys[1]))
PYTHON
