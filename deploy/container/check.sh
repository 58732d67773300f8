#!/usr/bin/env bash
# Builds the image, starts compose.yaml with it, asks for GPUs and for history, kills a part, and takes all down again.
#
#   deploy/container/check.sh
#
# COMPOSE        the compose command (default: `docker compose`, else `podman-compose`)
# PYTHON_IMAGE   base image; without it, and where debootstrap is, one is made of Debian's packages
# BUILD_OPTIONS  more for the build, such as volumes with a registry's certificates
set -euo pipefail
cd "$(dirname "$0")/../.."

CORRAL=${CORRAL:-.venv/bin/corral}
export CORRAL_PORT=${CORRAL_PORT:-24222}
export CORRAL_NATS_URL=nats://127.0.0.1:$CORRAL_PORT CORRAL_OWNER=check

if [ -z "${COMPOSE:-}" ]; then
    if docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1; then
        COMPOSE="docker compose"
    elif podman-compose --version 2>/dev/null | grep -Eq 'podman-compose version (1\.[1-9]|[2-9])'; then
        COMPOSE=podman-compose
    else
        # Older ones know no profiles and no health checks as lists.
        echo "check: neither docker compose is here nor podman-compose 1.1 or newer (pip install podman-compose)" >&2
        exit 1
    fi
fi
case $COMPOSE in docker*) ENGINE=docker ;; *) ENGINE=podman ;; esac

if [ -z "${PYTHON_IMAGE:-}" ] && [ "$ENGINE" = podman ] && command -v debootstrap >/dev/null; then
    export PYTHON_IMAGE=localhost/corral-base:debian
    if ! podman image exists "$PYTHON_IMAGE"; then
        root=$(mktemp -d)
        trap 'rm -rf "$root"' EXIT
        debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates stable "$root" >/dev/null
        tar -C "$root" -c . | podman import - "$PYTHON_IMAGE" >/dev/null
    fi
fi

# shellcheck disable=SC2086  # options are words
$ENGINE build ${BUILD_OPTIONS:-} ${PYTHON_IMAGE:+--build-arg PYTHON_IMAGE="$PYTHON_IMAGE"} \
    -f deploy/container/Dockerfile -t corral:local .

down() { $COMPOSE down -v >/dev/null 2>&1 || true; }
creds=$(mktemp)
trap 'down; rm -rf "${root:-}" "$creds"' EXIT
down
$COMPOSE up -d
# A service that has ended hands out nothing: this one runs anew, beside it.
$COMPOSE run --rm -T auth print operator >"$creds"

# within SECONDS COMMAND…: repeats a command until it ends well.
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        if ((SECONDS > end)); then
            echo "check: not within its time: $*" >&2
            "$@"
            return 1
        fi
        sleep 0.5
    done
}
container() { $ENGINE ps -a --format '{{.Names}}' | grep -E "corral[-_]$1[-_]1"; }
# counts N: more than N samples are stored, and none twice.
counts() {
    "$CORRAL" query --json "SELECT count(*) - count(DISTINCT (device, time)), count(*) > $1 FROM samples" |
        grep -q '"rows":\[\[0,true\]\]'
}

if "$CORRAL" fleet >/dev/null 2>&1; then
    echo "check: the bus takes somebody without credentials" >&2
    exit 1
fi
echo "check: nobody gets in without credentials"
export CORRAL_NATS_CREDS=$creds
for part in bus planner processor collector; do
    within 60 "$CORRAL" health "$part"
    echo "check: $part is well"
done
for part in planner processor collector; do
    name=$(container "$part")
    [ "$($ENGINE exec "$name" find / -name '*.creds' -not -path '/proc/*' 2>/dev/null)" = \
        /var/lib/corral/credentials/corral.creds ]
done
echo "check: each part has its own credentials and no others"
for part in nats processor planner collector; do
    name=$(container "$part")
    [ "$($ENGINE exec "$name" id -u)" != 0 ]
    ! $ENGINE exec "$name" touch /written 2>/dev/null
done
echo "check: no part is root, or can write to its image"

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
echo "check: the lease and every sample have outlived parts that were killed"
