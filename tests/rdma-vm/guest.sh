#!/bin/bash
# guest.sh [options] -- CMD [ARG...]
#
# Runs a command as root in a throw-away QEMU guest that has a software RDMA device (rdma_rxe, RoCE v2). The
# guest's root is the root of this machine, read-only, with a tmpfs over it: paths and the working directory
# are the same inside. No root is needed out here, and no KVM.
#   -d DIR   what setup.sh filled
#   -w DIR   a directory of this machine that the guest may write to (repeatable)
#   -m MIB   memory (2048)      -c N    virtual CPUs (2)     -t SEC  wall-clock limit (300)
#   -n N     RDMA devices rxe0.. (1), each on a dummy interface rx0.. with the address 10.77.N.1
#   -M MTU   of the interfaces (4200, for RoCE's 4096)       -v      the guest's console and warnings
# Environment: RDMA_VM_MODULES="sch_netem ..." loads more of the kernel's modules.
# Exit status: the command's; 124 when its time was up; 125 when the guest did not start, or died.
set -euo pipefail
SELF=$(realpath "$0")
DIR= MEMORY=2048 CPUS=2 LIMIT=300 DEVICES=1 MTU=4200 VERBOSE=0 WRITABLE=()
while getopts d:w:m:c:t:n:M:v option; do case $option in
  d) DIR=$(realpath "$OPTARG");; w) WRITABLE+=("$(realpath "$OPTARG")");;
  m) MEMORY=$OPTARG;; c) CPUS=$OPTARG;; t) LIMIT=$OPTARG;; n) DEVICES=$OPTARG;; M) MTU=$OPTARG;; v) VERBOSE=1;;
  *) exit 2;;
