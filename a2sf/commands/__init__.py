"""The sub-commands of `a2sf`: each reads the command line, calls the packages below and prints the outcome."""
