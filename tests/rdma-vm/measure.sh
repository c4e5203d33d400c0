#!/bin/bash
# measure.sh PEER [ROUNDS]: in the guest, READs of 1 MiB, 16 in flight, 64 MiB a round: perftest's ib_read_bw,
# our verbs, and our transport, which hashes all of it besides (the example `peer` of aquifer-rdma), in turn.
# Rates in MiB/s.
set -euo pipefail
PEER=$1 ROUNDS=${2:-3}
for round in $(seq "$ROUNDS"); do
  ib_read_bw -d rxe0 -x 1 -s 1048576 -n 64 -t 16 -o 16 -F >/dev/null 2>&1 &
  sleep 2
  ib_read_bw -d rxe0 -x 1 -s 1048576 -n 64 -t 16 -o 16 -F localhost 2>&1 | awk '$1 == 1048576 { print "ib_read_bw " $4 }'
  wait
  "$PEER" verbs rxe0 64 2 | tail -1
  "$PEER" measure rxe0 16 4194304 2 | tail -1
done
