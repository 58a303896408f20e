"""The YAML config: read, overridden, checked. Nothing here imports torch; `load.load_config` is the one way in."""
