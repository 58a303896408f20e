"""Define the command line: one thin function per command, which reads options and prints results."""
