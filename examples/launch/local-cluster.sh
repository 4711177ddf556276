#!/usr/bin/env bash
# A whole cluster on this machine: etcd, PostgreSQL, two frontends and three workers with the bundled model on the CPU.
set -euo pipefail
# shellcheck source=examples/launch/processes.sh
. "$(dirname "${BASH_SOURCE[0]}")/processes.sh"

usage() {
    cat <<TEXT
Usage: examples/launch/local-cluster.sh [--port N]

Starts etcd, PostgreSQL, two frontends and three workers with the bundled model, and ends them all on Ctrl-C.
They store everything in a temporary folder, which is removed at the end.

  --port N  the first frontend's port, 8000 by default; the second takes the next one. 0: any free ones.
TEXT
}

port=8000
while [ $# -gt 0 ]; do
    case $1 in
        --port) is_number "${2-}" 65534 || refuse "--port ${2-}: must be a number from 0 to 65534"; port=$2; shift 2 ;;
        -h | --help) usage; exit ;;
        *) refuse "$1 is not an option; accepted are --port N and --help" ;;
    esac
done

# Start the newest PostgreSQL of this machine, with a new random password. It does not run as root.
start_postgres() {
    local as=() programs port password
    programs=$(find /usr/lib/postgresql -maxdepth 3 -path '*/bin/postgres' -printf '%h\n' 2>/dev/null | sort -V | tail -n 1)
    PATH=${programs:+$programs:}$PATH
    need postgres "apt-get install postgresql"
    port=$(free_port)
    password=$(od -An -N16 -tx1 /dev/urandom | tr -d ' ')
    mkdir "$work/postgres"
    printf '%s' "$password" >"$work/postgres/password"
    if [ "$(id -u)" -eq 0 ]; then
        as=(setpriv --reuid postgres --regid postgres --clear-groups)
        chmod 711 "$work"
        chown -R postgres:postgres "$work/postgres"
    fi
    (cd "$work/postgres" && "${as[@]}" initdb --pgdata data --username kinema --pwfile password --auth scram-sha-256 \
        --encoding UTF8 --locale C.UTF-8 --no-sync) >"$logs/postgres.log" 2>&1 ||
        { tail -n 5 "$logs/postgres.log" >&2; fail "PostgreSQL could not be set up; above is why"; }
    start postgres "${as[@]}" postgres -D "$work/postgres/data" -c port="$port" -c listen_addresses=127.0.0.1 \
        -c unix_socket_directories= -c fsync=off
    wait_for "$pid" answers 127.0.0.1 "$port"
    postgres_port=$port
    export KINEMA_JOBS_DATABASE_URL=postgresql://kinema:$password@127.0.0.1:$port/postgres
}

row() { printf '  %-12s %-24s pid %s\n' "$@"; }

find_kinema
say "Starting etcd, PostgreSQL, 2 frontends and 3 workers; this takes about half a minute."

etcd_port=$(free_port)
start_etcd "$etcd_port"
etcd_pid=$pid
start_postgres
postgres_pid=$pid

# All processes share these settings. Without a storage URL the videos go into the data folder, which they also share.
export ETCD_ENDPOINTS=http://127.0.0.1:$etcd_port
export KINEMA_CLUSTER_HOST=127.0.0.1
export KINEMA_CLUSTER_DRAIN_S=${KINEMA_CLUSTER_DRAIN_S:-0}
export KINEMA_DATA_DIR=$work/data
# The workers share the cores. With more threads than cores, they would wait for each other in every step.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 2) / 3))}

for n in 1 2; do
    start "frontend-$n" kinema frontend --port "$((port == 0 ? 0 : port + n - 1))"
    frontends[n]=$pid
done
for n in 1 2 3; do
    start "worker-$n" kinema worker --model tiny-wan --device cpu
    workers[n]=$pid
done
for n in 1 2; do
    wait_for "${frontends[n]}" listening "frontend-$n"
    urls[n]=$(listening "frontend-$n")
done
for n in 1 2 3; do wait_for "${workers[n]}" serving "worker-$n"; done
for n in 1 2; do wait_for "${frontends[n]}" curl -sf "${urls[n]}/ready"; done

say
row etcd "$ETCD_ENDPOINTS" "$etcd_pid"
row PostgreSQL "127.0.0.1:$postgres_port" "$postgres_pid"
for n in 1 2; do row "frontend $n" "${urls[n]}" "${frontends[n]}"; done
for n in 1 2 3; do row "worker $n" "tiny-wan on the CPU" "${workers[n]}"; done
say
say "Make a video, through either frontend:"
say
curl_line "${urls[1]}" "a red circle moving right on a black background"
say
say "Kill a worker or a frontend meanwhile (kill -9 PID): the others finish the video. Logs are in $logs"
say "Ctrl-C ends everything."
while [ ${#names[@]} -gt 0 ]; do report_end; done
