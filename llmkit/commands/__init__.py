"""The command line: one thin function a command, grouped by file. They print results and decide nothing."""
