"""Makes the pictures of the page in docs/images, with agents that are made up: python3 tests/page/pictures.py"""

import collections
import itertools
import math
import os
import random
import struct
import sys
import threading
import zlib

import stub
from webdriver import Browser

IMAGES = os.path.join(stub.ROOT, "docs", "images")
#: Seconds of rates that the small curves show.
HISTORY = 100
#: Squared distance of two colours that are as good as one.
NEAR = 60


def live(agent, stop, into, out):
    """Rates that move, as those of a node do that took a release and gives it on."""
    drawn = random.Random(7)
    for n in range(10_000):
        agent.state["rates"] = {
            "in_bytes_per_s": into * max(0.0, math.sin(n / 30)) * drawn.uniform(0.8, 1.1) if n < 94 else 0.0,
            "out_bytes_per_s": out * (0.5 + 0.45 * math.sin(n / 17)) * drawn.uniform(0.85, 1.1),
        }
        if stop.wait(1):
            return


def picture(name, state, height, dark, into, out, history=HISTORY):
    agent, browser, stop = stub.Stub(state), Browser(1440, height, dark), threading.Event()
    threading.Thread(target=live, args=(agent, stop, into, out), daemon=True).start()
    try:
        browser.open(agent.url)
        browser.until(f"return window.aquiferShown?.status.uptime_seconds > {history}", "some history", history + 30)
        browser.until("return document.querySelector('.swarm svg[data-buckets]') !== null", "the swarm")
        browser.size(1440, browser.run("return document.body.scrollHeight"))
        path = os.path.join(IMAGES, name)
        browser.picture(path)
        with_few_colours(path)
    finally:
        stop.set()
        browser.close()
        agent.close()


def with_few_colours(path):
    """Writes a PNG of Chromium's anew with a palette of 256: a third of its bytes, and nobody sees it."""
    with open(path, "rb") as file:
        content = file.read()
    at, data = 8, b""
    while at < len(content):
        (length,), kind = struct.unpack_from(">I", content, at), content[at + 4 : at + 8]
        body = content[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colours = struct.unpack_from(">IIBB", body)
        data += body if kind == b"IDAT" else b""
        at += 12 + length
    assert depth == 8 and colours in (2, 6), "8 bits of red, green and blue, with or without alpha"
    step = 3 if colours == 2 else 4
    rows = list(unfiltered(zlib.decompress(data), width * step, height, step))
    pixels = [list(zip(row[0::step], row[1::step], row[2::step], strict=True)) for row in rows]
    counted = collections.Counter(itertools.chain.from_iterable(pixels))
    palette = []
    for colour, _ in counted.most_common():
        # The most frequent ones, and room for those that are rare and like no other.
        if len(palette) < 256 and all(
            sum((a - b) ** 2 for a, b in zip(colour, p, strict=True)) > NEAR for p in palette
        ):
            palette.append(colour)
    index = {
        c: min(range(len(palette)), key=lambda i: sum((a - b) ** 2 for a, b in zip(c, palette[i], strict=True)))
        for c in counted
    }
    lines = b"".join(b"\0" + bytes(index[pixel] for pixel in row) for row in pixels)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)), (b"PLTE", b"".join(map(bytes, palette))),
        (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""),
    ]  # fmt: skip
    with open(path, "wb") as file:
        file.write(content[:8])
        for kind, body in parts:
            file.write(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))


def unfiltered(data, width, height, step):
    """Rows of bytes, as in section 9.2 of the PNG specification."""
    above = bytearray(width)
    for y in range(height):
        kind = data[y * (width + 1)]
        row = bytearray(data[y * (width + 1) + 1 : (y + 1) * (width + 1)])
        for x in range(width) if kind else ():
            left, up, corner = (row[x - step], above[x], above[x - step]) if x >= step else (0, above[x], 0)
            if kind == 1:
                guess = left
            elif kind == 2:
                guess = up
            elif kind == 3:
                guess = (left + up) // 2
            else:
                p = left + up - corner
                guess = min((abs(p - left), 0, left), (abs(p - up), 1, up), (abs(p - corner), 2, corner))[2]
            row[x] = (row[x] + guess) & 255
        yield bytes(row)
        above = row


def main():
    os.makedirs(IMAGES, exist_ok=True)
    works = [
        threading.Thread(target=picture, args=work)
        for work in [
            ("page-64-light.png", stub.rolling(), 1200, False, 6.1e9, 3.4e9),
            ("page-64-dark.png", stub.failing(), 1200, True, 6.1e9, 3.4e9),
            ("page-1.png", stub.alone(), 900, False, 0.0, 0.0, 3),
        ]
    ]
    for work in works:
        work.start()
    for work in works:
        work.join()


if __name__ == "__main__":
    sys.exit(main())
