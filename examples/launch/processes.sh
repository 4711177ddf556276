# shellcheck shell=bash
# Functions for the scripts in this folder: start processes, wait until they answer, and end all of them with the script.
# Needs bash 5.1. Source it after `set -euo pipefail`.

# The running processes by pid. Kinema's own processes end first, so that they still find their database.
declare -A names=() servers=()
work=$(mktemp -d "${TMPDIR:-/tmp}/kinema-XXXXXX")
logs=$work

say() { printf '%s\n' "$*"; }

fail() {
    say "$(basename "$0"): $*" >&2
    exit "${code:-1}"
}

# End the script with exit code 2, because of an option that is not accepted.
refuse() { code=2 fail "$@"; }

# is_number VALUE LARGEST
is_number() { [[ $1 =~ ^[0-9]{1,9}$ ]] && ((10#$1 <= $2)); }

# need PROGRAM "how to get it"
need() { command -v "$1" >/dev/null || fail "$1 is not installed: $2"; }

# Find the kinema of this checkout, or else the installed one.
find_kinema() {
    local root
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    [ ! -x "$root/.venv/bin/kinema" ] || PATH=$root/.venv/bin:$PATH
    need kinema "run scripts/setup, or pip install 'kinema[wan,dynamo,postgres]'"
    need curl "apt-get install curl"
}

# answers HOST PORT: whether a process listens there.
answers() { (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; }

# Print a free port of this machine, below the ports that the system uses for outgoing connections.
free_port() {
    local port
    while port=$((20000 + RANDOM % 12000)) && answers 127.0.0.1 "$port"; do :; done
    echo "$port"
}

# start NAME COMMAND...: run the command in the background, with its output in NAME.log. Its pid is then in `pid`.
# It runs in a session of its own, so that Ctrl-C reaches only this script, which ends the processes in their order.
start() {
    local name=$1
    shift
    setsid "$@" >"$logs/$name.log" 2>&1 </dev/null &
    pid=$!
    names[$pid]=$name
    [ "$1" = kinema ] || servers[$pid]=$name
}

# wait_for PID COMMAND...: wait until the command succeeds. When the process ends before that, end this script.
wait_for() {
    local name=${names[$1]} pid=$1 deadline=$((SECONDS + ${PATIENCE_S:-120}))
    shift
    # The command runs in a subshell, so that messages of a signal's trap do not go to /dev/null.
    until ("$@" >/dev/null 2>&1); do
        if ! kill -0 "$pid" 2>/dev/null || [ "$SECONDS" -ge "$deadline" ]; then
            tail -n 5 "$logs/$name.log" >&2
            fail "$name did not start; above is the end of its log"
        fi
        sleep 0.1
    done
}

# Wait until one of the processes ends by itself, and print a message. `wait -n` would never return for a process that
# was killed before it: bash forgets such a process at the next command, and tells its code only to `wait PID`.
report_end() {
    local ended='' code=0 pid
    # Without this redirection bash would also report a killed process, with the line number of this script.
    {
        until [ -n "$ended" ]; do
            for pid in "${!names[@]}"; do kill -0 "$pid" || ended=$pid; done
            [ -n "$ended" ] || sleep 0.2
        done
        wait "$ended" || code=$?
    } 2>/dev/null
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

# curl_line URL PROMPT: print the command that makes a video.
curl_line() {
    say "  curl -s $1/v1/videos/generations -H 'Content-Type: application/json' \\"
    say "    -d '{\"prompt\": \"$2\", \"seed\": 3}'"
}

# end PID...: end the processes and wait until they are gone.
end() {
    local pid
    [ $# -eq 0 ] || kill "$@" 2>/dev/null || true
    for pid in "$@"; do
        # Wait again when a signal interrupted the wait.
        while kill -0 "$pid" 2>/dev/null; do wait "$pid" 2>/dev/null || true; done
    done
}

# end_everything EXIT_CODE
end_everything() {
    # A signal can make the command fail that bash was waiting for. This must not stop the function.
    set +e
    local code=$1 pid kinema=()
    trap - EXIT
    # A second Ctrl-C kills the processes at once.
    trap 'kill -KILL $(jobs -p) 2>/dev/null' INT TERM
    # Use bash's own list: a signal may have arrived between the start of a process and the assignment of its pid.
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
