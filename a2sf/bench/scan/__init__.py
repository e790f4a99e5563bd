"""The algorithm of the kernels in a form that is made to be read (`scan`, `columns`), and its speed (`speed`)."""
