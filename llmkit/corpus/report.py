"""Write the report of a build: counts by source, reasons for drops with examples, sizes and speed."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from llmkit.corpus.decide import FATE_IDS, VAL, Decision, count_fates
from llmkit.corpus.encode import MAX_EXAMPLES
from llmkit.corpus.units import Unit
from llmkit.readers.tally import Tally
from llmkit.screen import count, format_count

WARN_DROP_FRACTION = 0.25  # the report marks rules that drop more of a source than this


def make_funnel(units: list[Unit], counts: list[dict], decision: Decision) -> dict[str, dict[str, Any]]:
    """Return the counts by source. Assert for each source that read = quarantined + dropped + kept."""
    funnel: dict[str, dict[str, Any]] = {}
    for unit, one, fates in zip(units, counts, decision.fates, strict=True):
        row = funnel.setdefault(
            unit.source["name"],
            {"read": 0, "quarantined": 0, "dropped": {}, "kept": 0, "warnings": {}, "pii": {}, "languages": {}},
        )
        row["read"] += one["records"]["rows"]
        row["quarantined"] += one["records"]["bad"]
        row["kept"] += int((fates <= VAL).sum())
        dropped = Counter({name: n for name, n in count_fates(fates).items() if FATE_IDS[name] > VAL})
        row["dropped"] = dict(Counter(row["dropped"]) + dropped)
        for name in ("pii", "warnings", "languages"):
            row[name] = dict(Counter(row[name]) + Counter(one[name]))
    for source, row in funnel.items():
        assert row["read"] == row["quarantined"] + sum(row["dropped"].values()) + row["kept"], source
    return funnel


def render_report(manifest: dict[str, Any], counts: list[dict], shards: list[dict], decision: Decision) -> str:
    """Return the report in Markdown: what was read, dropped and why, and kept. A trial has no shards."""
    lines = ["# Data report", ""]
    lines += ["| source | read | quarantined | dropped | kept | kept MB |", "|---|---|---|---|---|---|"]
    kept_bytes: Counter[str] = Counter()
    for shard in shards:
        kept_bytes[shard["source"]] += shard["train"]["bytes"] + shard["val"]["bytes"]
    for source, row in manifest["funnel"].items():
        dropped, size = sum(row["dropped"].values()), f"{kept_bytes[source] / 1e6:.2f}" if shards else "-"
        lines.append(f"| {source} | {row['read']} | {row['quarantined']} | {dropped} | {row['kept']} | {size} |")
    if shards:
        lines += render_sizes(manifest, counts, shards)
    lines += [f"- {line}" for line in summarize_decision(decision)]
    for source, row in manifest["funnel"].items():
        units, parts = ([one for one in part if one["source"] == source] for part in (counts, shards))
        if about := describe_source(row, units, parts):
            lines += ["", f"## {source}", "", *about]
    lines += ["", "Names and addresses of people are not detected."]
    return "\n".join(lines) + "\n"


def describe_source(row: dict[str, Any], counts: list[dict], shards: list[dict]) -> list[str]:
    """Return lines in Markdown about what is remarkable in a source: a row of the funnel, and its units."""
    about = []
    if not row["kept"]:
        about.append("- **no document of this source is left**")
    if skipped := row.get("skipped files"):
        about.append("- skipped files: " + join_counts(skipped.items()))
    about += [f"- warning: {number} documents {what}" for what, number in row["warnings"].items()]
    if row["quarantined"]:
        about.append(f"- quarantined: {merge_records(counts).summary()}")
    if row["languages"]:
        found = Counter(row["languages"]).most_common(8)
        about.append("- languages: " + ", ".join(f"{code} {number}" for code, number in found))
    if row["pii"]:
        about.append("- personal data found: " + join_counts(row["pii"].items()))
    boilerplate = [one["boilerplate"] for one in counts if "boilerplate" in one]
    if removed := sum(one["lines"] for one in boilerplate):
        most = Counter({line: number for one in boilerplate for line, number in one["most"].items()}).most_common(3)
        shown = ", ".join(f"{line[:60]!r} on {number} pages" for line, number in most)
        about.append(f"- {removed} lines removed that many pages share: {shown}")
    for rule, number in sorted(row["dropped"].items(), key=lambda item: -item[1]):
        share = number / row["read"]
        warning = " - **check these**" if share > WARN_DROP_FRACTION else ""
        about.append(f"- dropped {number} ({share:.1%}) by `{rule}`{warning}")
        shown = [e for one in shards for e in one["examples"].get(rule, [])]
        about += [f"  - `{e['id']}`: {e['why']}: {e['text'][:100]!r}" for e in shown[:MAX_EXAMPLES]]
    return about


def merge_records(counts: list[dict]) -> Tally:
    """Return the tally of the records of several units. Its first bad record has a line counted from a unit's start."""
    total = Tally()
    for one in counts:
        total.merge(Tally(**one["records"]))
    return total


def join_counts(counts: Iterable[tuple[str, int]]) -> str:
    """Join (name, number) pairs as in "3 email, 1 ip"."""
    return ", ".join(f"{number} {name}" for name, number in counts)


def render_sizes(manifest: dict[str, Any], counts: list[dict], shards: list[dict]) -> list[str]:
    """Return lines with tokens by split and source, CPU seconds by stage, and memory.

    A speed is given only if all units were measured and encoded in this build.
    """
    lines = ["", "| | documents | tokens | MB | bytes/token | characters/token |", "|---|---|---|---|---|---|"]
    sources = {shard["source"]: None for shard in shards}
    groups = {f"all {split}": [shard[split] for shard in shards] for split in ("train", "val")}
    groups |= {
        name: [s[split] for s in shards if s["source"] == name for split in ("train", "val")] for name in sources
    }
    for name, group in groups.items():
        total = {key: sum(one[key] for one in group) for key in ("documents", "tokens", "bytes", "characters")}
        if name in sources:  # their sum would count a document twice if its tail is in val
            total["documents"] = manifest["funnel"][name]["kept"]
        tokens = max(1, total["tokens"])
        lines.append(
            f"| {name} | {total['documents']} | {format_count(total['tokens'])} | {total['bytes'] / 1e6:.2f} | "
            f"{total['bytes'] / tokens:.2f} | {total['characters'] / tokens:.2f} |"
        )
    stages = sorted(manifest["cpu_seconds"].items(), key=lambda item: -item[1])
    total, size = sum(manifest["cpu_seconds"].values()), sum(s[k]["bytes"] for s in shards for k in ("train", "val"))
    complete = all(one["seconds"] for one in [*counts, *shards])
    speed = f"{size / 1e6 / max(total, 1e-9):.2f} MB of kept text per CPU-second" if complete else "the rest was reused"
    return [
        *lines,
        "",
        f"Split by {manifest['split_by']}; vocabulary {manifest['vocab_size']}. {manifest['seconds']:.2f} s with "
        f"{count(manifest['workers'], 'worker')}, {total:.1f} s of CPU, {speed} "
        f"({', '.join(f'{stage} {seconds:.1f}' for stage, seconds in stages)}); at most "
        f"{manifest['peak_mb']:.0f} MB of memory per process.",
        "",
    ]


def summarize_decision(decision: Decision) -> list[str]:
    """Return lines on duplicates and contamination in all sources together."""
    found = []
    if decision.clusters:
        found.append(f"{decision.clusters} clusters of near duplicates, the largest of {decision.largest} documents")
    if decision.contamination:
        found.append("decontamination: " + join_counts(decision.contamination.items()))
    if decision.cut_paragraphs:
        found.append(f"{decision.cut_paragraphs} paragraphs cut out that repeat earlier ones")
    return found
