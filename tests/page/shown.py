"""What the page shows, and what it should show of a status."""

import json
from decimal import ROUND_HALF_UP, Decimal

# What is on the page and what it was made of, taken in one go, so that both are of one instant.
FIELDS = """
const all = {}, texts = {}, status = window.aquiferShown.status;
for (const e of document.querySelectorAll('[data-field]')) {
  const at = e.closest('[data-channel],[data-engine],[data-transport],[data-phase]:not([data-field])');
  const of = at ? at.dataset.channel ?? at.dataset.engine ?? at.dataset.transport ?? '' : '';
  const article = e.closest('article');
  const phase = e.closest('li[data-phase]')?.dataset.phase;
  const name = (article ? article.dataset.channel + '|' : of ? of + '|' : '') + e.dataset.field + (phase ? '|' + phase : '');
  all[name] = e.dataset.value;
  texts[name] = e.textContent;
}
const nodes = {};
for (const e of document.querySelectorAll('#grid [data-node]')) nodes[e.dataset.node] = e.dataset.state;
// As text: WebDriver loses keys such as __proto__.
return JSON.stringify({fields: all, texts, nodes, status});
"""


def seen(browser):
    """Fields, nodes and the status that they were made of."""
    return json.loads(browser.run(FIELDS))


def expected(status):
    """The raw value of each number that is the status' own, by its field's name."""
    fields = {
        path: deep(status, path)
        for path in [
            *(f"traffic.{name}" for name in ["bytes_in", "bytes_out", "chunks_verified", "chunks_corrupt", "chunks_found", "reads_failed", "sources"]),
            "rates.in_bytes_per_s", "rates.out_bytes_per_s", "memory_store_bytes", "disk_store_bytes", "leased_bytes",
            "version", "uptime_seconds", "data_encryption", "name", "readiness.ready",
        ]
    }  # fmt: skip
    for name, moved in status["transports"].items():
        for way in ["received_bytes", "sent_bytes"]:
            fields[f"{name}|transports.{way}"] = moved[way]
    for engine in status["engines"]:
        for name in ["ready", "serving", "chunks_done", "chunks_total"]:
            fields[f"{engine['name']}|engine.{name}"] = engine[name]
    for channel in status["channels"]:
        for name in ["seq", "manifest", "state", "bytes_have", "bytes_wanted", "chunks_have", "chunks_wanted", "checkpoint_bytes", "sources", "eta_seconds"]:  # fmt: skip
            fields[f"{channel['channel']}|channel.{name}"] = channel[name]
    return {name: as_text(value) for name, value in fields.items()}


def deep(status, path):
    for part in path.split("."):
        status = status[part]
    return status


def as_text(value):
    """As JavaScript writes it, for values that JSON brought."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def misspelt(at):
    """Fields whose text does not say what their raw value is."""
    wrong = []
    for name, value in at["fields"].items():
        field = name.split("|")[1 if "|" in name else 0]
        text = at["texts"][name]
        if "bytes_per_s" in field:
            said = f"{in_bytes(float(value))}/s" if value else "unknown"
        elif "bytes" in field:
            said = "–" if field == "channel.checkpoint_bytes" and text == "–" else in_bytes(float(value))
        elif field.startswith(("traffic.", "fleet.")) or "chunks_" in field or field == "rollout.phase":
            said = f"{int(value):,}"
        elif field == "channel.manifest":
            said = value[:8]
        elif field in ("channel.seq", "channel.state", "version", "data_encryption"):
            said = value
        else:
            continue
        if text != said:
            wrong.append((name, value, text))
    return wrong


def in_bytes(value):
    """Binary units, one digit behind the point; a tie goes up."""
    if value < 1024:
        return f"{value:.0f} B"
    for unit in ["KiB", "MiB", "GiB", "TiB", "PiB"]:
        value /= 1024
        if value < 1023.95 or unit == "PiB":
            return f"{Decimal(value).quantize(Decimal('0.1'), ROUND_HALF_UP)} {unit}"
    return None
