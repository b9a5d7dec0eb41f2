# Functions of the scripts: the start of a recipe, and for box.sh settings KEY=value and stages that are skipped when done.
# shellcheck shell=bash

die() {
  echo "error: $*" >&2
  exit 1
}

# die_of LOG...: stops with the last line of each program's log, which names the reason.
die_of() {
  die "$(tail -qn 1 "$@" | sed 's/^error: //') (full log: $*)"
}

# read_settings "KEY KEY ..." ARGUMENT...: sets each KEY that is given as KEY=value. The environment is ignored, and an
# empty value means the default.
read_settings() {
  local keys=$1 argument key
  shift
  # shellcheck disable=SC2086
  unset $keys
  for argument in "$@"; do
    key=${argument%%=*}
    if [[ $argument != *=* || " $keys " != *" $key "* ]]; then
      die "'$argument' is no setting. Settings are KEY=value with one of these keys: $keys"
    fi
    printf -v "$key" '%s' "${argument#*=}"
  done
}

# defaults KEY=value...: sets each KEY without a value.
defaults() {
  local setting key
  for setting in "$@"; do
    key=${setting%%=*}
    [[ -n ${!key:-} ]] || printf -v "$key" '%s' "${setting#*=}"
  done
}

# keep_settings "KEY KEY ..." FILE: stores the settings of a run. A run that was begun with other settings is refused,
# because its finished stages would not match the new ones. The limit of bad rows is not stored: a finished stage is the
# same under any limit.
keep_settings() {
  local keys=$1 file=$2 key value different=""
  if [[ -e $file ]]; then
    while IFS== read -r key value; do
      [[ " $keys " != *" $key "* || ${!key:-} == "$value" ]] || different+=" $key (was '$value', now '${!key:-}')"
    done <"$file"
    [[ -z $different ]] || die "$(dirname "$file") was begun with other settings:$different." \
      "Choose another OUT, or delete what depends on them and $file"
    return
  fi
  for key in $keys; do
    echo "$key=${!key:-}"
  done >"$file.part"
  mv "$file.part" "$file"
}

# lock_run FOLDER: refuses a second run in this folder. The lock is a file that this script and all its programs hold
# open. It lasts until the last of them has ended, in whatever way.
lock_run() {
  local file=$1/.lock status=0
  exec {run_lock}>>"$file"
  if command -v flock >/dev/null; then
    flock -n "$run_lock" || status=$?
  else
    python3 -c '
import fcntl, sys
try:
    fcntl.flock(int(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(1)
except OSError as error:
    print(error, file=sys.stderr)
    sys.exit(2)' "$run_lock" || status=$?
  fi
  ((status != 1)) || die "OUT=$1: another run, or a program that a killed run left behind, is writing there." \
    "Wait until it ends, or choose another OUT (fuser $file shows its process)"
  ((status == 0)) || echo "warning: $file cannot be locked here; start no second run in this folder" >&2
}

# beside COMMAND...: starts a command in the background. Programs that the command starts end with it.
beside() {
  (
    trap 'end_programs 2>/dev/null' EXIT
    "$@"
  ) &
}

# children PID: prints the ids of the children of a process.
children() {
  cat "/proc/$1/task/$1/children" 2>/dev/null || true
}

# endings PID: prints a signal and a process id for each program that a shell has started, directly or by other shells.
# Shells are killed, because they would print how each of their programs ended. Programs end their own processes.
endings() {
  local child
  for child in $(children "$1"); do
    if [[ $(cat "/proc/$child/comm" 2>/dev/null) == "$(cat "/proc/$$/comm")" ]]; then
      echo "KILL $child"
      endings "$child"
    else
      echo "TERM $child"
    fi
  done
}

# descendants PID: prints the ids of all descendants of a process.
descendants() {
  local child
  for child in $(children "$1"); do
    echo "$child"
    descendants "$child"
  done
}

# end_programs: ends all programs that this shell has started, and kills those that have not ended after two seconds.
end_programs() {
  local -a all found
  local ending tenths self=$BASHPID
  mapfile -t found < <(endings "$self")
  mapfile -t all < <(descendants "$self")
  for ending in "${found[@]}"; do kill -"${ending% *}" "${ending#* }" || true; done
  for ((tenths = 0; tenths < 30; tenths++)); do # the last second is for programs that were killed
    kill -0 "${all[@]}" || return 0
    ((tenths != 20)) || kill -KILL "${all[@]}" || true
    sleep 0.1
  done
}

# end_run STATUS WORD: ends a run after a signal, with all programs that it has started.
end_run() {
  trap '' INT TERM HUP
  trap - EXIT
  end_programs 2>/dev/null # bash would print a line for each program
  echo "$2; start the same command again to go on" >&2
  exit "$1"
}

# stage NAME OUTPUT COMMAND...: runs the command unless OUTPUT exists. The command must make OUTPUT in one step at its
# end. Its name, its time in seconds and the moment of its end, in UTC, are added to $OUT/stages.tsv.
stage() {
  local name=$1 output=$2 start seconds
  shift 2
  if [[ -e $output ]]; then
    echo "[$name] is done: $output"
    return
  fi
  echo "[$name] ..."
  start=${EPOCHREALTIME/[.,]/}
  mkdir -p "$(dirname "$output")"
  beside "$@"
  wait $! # a signal interrupts this, but not a command
  [[ -e $output ]] || die "stage $name ended without making $output"
  seconds=$(((${EPOCHREALTIME/[.,]/} - start) / 100000))
  seconds=${seconds%?}.${seconds: -1}
  [[ $seconds == .* ]] && seconds=0$seconds
  TZ=UTC0 printf '%s\t%s\t%(%FT%TZ)T\n' "$name" "$seconds" -1 >>"$OUT/stages.tsv"
  echo "[$name] took $seconds s"
}

# show_training: reads fairseq's log and prints a line per reported loss.
show_training() {
  sed -un \
    -e 's/.*"loss": "\([^"]*\)".*"num_updates": "\([^"]*\)".*/  update \2: loss \1/p' \
    -e 's/.*"valid_loss": "\([^"]*\)".*"valid_num_updates": "\([^"]*\)".*/  update \2: validation loss \1/p'
}

# run_recipe RECIPE KEY=value...: runs a recipe by the programs of .venv, if the clone has one.
run_recipe() {
  local root recipe=$1
  shift
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  [[ ! -d $root/.venv/bin ]] || PATH=$root/.venv/bin:$PATH
  if ! command -v narvl >/dev/null; then
    echo "error: narvl is not installed; run: make setup" >&2
    exit 1
  fi
  exec narvl run --config-dir "$root/run_scripts/config" recipe="$recipe" "$@"
}
