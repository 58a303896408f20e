"""Read, override and check the YAML config. Start with `load.load_config`. Nothing here imports torch."""
