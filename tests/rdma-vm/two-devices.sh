#!/bin/bash
# In the guest: two RDMA devices, rxea (10.79.0.1) and rxeb (10.79.0.2), on the two ends of a veth pair in one
# network namespace, with the packets made to cross the wire: rxe drops what comes in through lo for another
# device, and its UDP socket lives in the first namespace only.
set -e
ip link add wa type veth peer name wb
for d in wa wb; do
  ip link set $d mtu "${1:-4200}" up
  sysctl -qw net.ipv4.conf.$d.accept_local=1 net.ipv4.conf.$d.rp_filter=0
done
sysctl -qw net.ipv4.conf.all.rp_filter=0
ip addr add 10.79.0.1/24 dev wa; ip addr add 10.79.0.2/24 dev wb
ip neigh replace 10.79.0.2 lladdr "$(cat /sys/class/net/wb/address)" dev wa
ip neigh replace 10.79.0.1 lladdr "$(cat /sys/class/net/wa/address)" dev wb
ip route add 10.79.0.2 dev wa src 10.79.0.1 table 101; ip route add 10.79.0.1 dev wb src 10.79.0.2 table 102
ip rule add pref 1 to 10.79.0.2 oif wa lookup 101; ip rule add pref 1 to 10.79.0.1 oif wb lookup 102
ip rule del pref 0; ip rule add pref 10 lookup local
rdma link add rxea type rxe netdev wa; rdma link add rxeb type rxe netdev wb
