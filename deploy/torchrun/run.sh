#!/usr/bin/env bash
# Trains on several machines by ssh, without a scheduler:
#
#     deploy/torchrun/run.sh HOST1 HOST2 ... -- FOLDER [flags of `t2i-adapter train`]
#
# Each host runs one torchrun with the same words; the first is where the processes meet. FOLDER is the run's folder, on
# a disk that all hosts reach, and so are this folder and the data. ssh must log in without a password.
# Ctrl-C, TERM and USR1 stop the run on all hosts after one update and one save, and so does a lost connection; the same
# command resumes it. A host that fails stops the others.
#
# Exit code: 0 finished, 75 stopped before its end (start it again), 2 a word is wrong, else a failure.
# docs/clusters.md explains this file.

# Edit here, or set before the command.
GPUS=${GPUS:-8}             # processes on each host
PORT=${PORT:-29400}         # a port that nobody uses on the first host, and that the others reach
DIR=${DIR:-$PWD}            # the folder on each host in which the command runs
ACTIVATE=${ACTIVATE:-true}  # what makes the command available, as: source /shared/venv/bin/activate
SSH=${SSH:-ssh}

set -uo pipefail
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
  echo "error: run.sh needs bash 5.1 or newer, this is $BASH_VERSION" >&2
  exit 2
fi
hosts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  hosts+=("$1")
  shift
done
if [ ${#hosts[@]} -eq 0 ] || [ $# -lt 2 ] || [ "${2#-}" != "$2" ]; then
  echo "error: use: run.sh HOST1 HOST2 ... -- FOLDER [flags of t2i-adapter train]" >&2
  exit 2
fi
folder=$2
shift 2

head=${hosts[0]#*@}
words=(torchrun --nnodes "${#hosts[@]}" --nproc_per_node "$GPUS" --rdzv_id "run-$$-$RANDOM" --rdzv_backend c10d
  --rdzv_endpoint "$head:$PORT" -m t2i_adapter train "$@" --output_dir "$folder" --checkpoint.resume auto)

# What runs on each host. Its standard input is its lease: a line there is a signal for torchrun, and its end, which a
# lost connection causes too, is TERM. torchrun ends with 1 whatever its processes end with, so the run's own record
# says whether the run was stopped; a record that did not change is that of an earlier start.
remote="cd $(printf %q "$DIR") && $ACTIVATE || exit 1
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150
status() { t2i-adapter runs ls $(printf %q "$folder") --json 2>/dev/null; }
before=\$(status)
exec 3<&0
$(printf '%q ' "${words[@]}") </dev/null 3<&- &
child=\$!
{ read -r signal <&3 || signal=TERM; kill -\"\$signal\" \$child; } 2>/dev/null &
lease=\$!
wait \$child
code=\$?
kill \$lease 2>/dev/null
after=\$(status)
case \$after in \"\$before\") ;; *'\"state\": \"stopped\"'*) exit 75 ;; esac
exit \$code"
remote="bash -c '${remote//\'/\'\\\'\'}'" # in quotes that every login shell reads

work=$(mktemp -d)
leases=()
pids=()
for i in "${!hosts[@]}"; do
  mkfifo "$work/$i"
  (
    trap '' INT # Ctrl-C reaches this ssh too, which must live until its host has stopped
    for lease in "${leases[@]}"; do exec {lease}>&-; done # a lease ends with run.sh, not with another ssh
    # shellcheck disable=SC2086 # SSH may hold options
    exec $SSH -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4 "${hosts[i]}" "$remote"
  ) <"$work/$i" &
  pids+=($!)
  exec {lease}>"$work/$i"
  leases+=("$lease")
done

# Tells all hosts to stop: $1 is the signal that torchrun gets there.
stop() {
  local lease
  for lease in "${leases[@]}"; do echo "$1" >&"$lease"; done 2>/dev/null
}
trap '' PIPE
trap 'stop TERM' INT TERM HUP
trap 'stop USR1' USR1

result=0
left=${#pids[@]}
while [ "$left" -gt 0 ]; do
  wait -n -p ended "${pids[@]}"
  code=$?
  [ -n "${ended:-}" ] || continue # a signal ended `wait`
  for i in "${!pids[@]}"; do
    [ "${pids[i]}" = "$ended" ] || continue
    echo "run.sh: ${hosts[i]} ended with $code" >&2
    unset "pids[i]"
  done
  left=${#pids[@]}
  if [ "$code" -ne 0 ]; then
    stop TERM
    # A failure outweighs a stop: the other hosts are stopped because of it.
    if [ "$result" -eq 0 ] || [ "$result" -eq 75 ]; then result=$code; fi
  fi
done
rm -rf "$work"
exit "$result"
