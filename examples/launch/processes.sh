# shellcheck shell=bash
# What the scripts beside it share: start processes, wait until they answer, and end every one of them with the script.
# Needs bash 5.1; sourced, after `set -euo pipefail`.

# What runs, by pid. Kinema's own end first, so that they still find their database.
declare -A names=() servers=()
work=$(mktemp -d "${TMPDIR:-/tmp}/kinema-XXXXXX")
logs=$work

say() { printf '%s\n' "$*"; }

fail() {
    say "$(basename "$0"): $*" >&2
    exit "${code:-1}"
}

# For options that cannot be.
refuse() { code=2 fail "$@"; }

# is_number VALUE LARGEST
is_number() { [[ $1 =~ ^[0-9]{1,9}$ ]] && ((10#$1 <= $2)); }

# need PROGRAM "how to get it"
need() { command -v "$1" >/dev/null || fail "$1 is not installed: $2"; }

# The kinema of this checkout, else the installed one.
find_kinema() {
    local root
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    [ ! -x "$root/.venv/bin/kinema" ] || PATH=$root/.venv/bin:$PATH
    need kinema "run scripts/setup, or pip install 'kinema[wan,dynamo,postgres]'"
    need curl "apt-get install curl"
}

# answers HOST PORT: somebody listens there.
answers() { (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; }

# A port of this machine where nobody listens, below those that the system gives to outgoing connections.
free_port() {
    local port
    while port=$((20000 + RANDOM % 12000)) && answers 127.0.0.1 "$port"; do :; done
    echo "$port"
}

# start NAME COMMAND...: in the background, its output in a log of that name; its pid is then in `pid`.
# In a session of its own: Ctrl-C reaches this script alone, which ends the processes in their order.
start() {
    local name=$1
    shift
    setsid "$@" >"$logs/$name.log" 2>&1 </dev/null &
    pid=$!
    names[$pid]=$name
    [ "$1" = kinema ] || servers[$pid]=$name
}

# wait_for PID COMMAND...: until the command succeeds; the end of this script when the process ends before.
wait_for() {
    local name=${names[$1]} pid=$1 deadline=$((SECONDS + ${PATIENCE_S:-120}))
    shift
    # In a subshell: what a signal's trap says meanwhile is not meant for /dev/null.
    until ("$@" >/dev/null 2>&1); do
        if ! kill -0 "$pid" 2>/dev/null || [ "$SECONDS" -ge "$deadline" ]; then
            tail -n 5 "$logs/$name.log" >&2
            fail "$name did not start; above is the end of its log"
        fi
        sleep 0.1
    done
}

# Wait until one of them ends by itself, and say so.
report_end() {
    local ended code=0
    # Of a killed process bash would say so itself, with the line of this script.
    { wait -n -p ended "${!names[@]}" || code=$?; } 2>/dev/null
    say "${names[$ended]} (pid $ended) has ended with code $code; its log is $logs/${names[$ended]}.log"
    unset "names[$ended]" "servers[$ended]"
}

# start_etcd CLIENT_PORT
start_etcd() {
    need etcd "apt-get install etcd-server, or name a running one in ETCD_ENDPOINTS"
    local here=http://127.0.0.1 peer_port
    peer_port=$(free_port)
    start etcd etcd --data-dir "$work/etcd" --listen-client-urls "$here:$1" --advertise-client-urls "$here:$1" \
        --listen-peer-urls "$here:$peer_port" --initial-advertise-peer-urls "$here:$peer_port" \
        --initial-cluster "default=$here:$peer_port"
    wait_for "$pid" curl -sf "$here:$1/health"
}

# listening NAME: prints the URL that a frontend wrote into its log.
listening() { grep -m 1 listening "$logs/$1.log" | grep -o 'http://[0-9.:]*' | head -n 1 | grep .; }

# serving NAME: whether that worker has written that it takes videos.
serving() { grep -q "serving .*worker_id" "$logs/$1.log"; }

# curl_line URL PROMPT: the command that makes a video.
curl_line() {
    say "  curl -s $1/v1/videos/generations -H 'Content-Type: application/json' \\"
    say "    -d '{\"prompt\": \"$2\", \"seed\": 3}'"
}

# end PID...: and wait until they are gone.
end() {
    local pid
    [ $# -eq 0 ] || kill "$@" 2>/dev/null || true
    for pid in "$@"; do
        # Again when a signal interrupted it.
        while kill -0 "$pid" 2>/dev/null; do wait "$pid" 2>/dev/null || true; done
    done
}

# end_everything EXIT_CODE
end_everything() {
    # A signal can leave bash with the failure of a command that it was waiting for, which must not stop this function.
    set +e
    local code=$1 pid kinema=()
    trap - EXIT
    # Whoever presses Ctrl-C once more is in a hurry.
    trap 'kill -KILL $(jobs -p) 2>/dev/null' INT TERM
    # By bash's own list: a signal may have come between a start and the note of its pid.
    for pid in $(jobs -p); do [ -n "${servers[$pid]-}" ] || kinema+=("$pid"); done
    [ ${#kinema[@]} -eq 0 ] || say "stopping"
    end "${kinema[@]}"
    end "${!servers[@]}"
    rm -rf "$work"
    exit "$code"
}
trap 'end_everything $?' EXIT
trap 'end_everything 130' INT
trap 'end_everything 143' TERM
trap 'end_everything 129' HUP
