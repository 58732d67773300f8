#!/usr/bin/env bash
# Builds the image, starts compose.yaml, requests GPUs, queries the history, kills parts, and removes everything.
#
#   deploy/container/check.sh
#
# The variables are documented in common.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

# shellcheck source-path=SCRIPTDIR
source deploy/container/common.sh

start

# counts N: succeeds if more than N samples are stored, none of them twice.
counts() {
    "$CORRAL" query --json "SELECT count(*) - count(DISTINCT (device, time)), count(*) > $1 FROM samples" |
        grep -q '"rows":\[\[0,true\]\]'
}

if "$CORRAL" fleet >/dev/null 2>&1; then
    echo "check: the bus accepts a client without credentials" >&2
    exit 1
fi
echo "check: the bus refuses a client without credentials"
export CORRAL_NATS_CREDS=$creds
for part in bus planner processor collector runner; do
    within 60 "$CORRAL" health "$part"
    echo "check: $part is ready"
done
for part in planner processor collector runner; do
    name=$(container "$part")
    [ "$($ENGINE exec "$name" find / -name '*.creds' -not -path '/proc/*' 2>/dev/null)" = \
        /var/lib/corral/credentials/corral.creds ]
done
echo "check: each part has its own credentials and no others"
for part in nats processor planner collector runner; do
    name=$(container "$part")
    [ "$($ENGINE exec "$name" id -u)" != 0 ]
    ! $ENGINE exec "$name" touch /written 2>/dev/null
done
echo "check: no part runs as root or can write to its image"

within 30 counts 100
lease=$("$CORRAL" request --gpus 2 --memory 8GiB --json | sed 's/.*"lease_id":"\([^"]*\)".*/\1/')
echo "check: granted $lease"

for part in planner processor nats; do
    $ENGINE kill --signal KILL "$(container "$part")" >/dev/null
    sleep 1
    $ENGINE start "$(container "$part")" >/dev/null
done
for part in bus planner processor; do
    within 60 "$CORRAL" health "$part"
done
"$CORRAL" leases --json | grep -q "$lease"
within 30 counts 300
"$CORRAL" release "$lease"
echo "check: the lease and every sample survived killed parts"
