"""Write tokens with a model: sampling, a cache, many prompts at a time."""
