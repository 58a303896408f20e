"""Raw text to token shards: cleaning, filters, deduplication, and the passes of a build."""
