"""A sweep's plan on the screen, its estimate of time, and its progress."""
