"""The sub-commands of `a2sf`, one file each: they read the command line and print, the work is done in the rooms below."""
