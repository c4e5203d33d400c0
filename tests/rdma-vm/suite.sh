#!/bin/bash
# suite.sh PROGRAM TEST...: in the guest, every test that needs an RDMA device. Each prints lines as cargo's tests do.
set -uo pipefail
PROGRAM=$1; shift
failed=0

# A test of ours: its name, and a command that succeeds.
check() {
  local name=$1 begun=$SECONDS; shift
  if "$@"; then
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

doctor() {
  local said
  said=$("$PROGRAM" doctor) && echo "$said" && grep -q '10.77.0.1 (RoCE v2)   <- used' <<<"$said"
}

for test in "$@"; do
  echo "== ${test##*/}"
  "$test" || failed=1
done
if [ -x "$PROGRAM" ]; then
  check "the demo's mesh over RDMA" demo
  check "the doctor sees the devices" doctor
fi
# Soft-RoCE that waits in vain for what was not given back warns of it.
if dmesg | grep -E 'WARNING: .*rxe|BUG:'; then echo "the kernel complained"; failed=1; fi
exit $failed
