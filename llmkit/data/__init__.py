"""Make batches from token shards and encoded records."""
