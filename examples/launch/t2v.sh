#!/usr/bin/env bash
# Text to video with a Wan 2.1 model: a frontend and a worker of this machine, found through etcd.
set -euo pipefail
# shellcheck source=examples/launch/processes.sh
. "$(dirname "${BASH_SOURCE[0]}")/processes.sh"

usage() {
    cat <<TEXT
Usage: examples/launch/t2v.sh [--wan-size 1b|14b|tiny] [--model NAME] [--engine wan|sglang|fake] [--device DEVICE]
                              [--port N] [--data-dir FOLDER]

Starts a frontend and a worker, and etcd if none answers at ETCD_ENDPOINTS; ends them all on Ctrl-C. Videos that are not
finished by then go on at the next start.

  --wan-size SIZE    1b (default): Wan 2.1 T2V 1.3B; 14b: Wan 2.1 T2V 14B; tiny: the bundled model, on a CPU as well
  --model NAME       another model instead: a folder, or a hub name of a diffusers-format Wan checkpoint
  --engine NAME      wan (default), sglang or fake; with 14b, sglang spreads each layer over two GPUs, or over as many as
                     KINEMA_ENGINE_SGLANG_TP_SIZE says
  --device DEVICE    auto (default), cpu, cuda or cuda:N
  --port N           the frontend's port, 8000 by default; 0: any free one
  --data-dir FOLDER  for the database and the videos, kinema-data by default
TEXT
}

size=1b model='' engine=wan device=auto port=8000 data_dir=kinema-data
while [ $# -gt 0 ]; do
    case $1 in
        --wan-size | --model | --engine | --device | --port | --data-dir) [ -n "${2-}" ] || refuse "$1 needs a value; see --help" ;;&
        --wan-size) size=$2; shift 2 ;;
        --model) model=$2; shift 2 ;;
        --engine) engine=$2; shift 2 ;;
        --device) device=$2; shift 2 ;;
        --port) is_number "$2" 65535 || refuse "--port $2: must be a number from 0 to 65535"; port=$2; shift 2 ;;
        --data-dir) data_dir=$2; shift 2 ;;
        -h | --help) usage; exit ;;
        *) refuse "$1 is not an option; accepted are --wan-size, --model, --engine, --device, --port, --data-dir and --help" ;;
    esac
done
case $size in
    1b) : "${model:=Wan-AI/Wan2.1-T2V-1.3B-Diffusers}" ;;
    14b) : "${model:=Wan-AI/Wan2.1-T2V-14B-Diffusers}" ;;
    tiny) : "${model:=tiny-wan}" ;;
    *) refuse "--wan-size $size: must be 1b, 14b or tiny" ;;
esac
case $engine in
    wan | sglang | fake) ;;
    *) refuse "--engine $engine: must be wan, sglang or fake" ;;
esac
if [ "$engine-$size" = sglang-14b ]; then
    export KINEMA_ENGINE_SGLANG_TP_SIZE=${KINEMA_ENGINE_SGLANG_TP_SIZE:-2}
    say "SGLang spreads each layer over $KINEMA_ENGINE_SGLANG_TP_SIZE GPUs"
fi

# Find etcd as the runtime will find it: the first address of ETCD_ENDPOINTS that answers. If none answers, start etcd.
find_etcd() {
    local endpoint
    export ETCD_ENDPOINTS=${ETCD_ENDPOINTS:-http://127.0.0.1:2379}
    for endpoint in ${ETCD_ENDPOINTS//,/ }; do
        if curl -sf --connect-timeout 3 --max-time 10 "$endpoint/health" >/dev/null; then
            say "etcd answers at $endpoint"
            return
        fi
    done
    [[ $ETCD_ENDPOINTS =~ ^http://(127\.0\.0\.1|localhost):([0-9]+)/?$ ]] ||
        fail "no etcd answers at ETCD_ENDPOINTS=$ETCD_ENDPOINTS, and one can be started on http://127.0.0.1:PORT alone"
    say "starting etcd at $ETCD_ENDPOINTS"
    start_etcd "${BASH_REMATCH[2]}"
}

find_kinema
umask 077 # the logs, like all that the processes write, are for this user alone
logs=$data_dir/logs
mkdir -p "$logs"
find_etcd

export KINEMA_CLUSTER_HOST=127.0.0.1
export KINEMA_CLUSTER_DRAIN_S=${KINEMA_CLUSTER_DRAIN_S:-0}
export KINEMA_DATA_DIR=$data_dir

start frontend kinema frontend --port "$port"
frontend=$pid
start worker kinema worker --model "$model" --engine "$engine" --device "$device"
worker=$pid
wait_for "$frontend" listening frontend
url=$(listening frontend)
say "frontend at $url; the worker loads $model, which takes a while the first time (log: $logs/worker.log)"
PATIENCE_S=7200 wait_for "$worker" curl -sf "$url/ready"

say
say "Ready. Make a video:"
say
curl_line "$url" "a red circle moving right on a black background"
say
say "Ctrl-C ends everything."
report_end
exit 1
