"""Tables as text, LaTeX, CSV and on the screen."""
