"""Groups of commands, and how results are printed."""
