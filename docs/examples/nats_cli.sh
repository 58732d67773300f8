#!/bin/sh
# Corral from a shell: the NATS command line and jq.
set -eu
: "${CORRAL_NATS_URL:=nats://127.0.0.1:4222}"

# The file also contains the owner, the user, and the inbox prefix that only this user may subscribe to.
fact() { sed -n "s/^# $1: //p" "${CORRAL_NATS_CREDS:-/dev/null}"; }
owner=$(fact owner | tr -d '*')
owner=${owner:-${CORRAL_OWNER:-$(id -un)}}
user=$(fact user)
known=${CORRAL_NATS_CREDS:+--nkey $CORRAL_NATS_CREDS --inbox-prefix $(fact inbox)}

# shellcheck disable=SC2086
ask() { nats --server "$CORRAL_NATS_URL" $known request --raw --timeout 10s "$1" "$2"; }

reply=$(ask "corral.v1.plan.request.$owner" \
    "{\"owner\": \"$owner\", \"gpus\": 2, \"gpu_memory_bytes\": 21474836480, \"ttl_seconds\": 60, \"name\": \"nats-cli\"}")
if [ "$(echo "$reply" | jq -r .type)" != assignment ]; then
    echo "$reply" | jq -r .message >&2
    exit 4
fi
echo "$reply" | jq -r '.lease.grants[] | "\(.host):\(.index) \(.model) \(.device)"'
lease=$(echo "$reply" | jq -r .lease.lease_id)

ask "corral.v1.plan.renew.$owner" "{\"owner\": \"$owner\", \"lease_id\": \"$lease\"}" | jq -r '"renewed until \(.expires_at)"'
ask "corral.v1.query.${user:-$owner}" '{"sql": "SELECT host, count(*) AS samples FROM samples GROUP BY host ORDER BY host"}' |
    jq -r '.rows[] | "\(.[0]): \(.[1]) samples in the history"'
ask "corral.v1.plan.release.$owner" "{\"owner\": \"$owner\", \"lease_id\": \"$lease\"}" | jq -r '"released: \(.state)"'
