"""What the page shows, and what it should show of a status."""

import json

# What is on the page and what it was made of, taken in one go, so that both are of one instant.
FIELDS = """
const all = {}, status = window.aquiferShown.status;
for (const e of document.querySelectorAll('[data-field]')) {
  const at = e.closest('[data-channel],[data-engine],[data-transport],[data-phase]:not([data-field])');
  const of = at ? at.dataset.channel ?? at.dataset.engine ?? at.dataset.transport ?? '' : '';
  const article = e.closest('article');
  const phase = e.closest('li[data-phase]')?.dataset.phase;
  const name = (article ? article.dataset.channel + '|' : of ? of + '|' : '') + e.dataset.field + (phase ? '|' + phase : '');
  all[name] = e.dataset.value;
}
const nodes = {};
for (const e of document.querySelectorAll('#grid [data-node]')) nodes[e.dataset.node] = e.dataset.state;
// As text: WebDriver loses keys such as __proto__.
return JSON.stringify({fields: all, nodes, status});
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
