"""Text to tokens to batches. Nothing here knows of models, and only `batches` is near torch's world."""
