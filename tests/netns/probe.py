"""What runs inside a namespace beside the agents: one TCP stream, and a clock for small messages.

    probe.py sink PORT                     receives one stream; prints the rate of all but its first eighth
    probe.py source HOST PORT BYTES        sends one
    probe.py echo PORT                     sends every datagram back
    probe.py rtt HOST PORT                 prints the round trip of a datagram, every 20 ms, until it ends

Only the standard library: this has to start in milliseconds.
"""

import socket
import struct
import sys
import time

PIECE_BYTES = 64 << 10
RTT_INTERVAL_S = 0.02
RTT_PATIENCE_S = 2.0


def sink(port):
    with socket.create_server(("0.0.0.0", port)) as server:
        print("ready", flush=True)
        stream, _ = server.accept()
    with stream:
        total = struct.unpack("<Q", stream.recv(8, socket.MSG_WAITALL))[0]
        buffer, received, begun = bytearray(PIECE_BYTES), 0, None
        while received < total:
            got = stream.recv_into(buffer)
            if not got:
                raise SystemExit("the stream ended early")
            received += got
            if begun is None and received >= total // 8:
                begun = (received, time.monotonic())
        seconds = time.monotonic() - begun[1]
        print((received - begun[0]) / seconds, flush=True)


def source(host, port, total):
    piece = bytes(PIECE_BYTES)
    with socket.create_connection((host, port)) as stream:
        stream.sendall(struct.pack("<Q", total))
        for _ in range(total // PIECE_BYTES):
            stream.sendall(piece)
        stream.sendall(piece[: total % PIECE_BYTES])
        stream.shutdown(socket.SHUT_WR)
        stream.recv(1)


def echo(port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("0.0.0.0", port))
        print("ready", flush=True)
        while True:
            data, sender = s.recvfrom(2048)
            s.sendto(data, sender)


def rtt(host, port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((host, port))
        s.settimeout(RTT_PATIENCE_S)
        number = 0
        while True:
            number += 1
            sent = time.monotonic()
            s.send(struct.pack("<Q", number))
            try:
                while struct.unpack("<Q", s.recv(2048))[0] != number:
                    pass
                print(f"{time.time():.6f} {time.monotonic() - sent:.6f}", flush=True)
            except socket.timeout:
                print(f"{time.time():.6f} lost", flush=True)
            time.sleep(RTT_INTERVAL_S)


def main():
    command, *arguments = sys.argv[1:]
    if command == "sink":
        sink(int(arguments[0]))
    elif command == "source":
        source(arguments[0], int(arguments[1]), int(arguments[2]))
    elif command == "echo":
        echo(int(arguments[0]))
    elif command == "rtt":
        rtt(arguments[0], int(arguments[1]))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
