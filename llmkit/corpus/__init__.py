"""The build of a corpus: sources through work units and passes to token shards, a manifest and a report."""
