"""Where cells may be logged besides the disk, a module each, and what is logged there."""
