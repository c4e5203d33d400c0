#!/bin/bash
# memlock.sh PROGRAM: in the guest, as root. An agent whose user may lock too little memory for RDMA says once what to
# do about it, and its engine ends with the right bytes, over TCP.
set -euo pipefail
PROGRAM=$1 BYTES=$((24 << 20)) LIMIT_KIB=8192 # as distributions have it for users
PATIENCE_S=240
DIR=$(mktemp -d) STARTED=()
cleanup() { kill "${STARTED[@]}" 2>/dev/null || true; wait 2>/dev/null || true; rm -rf "$DIR"; }
trap cleanup EXIT
fail() {
  echo "memlock: $*"
  for log in "$DIR"/*.log; do sed "s|^|${log##*/}: |" "$log"; done
  exit 1
}
# Waits for a line with $2 in the file $1.
await() {
  local until=$((SECONDS + PATIENCE_S))
  until grep -q "$2" "$1" 2>/dev/null; do
    [ $SECONDS -lt $until ] || fail "no $2 in $1 within $PATIENCE_S s"
    sleep 0.2
  done
}
as_nobody() { exec setpriv --reuid 65534 --regid 65534 --clear-groups --bounding-set -all "$@"; }

chmod a+rw /dev/infiniband/*
HEADER="{\"weight\":{\"dtype\":\"U8\",\"shape\":[$BYTES],\"data_offsets\":[0,$BYTES]}}"
mkdir "$DIR/checkpoint"
{
  printf "\\x$(printf %02x ${#HEADER})\\0\\0\\0\\0\\0\\0\\0%s" "$HEADER"
  head -c "$BYTES" /dev/urandom
} > "$DIR/checkpoint/model.safetensors"
"$PROGRAM" keygen mesh --out "$DIR/mesh.key" >/dev/null
TRUST=$("$PROGRAM" keygen publisher --out "$DIR/publisher.key" | grep -o "[0-9a-f]\{64\}" | tail -1)
COMMON=(--config /dev/null --mesh-key "$DIR/mesh.key" --listen 127.0.0.1:0 --data-listen 127.0.0.1:0
  --rdma-listen 127.0.0.1:0 --shm false)

"$PROGRAM" publish "$DIR/checkpoint" --channel test/model --json --publisher-key "$DIR/publisher.key" "${COMMON[@]}" \
  > "$DIR/publisher.out" 2> "$DIR/publisher.log" & STARTED+=($!)
await "$DIR/publisher.out" '"published"'
ADDRESS=$(grep '"published"' "$DIR/publisher.out" | grep -o '/ip4/[^"]*' | head -1)

chown 65534:65534 "$DIR" "$DIR/mesh.key"
as_nobody bash -c "ulimit -l $LIMIT_KIB; exec \"\$@\"" agent "$PROGRAM" agent --channel test/model --name reader \
  --trust "$TRUST" --peer "$ADDRESS" --socket "$DIR/agent.sock" --state "$DIR/state" "${COMMON[@]}" \
  > "$DIR/agent.out" 2> "$DIR/agent.log" & STARTED+=($!)
until [ -S "$DIR/agent.sock" ]; do kill -0 "${STARTED[-1]}" 2>/dev/null || fail "the agent ended"; sleep 0.2; done
mkfifo "$DIR/open"
as_nobody "$PROGRAM" demo-engine --channel test/model --name engine --socket "$DIR/agent.sock" \
  < "$DIR/open" > "$DIR/engine.out" 2> "$DIR/engine.log" & ENGINE=$!; STARTED+=($ENGINE)
exec 9> "$DIR/open"
await "$DIR/engine.out" '"hydrated"'

# What the engine's memory holds, looked at without anybody's help.
for fd in /proc/$ENGINE/fd/*; do case $(readlink "$fd") in /memfd:*) MEMORY=$fd;; esac; done
tail -c "$BYTES" "$DIR/checkpoint/model.safetensors" | cmp -n "$BYTES" - "$MEMORY" || fail "other bytes have arrived"
STATUS=$("$PROGRAM" status --json --socket "$DIR/agent.sock" | tr -d ' \n')
[[ $STATUS =~ rxe0port1 ]] || fail "it did not try RDMA: $STATUS"
[[ $STATUS =~ \"rdma\":\{\"received_bytes\":0, ]] || fail "something came over RDMA: $STATUS"
[[ $STATUS =~ \"tcp\":\{\"received_bytes\":([0-9]+) && ${BASH_REMATCH[1]} -ge $BYTES ]] || fail "it came otherwise: $STATUS"
WARNINGS=$(grep -c 'WARN.*RDMA' "$DIR/agent.log") || true
[ "$WARNINGS" = 1 ] || fail "$WARNINGS warnings of RDMA, not one"
grep 'WARN.*may lock 8388608 bytes of memory: raise it (ulimit -l, LimitMEMLOCK=' "$DIR/agent.log" || fail "it does not say what to do"
