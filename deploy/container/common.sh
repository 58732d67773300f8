# Shared by the checks of compose.yaml: the compose command, the image, and waiting. Sourced, not run.
#
# COMPOSE        the compose command (default: `docker compose`, else `podman-compose`)
# PYTHON_IMAGE   base image; without it, debootstrap, if installed, builds one of Debian's packages
# BUILD_OPTIONS  additional options for the build, such as volumes with a registry's certificates
# NO_BUILD       use the existing image

CORRAL=${CORRAL:-.venv/bin/corral}
export CORRAL_PORT=${CORRAL_PORT:-24222}
export CORRAL_NATS_URL=nats://127.0.0.1:$CORRAL_PORT CORRAL_OWNER=check

if [ -z "${COMPOSE:-}" ]; then
    if docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1; then
        COMPOSE="docker compose"
    elif podman-compose --version 2>/dev/null | grep -Eq 'podman-compose version (1\.[1-9]|[2-9])'; then
        COMPOSE=podman-compose
    else
        # Older versions support neither profiles nor health checks as lists.
        echo "check: needs docker compose, or podman-compose 1.1 or newer (pip install podman-compose)" >&2
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

if [ -z "${NO_BUILD:-}" ]; then
    # shellcheck disable=SC2086  # options are words
    $ENGINE build ${BUILD_OPTIONS:-} ${PYTHON_IMAGE:+--build-arg PYTHON_IMAGE="$PYTHON_IMAGE"} \
        -f deploy/container/Dockerfile -t corral:local .
fi

# within SECONDS COMMAND…: repeats a command until it succeeds.
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        if ((SECONDS > end)); then
            echo "check: timed out: $*" >&2
            "$@"
            return 1
        fi
        sleep 0.5
    done
}
container() { $ENGINE ps -a --format '{{.Names}}' | grep -E "corral[-_]$1[-_]1"; }

down() { $COMPOSE down -v >/dev/null 2>&1 || true; }

# start: starts a new cluster and gets an operator's credentials; everything is removed at the end of the script.
start() {
    creds=$(mktemp)
    trap 'down; rm -rf "${root:-}" "$creds"' EXIT
    down
    $COMPOSE up -d
    # The service `auth` has ended, so a new container of it prints the credentials.
    $COMPOSE run --rm -T auth print operator >"$creds"
}