esac; done
shift $((OPTIND - 1)); [ "${1-}" != -- ] || shift
[ $# -gt 0 ] && [ -n "$DIR" ] || { sed -n 2,14p "$SELF"; exit 2; }
BUSYBOX=$DIR/userland/usr/bin/busybox
VMLINUZ=$(ls "$DIR"/kernel/boot/vmlinuz-* | tail -1)
VERSION=${VMLINUZ##*/vmlinuz-}
TEMP=$(mktemp -d "${TMPDIR:-/tmp}/rdma-vm.XXXXXX") QEMU_PID=
cleanup() { [ -z "$QEMU_PID" ] || kill "$QEMU_PID" 2>/dev/null || true; rm -rf "$TEMP"; }
trap cleanup EXIT

# --- the initial file system: busybox and the modules named here. Made once for each kernel and version of this script.
WANTED="virtio_pci 9pnet_virtio 9p overlay crc32_generic dummy veth ib_uverbs rdma_rxe ${RDMA_VM_MODULES-sch_netem}"
IMAGE=$DIR/initramfs-$VERSION-$( (cat "$SELF"; echo "$WANTED") | sha256sum | cut -c1-12).gz
if [ ! -e "$IMAGE" ]; then
  ROOT=$TEMP/initrd MODULES=$TEMP/m/lib/modules/$VERSION
  mkdir -p "$ROOT"/{bin,proc,sys,dev,host,userland,over,root,mods} "$MODULES"
  (cd "$DIR/kernel/lib/modules/$VERSION"
   cp --parents -r kernel/drivers/{infiniband,virtio,net/dummy.ko*,net/veth.ko*} kernel/net/{9p,ipv4,ipv6,sched} \
     kernel/fs/{9p,netfs,overlayfs,configfs} kernel/crypto kernel/lib modules.builtin modules.order "$MODULES"
   [ ! -d kernel/fs/fscache ] || cp --parents -r kernel/fs/fscache "$MODULES")
  find "$MODULES" -name '*.ko.xz' -print0 | xargs -0r xz -d
  "$BUSYBOX" depmod -b "$TEMP/m" "$VERSION"
  for module in $WANTED; do
    if line=$(grep -E "/$module\.ko:" "$MODULES/modules.dep"); then
      echo "${line#*:}" | tr ' ' '\n' | tac | sed '/^$/d'
      echo "${line%%:*}"
    elif ! grep -q "/$module\.ko" "$MODULES/modules.builtin"; then
      echo "rdma-vm: kernel $VERSION has no module $module" >&2; exit 125
    fi
  done | awk '!seen[$0]++' > "$TEMP/order"
  while read -r file; do cp "$MODULES/$file" "$ROOT/mods/"; echo "${file##*/}"; done < "$TEMP/order" > "$ROOT/mods/order"
  cp "$BUSYBOX" "$ROOT/bin/busybox"
  cat > "$ROOT/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin; export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
die() { echo "guest: $*"; echo "guest: $*" >/dev/ttyS0; sleep 1; poweroff -f; }
trap 'die init ended' EXIT
# Dependencies may come in any order: go round until a pass loads nothing more.
todo=$(cat /mods/order)
while [ "$todo" ]; do
  left= loaded=
  for m in $todo; do if insmod /mods/$m 2>/dev/null; then loaded=1; else left="$left $m"; fi; done
  todo=$left
  [ "$loaded" ] || { echo "guest: not loaded:$todo" >/dev/ttyS0; break; }
done
mkdir -p /control; O=version=9p2000.L,trans=virtio,msize=512000
mount -t 9p -o $O,cache=none control /control || die no control share
. /control/env
mount -t 9p -o $O,cache=loose,ro host /host || die no host share
mount -t 9p -o $O,cache=loose,ro userland /userland || die no userland share
mount -t tmpfs tmpfs /over; mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/userland:/host,upperdir=/over/upper,workdir=/over/work overlay /root || die no overlay
cd /root; mkdir -p proc sys dev run
mount -t proc proc proc; mount -t sysfs sys sys; mount -t devtmpfs dev dev
mkdir -p dev/shm dev/pts; mount -t tmpfs tmpfs dev/shm; mount -t devpts devpts dev/pts; mount -t tmpfs tmpfs run
mkdir -p run/control; mount --move /control run/control
i=0
for d in $WRITABLE; do
  mkdir -p /root$d; mount -t 9p -o $O,cache=none writable$i /root$d || die no share $d; i=$((i+1))
done
trap - EXIT
exec switch_root /root /bin/sh /run/control/stage2
INIT
  chmod +x "$ROOT/init"
  (cd "$ROOT" && find . | "$BUSYBOX" cpio -o -H newc 2>/dev/null | gzip -1) > "$IMAGE.$$"; mv "$IMAGE.$$" "$IMAGE"
fi

# --- an uncompressed kernel: emulation would take 7 s to unpack it.
KERNEL=$DIR/vmlinux-$VERSION
if [ ! -e "$KERNEL" ]; then
  for form in '\xFD7zXZ\x00 xz' '\x28\xB5\x2F\xFD zstd'; do
    for offset in $(LC_ALL=C grep -aboP "${form% *}" "$VMLINUZ" | cut -d: -f1); do
      tail -c +$((offset + 1)) "$VMLINUZ" | ${form#* } -dc 2>/dev/null > "$KERNEL.$$" || true
      if [ "$(head -c 4 "$KERNEL.$$" | tr -d '\0')" = $'\177ELF' ]; then mv "$KERNEL.$$" "$KERNEL"; break 2; fi
    done
  done
  rm -f "$KERNEL.$$"
fi
[ -e "$KERNEL" ] || KERNEL=$VMLINUZ

# --- this run: a directory of its own, which the guest sees as /run/control.
mkdir "$TEMP/control"; : > "$TEMP/control/out"; SHARES=()
share() {
  SHARES+=(-fsdev "local,id=fs$1,path=$2,security_model=none,multidevs=remap$3"
    -device "virtio-9p-pci,fsdev=fs$1,mount_tag=$1")
}
share control "$TEMP/control" ""; share host / ",readonly=on"; share userland "$DIR/userland" ",readonly=on"
for i in ${WRITABLE[@]+"${!WRITABLE[@]}"}; do share "writable$i" "${WRITABLE[$i]}" ""; done
printf 'WRITABLE=%q\n' "${WRITABLE[*]-}" > "$TEMP/control/env"
printf '%q ' "$@" > "$TEMP/control/command"
cat > "$TEMP/control/stage2" <<STAGE2
export PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root RDMA_VM=1
cd /; C=/run/control; at() { read up _ </proc/uptime; echo "\$1 \$up" >>\$C/times; }
ip link set lo up; hostname rdma-vm
i=0; while [ \$i -lt $DEVICES ]; do
  ip link add rx\$i type dummy; ip link set rx\$i mtu $MTU up; ip addr add 10.77.\$i.1/24 dev rx\$i
  rdma link add rxe\$i type rxe netdev rx\$i || echo "guest: rdma link add failed"; i=\$((i+1))
done >>\$C/out 2>&1
ulimit -l unlimited; ulimit -n 65536; at ready; cd "$PWD" 2>/dev/null
setsid -w bash -c "\$(cat \$C/command)" >>\$C/out 2>&1 </dev/null; rc=\$?
at done; dmesg -l emerg,alert,crit,err,warn >\$C/dmesg 2>/dev/null; echo \$rc >\$C/rc; sync
mkfifo /run/never; exec 9<>/run/never; echo o >/proc/sysrq-trigger; read x <&9
STAGE2

LIBS=$DIR/qemu/usr/lib/x86_64-linux-gnu
BEGUN=$(date +%s%N)
env LD_LIBRARY_PATH="$LIBS:$DIR/qemu/lib/x86_64-linux-gnu" QEMU_MODULE_DIR="$LIBS/qemu" \
  "$DIR/qemu/usr/bin/qemu-system-x86_64" -L "$DIR/qemu/usr/share/qemu" -L "$DIR/qemu/usr/share/seabios" \
  -nodefaults -no-user-config -M q35 -cpu max -accel tcg,thread=multi -smp "$CPUS" -m "$MEMORY" -nic none \
  -display none -monitor none -no-reboot -serial "file:$TEMP/console" -kernel "$KERNEL" -initrd "$IMAGE" \
  "${SHARES[@]}" -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable clocksource=tsc \
no_timer_check cryptomgr.notests random.trust_cpu=1" </dev/null &
QEMU_PID=$!
tail --pid=$QEMU_PID -n +1 -s 0.2 -f "$TEMP/control/out" & TAIL_PID=$!
( exec >/dev/null 2>&1 </dev/null
  sleep "$LIMIT" & trap 'kill $!; exit' TERM; wait; : > "$TEMP/timeout"; kill $QEMU_PID ) & LIMIT_PID=$!
wait $QEMU_PID || true; QEMU_PID=
wait $TAIL_PID || true
kill $LIMIT_PID 2>/dev/null || true; wait $LIMIT_PID 2>/dev/null || true
if [ -e "$TEMP/control/rc" ]; then RC=$(cat "$TEMP/control/rc")
elif [ -e "$TEMP/timeout" ]; then RC=124
else RC=125; fi
if [ "$VERBOSE" = 1 ] || [ "$RC" = 125 ]; then
  tr -d '\033\r' < "$TEMP/console" | sed 's/^/[console] /' >&2
  [ ! -e "$TEMP/control/dmesg" ] || grep -v 'speed is unknown' "$TEMP/control/dmesg" | sed 's/^/[dmesg] /' >&2
fi
TENTHS=$((($(date +%s%N) - BEGUN) / 100000000))
echo "rdma-vm: status $RC after $((TENTHS / 10)).$((TENTHS % 10)) s on kernel $VERSION" >&2
exit "$RC"
