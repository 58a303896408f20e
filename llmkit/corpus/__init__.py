"""Turn raw text into token shards: clean, filter and deduplicate documents in the passes of a build."""
