"""The command line: flags and gin, one call into the library each."""
