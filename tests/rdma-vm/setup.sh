#!/bin/bash
# setup.sh DIR: gets what guest.sh needs into DIR: kernel/ (Debian's, with its modules), qemu/, and userland/
# (rdma-core, perftest, busybox, libibverbs' headers). Needs Debian's apt and a mirror, and no root: packages
# are downloaded and unpacked, never installed; the system stays as it is. 85 MB to fetch, 500 MB on disk.
# Does nothing where DIR was filled by this very script before.
set -euo pipefail
SELF=$(realpath "$0")
DIR=$(mkdir -p "$1" && cd "$1" && pwd)
MARK=$DIR/filled-by-$(sha256sum < "$SELF" | cut -c1-12)
[ ! -e "$MARK" ] || exit 0
rm -f "$DIR"/filled-by-*
for tool in apt-get apt-cache dpkg xz; do
  command -v $tool >/dev/null || { echo "rdma-vm: no $tool here: the VM is made of Debian's packages" >&2; exit 1; }
done

# The system's package lists, or, where those are missing or too old, lists of our own.
APT=()
own_lists() {
  mkdir -p "$DIR/apt/lists/partial" "$DIR/apt/archives/partial"
  APT=(-o "Dir::State::Lists=$DIR/apt/lists" -o "Dir::Cache=$DIR/apt" -o Debug::NoLocking=1)
  apt-get "${APT[@]}" update -q >&2
}

# The packages that apt would install for these, with their versions.
with_dependencies() {
  apt-get "${APT[@]}" install -s --no-install-recommends "$@" |
    awk '/^Inst/ { for (i = 3; i <= NF; i++) if ($i ~ /^\(/) { sub(/\(/, "", $i); print $2 "=" $i; break } }'
}

fetch_and_unpack() { # NAME, with package names on standard input
  rm -rf "${DIR:?}/$1" "${DIR:?}/packages/$1"
  mkdir -p "$DIR/packages/$1" "$DIR/$1"
  (cd "$DIR/packages/$1" && xargs -r apt-get "${APT[@]}" download -q >&2) || return 1
  for package in "$DIR/packages/$1"/*.deb; do dpkg -x "$package" "$DIR/$1" || return 1; done
}

fetch_all() {
  # The default kernel of this Debian. 6.1 is known to be good; on 6.12 soft-RoCE is three times slower.
  local kernel=${RDMA_VM_KERNEL:-$(apt-cache "${APT[@]}" depends linux-image-amd64 |
    awk '/Depends: linux-image/ { print $2; exit }')}
  [ -n "$kernel" ] || return 1
  echo "$kernel" | fetch_and_unpack kernel || return 1
  with_dependencies qemu-system-x86 | fetch_and_unpack qemu || return 1
  {
    with_dependencies ibverbs-providers ibverbs-utils perftest iproute2
    printf '%s\n' busybox-static libibverbs-dev
  } | sort -u | fetch_and_unpack userland || return 1
}

echo "rdma-vm: downloading a kernel, QEMU and rdma-core into $DIR" >&2
fetch_all || { own_lists && fetch_all; } || { echo "rdma-vm: the packages could not be fetched" >&2; exit 1; }
# The guest lays userland/ over a root whose /bin, /sbin and /lib are links into /usr.
for dir in bin sbin lib lib64; do
  if [ -d "$DIR/userland/$dir" ] && [ ! -L "$DIR/userland/$dir" ]; then
    mkdir -p "$DIR/userland/usr/$dir"
    cp -a "$DIR/userland/$dir/." "$DIR/userland/usr/$dir/"
    rm -rf "${DIR:?}/userland/$dir"
  fi
done
rm -rf "$DIR/packages" "$DIR/apt"
touch "$MARK"
