"""What a build says of itself: a funnel by source whose counts add up, drops by reason with examples, sizes, speed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from llmkit.corpus.decide import FATE, VAL, Decision, count_fates
from llmkit.corpus.encode import EXAMPLES
from llmkit.corpus.units import Unit
from llmkit.screen import count

WARN_DROP = 0.25  # a rule that drops more of a source than this is worth a look


def make_funnel(units: list[Unit], counts: list[dict], decision: Decision) -> dict[str, dict[str, Any]]:
    """By source: read = quarantined + dropped by every rule + kept, which is asserted."""
    funnel: dict[str, dict[str, Any]] = {}
    for unit, one, fates in zip(units, counts, decision.fates, strict=True):
        row = funnel.setdefault(
            unit.source["name"],
            {"read": 0, "quarantined": 0, "dropped": {}, "kept": 0, "warnings": {}, "pii": {}, "languages": {}},
        )
        row["read"] += one["read"]
        row["quarantined"] += one["quarantined"]
        met = count_fates(fates)
        row["kept"] += int((fates <= VAL).sum())
        row["dropped"] = dict(Counter(row["dropped"]) + Counter({k: n for k, n in met.items() if FATE[k] > VAL}))
        for name in ("pii", "warnings", "languages"):
            row[name] = dict(Counter(row[name]) + Counter(one[name]))
    for source, row in funnel.items():
        assert row["read"] == row["quarantined"] + sum(row["dropped"].values()) + row["kept"], source
    return funnel


def report(manifest: dict[str, Any], counts: list[dict], shards: list[dict], decision: Decision) -> str:
    """What went in, what was dropped and why, what came out: Markdown. Without shards, of a trial."""
    lines = [
        "# Data report",
        "",
        "| source | read | quarantined | dropped | kept | kept MB |",
        "|---|---|---|---|---|---|",
    ]
    kept_bytes: Counter[str] = Counter()
    for shard in shards:
        kept_bytes[shard["source"]] += shard["train"]["bytes"] + shard["val"]["bytes"]
    for source, row in manifest["funnel"].items():
        dropped, size = sum(row["dropped"].values()), f"{kept_bytes[source] / 1e6:.2f}" if shards else "-"
        lines.append(f"| {source} | {row['read']} | {row['quarantined']} | {dropped} | {row['kept']} | {size} |")
    if shards:
        lines += sizes_of(manifest, counts, shards)
    lines += [f"- {line}" for line in findings(decision)]
    for source, row in manifest["funnel"].items():
        lines += ["", f"## {source}", ""]
        ours = [one for one in counts if one["source"] == source]
        if not row["kept"]:
            lines.append("- **nothing of it is left**")
        if others := row.get("passed over"):
            lines.append(
                "- files of no known kind, passed over: " + ", ".join(f"{n} {kind}" for kind, n in others.items())
            )
        lines += [f"- warning: {number} documents {what}" for what, number in row["warnings"].items()]
        if row["quarantined"]:
            reasons = sum((Counter(one["bad"]) for one in ours), Counter()).most_common(5)
            lines.append("- quarantined: " + ", ".join(f"{number} {reason}" for reason, number in reasons))
        if row["languages"]:
            found = Counter(row["languages"]).most_common(8)
            lines.append("- languages: " + ", ".join(f"{code} {number}" for code, number in found))
        if row["pii"]:
            lines.append(
                "- personal data found: " + ", ".join(f"{number} {kind}" for kind, number in row["pii"].items())
            )
        boilerplate = [one["boilerplate"] for one in ours if "boilerplate" in one]
        if removed := sum(one["lines"] for one in boilerplate):
            most = Counter({line: number for one in boilerplate for line, number in one["most"].items()}).most_common(3)
            shown = ", ".join(f"{line[:60]!r} on {number} pages" for line, number in most)
            lines.append(f"- {removed} lines taken out that stand on many pages: {shown}")
        for rule, number in sorted(row["dropped"].items(), key=lambda item: -item[1]):
            share = number / row["read"]
            look = " - **look at these**" if share > WARN_DROP else ""
            lines.append(f"- dropped {number} ({share:.1%}) by `{rule}`{look}")
            shown = [e for one in shards if one["source"] == source for e in one["examples"].get(rule, [])][:EXAMPLES]
            lines += [f"  - `{e['id']}`: {e['why']}: {e['text'][:100]!r}" for e in shown]
    lines += ["", "Names and addresses of people are not looked for."]
    return "\n".join(lines) + "\n"


def sizes_of(manifest: dict[str, Any], counts: list[dict], shards: list[dict]) -> list[str]:
    """Tokens by split and by source, seconds by stage, and memory. A speed only where all was done in this build."""
    lines = ["", "| | documents | tokens | MB | bytes a token | characters a token |", "|---|---|---|---|---|---|"]
    sources = {shard["source"]: None for shard in shards}
    groups = {f"all {split}": [shard[split] for shard in shards] for split in ("train", "val")}
    groups |= {
        name: [s[split] for s in shards if s["source"] == name for split in ("train", "val")] for name in sources
    }
    for name, made in groups.items():
        total = {key: sum(one[key] for one in made) for key in ("documents", "tokens", "bytes", "characters")}
        if name in sources:  # where the tail of a document is in val, it counts in both
            total["documents"] = manifest["funnel"][name]["kept"]
        tokens = max(1, total["tokens"])
        lines.append(
            f"| {name} | {total['documents']} | {count(total['tokens'])} | {total['bytes'] / 1e6:.2f} | "
            f"{total['bytes'] / tokens:.2f} | {total['characters'] / tokens:.2f} |"
        )
    stages = sorted(manifest["cpu_seconds"].items(), key=lambda item: -item[1])
    total, size = sum(manifest["cpu_seconds"].values()), sum(s[k]["bytes"] for s in shards for k in ("train", "val"))
    anew = sum(bool(one["seconds"]) for one in [*counts, *shards])
    whole = anew == len(counts) + len(shards)
    speed = f"{size / 1e6 / max(total, 1e-9):.2f} MB of kept text per CPU-second" if whole else "the rest was there"
    return [
        *lines,
        "",
        f"Split by {manifest['split_by']}; vocabulary {manifest['vocab_size']}. {manifest['seconds']:.2f} s with "
        f"{manifest['workers']} workers, {total:.1f} s of CPU, {speed} "
        f"({', '.join(f'{stage} {seconds:.1f}' for stage, seconds in stages)}); at most "
        f"{manifest['peak_mb']:.0f} MB of memory in a process.",
        "",
    ]


def findings(decision: Decision) -> list[str]:
    """What was found over all sources together."""
    found = []
    if decision.clusters:
        found.append(f"{decision.clusters} clusters of near duplicates, the largest of {decision.largest} documents")
    if decision.contamination:
        found.append("decontamination: " + ", ".join(f"{n} {what}" for what, n in decision.contamination.items()))
    if decision.cut_paragraphs:
        found.append(f"{decision.cut_paragraphs} paragraphs cut out that stood before")
    return found
