"""What `a2sf run` does with composed configurations (`grid`), and how the command starts and ends (`process`)."""
