#!/usr/bin/env bash
# Starts compose.yaml's cluster (three servers, two planners, two histories), kills each part of it under load, checks
# rows and leases, and removes the cluster.
#
#   deploy/container/check-cluster.sh
#
# The variables are documented in common.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
export CORRAL_PORT_2=${CORRAL_PORT_2:-24223} CORRAL_PORT_3=${CORRAL_PORT_3:-24224}

# shellcheck source-path=SCRIPTDIR
source deploy/container/common.sh

COMPOSE="$COMPOSE --env-file deploy/container/cluster.env"
urls=nats://127.0.0.1:$CORRAL_PORT,nats://127.0.0.1:$CORRAL_PORT_2,nats://127.0.0.1:$CORRAL_PORT_3
start
export CORRAL_NATS_CREDS=$creds CORRAL_NATS_URL=$urls
for part in bus planner processor collector; do
    within 90 "$CORRAL" health "$part"
    echo "check: $part is ready"
done
"$(dirname "$CORRAL")/python" deploy/container/check_cluster.py "$ENGINE"
