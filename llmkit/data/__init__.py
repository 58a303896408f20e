"""Token shards and encoded records to batches."""
