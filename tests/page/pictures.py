"""Makes the pictures of the page in docs/images, with agents that are made up: python3 tests/page/pictures.py"""

import math
import os
import random
import sys
import threading

import stub
from webdriver import Browser

IMAGES = os.path.join(stub.ROOT, "docs", "images")
#: Seconds of rates that the small curves show.
HISTORY = 100


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
        browser.picture(os.path.join(IMAGES, name))
    finally:
        stop.set()
        browser.close()
        agent.close()


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
