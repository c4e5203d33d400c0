#!/bin/bash
# suite.sh PROGRAM TEST...: in the guest, every test that needs an RDMA device. Each prints lines as cargo's tests do.
set -uo pipefail
set -m # each program in a process group of its own
PROGRAM=$1; shift
# For each program. The longest takes one minute on a quiet machine, and took three on a busy one.
PATIENCE_S=${RDMA_SUITE_PATIENCE_S:-420}
failed=0

# Where every thread of a process group stands.
threads_of() {
  local process task
  for process in /proc/[0-9]*; do
    [ "$(sed 's/.*) //' "$process/stat" 2>/dev/null | cut -d' ' -f3)" = "$1" ] || continue
    for task in "$process"/task/*; do
      echo "-- $(cat "$task/comm") ($task): waits in $(cat "$task/wchan"), system call $(cat "$task/syscall")"
      cat "$task/stack"
    done 2>/dev/null # some end meanwhile
  done
}

# Runs a command that must end. One that does not is shown, and killed.
bounded() {
  local group until=$((SECONDS + PATIENCE_S))
  "$@" & group=$!
  while kill -0 $group 2>/dev/null; do
    if [ $SECONDS -ge $until ]; then
      echo "$1 did not end within $PATIENCE_S s"
      threads_of $group
      kill -9 -- -$group; wait $group 2>/dev/null
      return 124
    fi
    sleep 0.2
  done
  wait $group
}

# A test of ours: its name, and a command that succeeds.
check() {
  local name=$1 begun=$SECONDS; shift
  if bounded "$@"; then
    echo "test $name ... ok"; echo "test result: ok. 1 passed; 0 failed; 0 ignored; in $((SECONDS - begun)) s"
  else
    echo "test $name ... FAILED"; echo "test result: FAILED. 0 passed; 1 failed; 0 ignored"; failed=1
  fi
}

packets() { cat /sys/class/infiniband/rxe*/ports/1/hw_counters/rcvd_pkts | awk '{ sum += $1 } END { print sum }'; }

# The demo's mesh, with every payload byte by RDMA READ. A READ's answers carry 4096 bytes each, so the devices
# must have counted as many packets as the bytes need, and no more than a fifth of them besides.
demo() {
  local before report bytes packets least
  before=$(packets)
  report=$("$PROGRAM" demo --size 32MiB --over rdma --json) || return 1
  bytes=$(grep -o '"rdma": *[0-9]*' <<<"$report" | grep -o '[0-9]*$')
  packets=$(($(packets) - before)) least=$((bytes / 4096))
  echo "$bytes bytes by RDMA READ; the devices counted $packets packets, $least at least are needed"
  [ "$packets" -ge "$least" ] && [ "$packets" -le $((least + least / 5 + 1000)) ]
}

memlock() { "$(dirname "$0")/memlock.sh" "$PROGRAM"; }

doctor() {
  local said
  said=$("$PROGRAM" doctor) && echo "$said" && grep -q '10.77.0.1 (RoCE v2)   <- used' <<<"$said"
}

# Under a real systemd, with its devices allowed by name and memory to lock without a limit.
unit() { python3 "$(dirname "$0")/../systemd/rdma.py" "$PROGRAM"; }

# A test program of cargo's, and what of it to run.
tests() {
  echo "== ${1##*/}"
  bounded "$@"
  case $? in
    0) ;;
    124) echo "test result: FAILED. 0 passed; 1 failed; 0 ignored; it did not end"; failed=1;;
    *) failed=1;;
  esac
}

for program in "$@"; do
  case ${program##*/} in
    aquifer_rdma-*) tests "$program" ibv::;; # the others of its unit tests need no device
    *) tests "$program";;
  esac
done
check "the demo's mesh over RDMA" demo
check "too little memory may be locked: over TCP, and said" memlock
check "the doctor sees the devices" doctor
check "the systemd unit has devices by its drop-in, and none without" unit
# Soft-RoCE that waits in vain for what was not given back warns of it.
if dmesg | grep -E 'WARNING: .*rxe|BUG:'; then echo "the kernel complained"; failed=1; fi
exit $failed
