"""What a build says of itself: a funnel by source whose counts add up, drops by reason with examples, sizes, speed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from llmkit.data.units import EXAMPLES
from llmkit.run import count

WARN_DROP = 0.25  # a rule that drops more of a source than this is worth a look


def make_funnel(counts: list[dict], exact: list, near: list, keep: list) -> dict[str, dict[str, Any]]:
    """By source: read = quarantined + dropped by every rule + kept, which is asserted."""
    funnel: dict[str, dict[str, Any]] = {}
    for one, e, n, k in zip(counts, exact, near, keep, strict=True):
        row = funnel.setdefault(
            one["source"], {"read": 0, "quarantined": 0, "dropped": {}, "kept": 0, "warnings": {}, "pii": {}}
        )
        row["read"] += one["read"]
        row["quarantined"] += one["quarantined"]
        row["kept"] += int(k.sum())
        dropped = one["dropped"] | {"exact duplicate": int(e.sum()), "near duplicate": int(n.sum())}
        row["dropped"] = dict(Counter(row["dropped"]) + Counter(dropped))
        row["pii"] = dict(Counter(row["pii"]) + Counter(one["pii"]))
        row["warnings"] = dict(Counter(row["warnings"]) + Counter(one["warnings"]))
    for source, row in funnel.items():
        assert row["read"] == row["quarantined"] + sum(row["dropped"].values()) + row["kept"], source
    return funnel


def report(manifest: dict[str, Any], counts: list[dict]) -> str:
    """What went in, what was dropped and why, what came out: Markdown."""
    lines = ["# Data report", "", "| source | read | quarantined | dropped | kept |", "|---|---|---|---|---|"]
    for source, row in manifest["funnel"].items():
        dropped = sum(row["dropped"].values())
        lines.append(f"| {source} | {row['read']} | {row['quarantined']} | {dropped} | {row['kept']} |")
    lines += ["", "| split | documents | tokens | MB | bytes a token |", "|---|---|---|---|---|"]
    for split, part in manifest["splits"].items():
        per_token = part["bytes"] / max(1, part["tokens"])
        sizes = f"{part['documents']} | {count(part['tokens'])} | {part['bytes'] / 1e6:.2f} | {per_token:.2f}"
        lines.append(f"| {split} | {sizes} |")
    seconds = sum(one["cpu_seconds"] for one in counts)
    size = sum(one["bytes"] for one in counts) / 1e6
    lines += ["", f"Split by {manifest['split_by']}; vocabulary {manifest['vocab_size']}; {manifest['seconds']} s with "
              f"{manifest['workers']} workers, cleaning and signing {size / max(seconds, 1e-9):.1f} MB per CPU-second, "
              f"{manifest['peak_mb']:.0f} MB peak memory a worker."]  # fmt: skip
    for source, row in manifest["funnel"].items():
        lines += ["", f"## {source}", ""]
        lines += [f"- warning: {number} documents {what}" for what, number in row["warnings"].items()]
        if row["pii"]:
            lines.append(
                "- personal data found: " + ", ".join(f"{number} {kind}" for kind, number in row["pii"].items())
            )
        for rule, number in sorted(row["dropped"].items(), key=lambda item: -item[1]):
            share = number / row["read"]
            look = " - **look at these**" if share > WARN_DROP else ""
            lines.append(f"- dropped {number} ({share:.1%}) by `{rule}`{look}")
            shown = [e for one in counts if one["source"] == source for e in one["examples"].get(rule, [])][:EXAMPLES]
            lines += [f"  - `{e['id']}`: {e['why']}: {e['text'][:100]!r}" for e in shown]
    lines += ["", "Names and addresses of people are not looked for."]
    return "\n".join(lines) + "\n"
